//! A malicious client on a thread of its own. Other clients measure its effect.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with};

use crate::clock::Instant;
use crate::cores;
use crate::error::LoadtestError;
use crate::http2;

/// Kind of attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attack {
    /// Request heads that never end.
    Heads,
    /// HTTP/2 responses that are never read.
    Unread,
    /// Request bodies sent slowly.
    Bodies,
}

/// Handle of the attacking thread. Dropping it stops the attack.
#[derive(Debug)]
pub(crate) struct Attacker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<u64, LoadtestError>>>,
}

/// A connection of the attacker.
struct AttackConnection {
    stream: TcpStream,
    /// Bytes not sent yet.
    left: Vec<u8>,
    next_stream: u32,
    rested: Instant,
}

/// Source address, used by no other client.
const SOURCE_ADDRESS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), 0);
/// Pause between two passes of the loop. Each pass serves one of [`PARTS`] shares of the connections.
const PASS_INTERVAL: Duration = Duration::from_millis(5);
const PARTS: usize = 20;
/// Interval between the pieces of a body, short enough for Anteroom to keep the connection.
const DRIP_INTERVAL: Duration = Duration::from_secs(4);
const DRIP_BYTES: usize = 16 << 10;
/// Streams opened on a connection in each pass.
const STREAMS_PER_PASS: u32 = 10;

// === impl Attack ===

impl Attack {
    pub(crate) const ALL: [Self; 3] = [Self::Heads, Self::Unread, Self::Bodies];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Heads => "2,000 heads of 60 KB without an end",
            Self::Unread => "2,000 requests/s over HTTP/2, answers unread",
            Self::Bodies => "100 bodies, of 1 MiB each, that drip",
        }
    }

    /// Returns the number of connections and the rate, per second, at which they are opened. Closed ones are reopened
    /// at the same rate.
    fn connections(self) -> (usize, f64) {
        match self {
            Self::Heads => (2000, 1000.0),
            Self::Unread => (20, 20.0),
            Self::Bodies => (100, 50.0),
        }
    }

    /// Returns the first bytes sent on a connection.
    fn opening(self) -> Vec<u8> {
        const REQUEST_HEAD: &str = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n";
        match self {
            Self::Heads => format!("{REQUEST_HEAD}X: {}", "a".repeat(60_000)).into_bytes(),
            Self::Unread => {
                let mut bytes = Vec::new();
                http2::hello_unread(&mut bytes);
                bytes
            }
            Self::Bodies => {
                let begun = format!(r#"{{"model":"tiny","p":"{}"#, "x".repeat(1 << 20));
                format!("{REQUEST_HEAD}Content-Length: 33554432\r\n\r\n{begun}").into_bytes()
            }
        }
    }
}

// === impl Attacker ===

impl Attacker {
    /// Starts to attack `target` from `core`.
    pub(crate) fn start(attack: Attack, target: SocketAddr, core: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            cores::pin(core)?;
            run(attack, target, &stopped).map_err(|error| LoadtestError::io("attack", error))
        });
        Self { stop, thread: Some(thread) }
    }

    /// Stops the attack and returns the number of connections opened.
    pub(crate) fn end(mut self) -> Result<u64, LoadtestError> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        ended
            .and_then(Result::ok)
            .unwrap_or_else(|| Err(LoadtestError::Wrong("the attacker panicked".into())))
    }
}

impl Drop for Attacker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn run(attack: Attack, target: SocketAddr, stop: &AtomicBool) -> io::Result<u64> {
    let (count, rate) = attack.connections();
    let opening = attack.opening();
    let mut open: Vec<Option<AttackConnection>> = (0..count).map(|_| None).collect();
    let begin = Instant::now();
    let mut opened = 0_u64;
    let mut part = 0;
    while !stop.load(Ordering::Relaxed) {
        for place in open.iter_mut().skip(part).step_by(PARTS) {
            if place.as_mut().is_some_and(|open| open.continue_attack(attack).is_err()) {
                *place = None;
            }
            if place.is_none() && (opened as f64) < begin.elapsed().as_secs_f64() * rate {
                opened += 1;
                *place = Some(AttackConnection::new(target, opening.clone())?);
            }
        }
        part = (part + 1) % PARTS;
        thread::sleep(PASS_INTERVAL);
    }
    Ok(opened)
}

// === impl AttackConnection ===

impl AttackConnection {
    fn new(target: SocketAddr, opening: Vec<u8>) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, Some(ipproto::TCP))?;
        bind(&socket, &SOURCE_ADDRESS)?;
        match connect(&socket, &target) {
            // Nothing may accept the connection; the first write reports that.
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let stream = TcpStream::from(socket);
        Ok(Self { stream, left: opening, next_stream: 1, rested: Instant::now() })
    }

    /// Sends as much as the socket takes. Fails once the peer has closed the connection.
    fn continue_attack(&mut self, attack: Attack) -> io::Result<()> {
        if self.left.is_empty() {
            match attack {
                Attack::Heads => {}
                Attack::Unread => {
                    for _ in 0..STREAMS_PER_PASS {
                        http2::get_nothing(&mut self.left, self.next_stream);
                        self.next_stream += 2;
                    }
                }
                Attack::Bodies if self.rested.elapsed() >= DRIP_INTERVAL => {
                    self.left = vec![b'x'; DRIP_BYTES];
                    self.rested = Instant::now();
                }
                Attack::Bodies => {}
            }
        }
        match self.stream.write(&self.left) {
            Ok(sent) => drop(self.left.drain(..sent)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let mut answer = [0; 4096];
        match self.stream.read(&mut answer) {
            // Over HTTP/1 any response is a rejection, after which the server closes.
            Ok(0) => Err(io::ErrorKind::ConnectionAborted.into()),
            Ok(_) if attack != Attack::Unread => Err(io::ErrorKind::ConnectionAborted.into()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::cores::Cores;

    #[test]
    fn attack_continues_until_dropped() {
        for attack in Attack::ALL {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let core = Cores::choose().unwrap().attacker;
            let attacker = Attacker::start(attack, listener.local_addr().unwrap(), core);
            // A connection closed by the peer is opened again.
            for _ in 0..2 {
                let (mut stream, from) = listener.accept().unwrap();
                assert_eq!(from.ip(), *SOURCE_ADDRESS.ip());
                let mut begun = vec![0; attack.opening().len()];
                stream.read_exact(&mut begun).unwrap();
                assert_eq!(begun, attack.opening());
            }
            assert!(attacker.end().unwrap() >= 2, "{attack:?}");
        }
    }
}
