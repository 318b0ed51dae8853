//! Tens of thousands of clients with a connection each, at little cost to the load test.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with};

use crate::clock::Instant;
use crate::member::{Inbox, NumberedRequest, ReadProgress, RequestEnd};
use crate::multiplexed::{Multiplexed, STREAMS_PER_CONNECTION};

/// Connections per source address: far fewer than it has ports, so that earlier crowds may leave theirs in TIME_WAIT.
const CONNECTIONS_PER_ADDRESS: u32 = 1000;
const CROWD_BUFFER_BYTES: usize = 16 * 1024;
/// Bit set in the tokens of multiplexed connections.
const MULTIPLEXED_TOKEN_BIT: usize = 1 << 30;

/// The clients and the tally of their results.
#[derive(Debug)]
pub(crate) struct Crowd {
    server: SocketAddr,
    members: Vec<CrowdMember>,
    /// Connections shared by further clients, each with the time its requests were sent.
    multiplexed: Vec<(Multiplexed, Instant)>,
    message: NumberedRequest,
    buffer: Box<[u8]>,
    /// Members that send next; each served request lets one of them send. `None` stops sending.
    next: Option<VecDeque<usize>>,
    pub(crate) tally: CrowdTally,
}

#[derive(Debug)]
struct CrowdMember {
    stream: TcpStream,
    inbox: Inbox,
    /// Time at which the request was sent or was due.
    sent: Option<Instant>,
}

#[derive(Debug, Default)]
pub(crate) struct CrowdTally {
    /// Requests without a complete response.
    pub(crate) waiting: usize,
    /// Responses whose head arrived before the body.
    pub(crate) begun: usize,
    pub(crate) heartbeats: u64,
    pub(crate) served: usize,
    pub(crate) refused: usize,
    /// Time from each rejected request to its rejection.
    pub(crate) refused_after: Vec<Duration>,
    pub(crate) last_served: Option<Instant>,
    /// First unexpected observation.
    pub(crate) wrong: Option<String>,
}

// === impl Crowd ===

impl Crowd {
    /// Creates an empty crowd. `streamed` makes its members request streams.
    pub(crate) fn new(server: SocketAddr, streamed: bool) -> Self {
        Self {
            server,
            members: Vec::new(),
            multiplexed: Vec::new(),
            message: NumberedRequest::new(streamed),
            buffer: vec![0; CROWD_BUFFER_BYTES].into(),
            next: None,
            tally: CrowdTally::default(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Connects `count` more clients. Takes seconds if the server's accept queue is too short for them.
    pub(crate) fn join(&mut self, registry: &Registry, count: usize) -> io::Result<()> {
        for _ in 0..count {
            let mut stream = open(self.server)?;
            registry.register(&mut stream, Token(self.members.len()), Interest::READABLE)?;
            self.members.push(CrowdMember { stream, inbox: Inbox::default(), sent: None });
        }
        Ok(())
    }

    /// Adds `count` more clients on as few connections as possible, which send at once. Returns the number of
    /// multiplexed connections.
    pub(crate) fn join_multiplexed(&mut self, registry: &Registry, count: usize) -> io::Result<usize> {
        let mut number = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        let mut left = count;
        while left > 0 {
            let streams = left.min(STREAMS_PER_CONNECTION);
            let mut stream = open(self.server)?;
            let token = Token(MULTIPLEXED_TOKEN_BIT | self.multiplexed.len());
            registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
            let mut multiplexed = Multiplexed::new(stream);
            let numbers = number..number + streams as u32;
            number = numbers.end;
            left -= streams;
            self.tally.waiting += streams;
            if let Err(why) = multiplexed.send(numbers, &mut self.message) {
                self.tally.wrong(why);
            }
            self.multiplexed.push((multiplexed, Instant::now()));
        }
        Ok(self.multiplexed.len())
    }

    /// Sends the request of a member, with its own number; `due` is the scheduled time.
    pub(crate) fn send(&mut self, member: usize, due: Instant) {
        let number = u32::try_from(member).unwrap_or(u32::MAX);
        let bytes = self.message.numbered(number);
        let member = &mut self.members[member];
        // The socket buffer is empty, so the request always fits.
        match member.stream.write_all(bytes) {
            Ok(()) => {
                member.sent = Some(due);
                self.tally.waiting += 1;
            }
            Err(error) => self.tally.wrong(format!("cannot send: {error}")),
        }
    }

    /// Lets the first `members` clients send in turn, `at_once` at a time, until [`Self::stop`].
    pub(crate) fn send_in_turn(&mut self, members: usize, at_once: usize) {
        let now = Instant::now();
        self.next = Some((at_once..members).collect());
        for member in 0..at_once.min(members) {
            self.send(member, now);
        }
    }

    /// Stops sending. Responses to requests already sent may still arrive.
    pub(crate) fn stop(&mut self) {
        self.next = None;
    }

    /// Closes all connections, with requests in flight or not. Takes a few µs per connection.
    pub(crate) fn hang_up(&mut self) {
        self.members.clear();
        self.tally.waiting = 0;
    }

    pub(crate) fn on_event(&mut self, token: Token) {
        let at = token.0;
        if at & MULTIPLEXED_TOKEN_BIT != 0 {
            return self.on_multiplexed(at & !MULTIPLEXED_TOKEN_BIT);
        }
        // The connection has been closed in the meantime.
        let Some(member) = self.members.get_mut(at) else { return };
        // A read that leaves room has emptied the socket; later data triggers a new edge.
        loop {
            let read = match member.stream.read(&mut self.buffer) {
                Ok(0) => return self.tally.wrong("a connection was closed".into()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.tally.wrong(format!("cannot receive: {error}")),
            };
            let news = match member.inbox.take(&self.buffer[..read]) {
                Ok(news) => news,
                Err(why) => return self.tally.wrong(why),
            };
            self.tally.record_progress(news);
            if let Some(end) = news.end {
                let Some(sent) = member.sent.take() else {
                    return self.tally.wrong("unexpected response: no request is in flight".into());
                };
                self.tally.ended(end, sent);
                return self.send_next_after(at);
            }
            if read < self.buffer.len() {
                return;
            }
        }
    }

    fn on_multiplexed(&mut self, at: usize) {
        let Some((multiplexed, sent)) = self.multiplexed.get_mut(at) else { return };
        let tally = &mut self.tally;
        let heard = multiplexed.on_event(&mut self.buffer, &mut self.message, |news| {
            tally.record_progress(news);
            if let Some(end) = news.end {
                tally.ended(end, *sent);
            }
        });
        if let Err(why) = heard {
            tally.wrong(why);
        }
    }

    fn send_next_after(&mut self, served: usize) {
        let Some(next) = &mut self.next else { return };
        next.push_back(served);
        if let Some(member) = next.pop_front() {
            self.send(member, Instant::now());
        }
    }
}

// === impl CrowdTally ===

impl CrowdTally {
    fn record_progress(&mut self, news: ReadProgress) {
        self.begun += usize::from(news.begun);
        self.heartbeats += u64::from(news.heartbeats);
    }

    fn ended(&mut self, end: RequestEnd, sent: Instant) {
        self.waiting -= 1;
        let now = Instant::now();
        match end {
            RequestEnd::Served => {
                self.served += 1;
                self.last_served = Some(now);
            }
            RequestEnd::Refused => {
                self.refused += 1;
                self.refused_after.push(now - sent);
            }
        }
    }

    fn wrong(&mut self, why: String) {
        self.wrong.get_or_insert(why);
    }
}

/// Opens a connection from an address of 127.0.0.0/8 that still has ports.
fn open(server: SocketAddr) -> io::Result<TcpStream> {
    static OPENED: AtomicU32 = AtomicU32::new(0);
    let source = source(OPENED.fetch_add(1, Ordering::Relaxed));
    let socket =
        socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    bind(&socket, &source)?;
    // Blocking, but the listener is on this machine: the kernel accepts at once.
    connect(&socket, &server)?;
    let stream = std::net::TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(TcpStream::from_std(stream))
}

/// Returns the source address for the connection with this number, from 127.1.0.1 upwards. The load test uses these
/// addresses for nothing else.
fn source(opened: u32) -> SocketAddrV4 {
    let number = opened / CONNECTIONS_PER_ADDRESS;
    let [high, middle] = [number / 250 % 250, number % 250].map(|part| part as u8);
    SocketAddrV4::new(Ipv4Addr::new(127, 1, high, middle + 1), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_addresses_are_loopback_and_vary() {
        assert_eq!(source(0), source(CONNECTIONS_PER_ADDRESS - 1));
        assert_eq!(source(0).ip(), &Ipv4Addr::new(127, 1, 0, 1));
        assert_eq!(source(250 * CONNECTIONS_PER_ADDRESS).ip(), &Ipv4Addr::new(127, 1, 1, 1));
    }
}
