//! Closed-loop clients: each has one connection and one request on it, and sends the next one as soon
//! as the answer is there. That measures throughput; its latencies are those of a full house.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::Duration;

use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use crate::backend::ANSWER;
use crate::clock::Instant;
use crate::http::{self, Framing};
use crate::rig::Clients;

/// The request's body: a short chat, about 300 bytes, its model name behind the messages as SDKs have it.
pub(crate) const PROMPT: &str = concat!(
    r#"{"messages":[{"role":"system","content":"You are a helpful assistant. Answer in one short sentence."},"#,
    r#"{"role":"user","content":"Hello! Which planet of our solar system has the shortest day, and how long is it?"}],"#,
    r#""model":"tiny","max_tokens":64,"temperature":0.7,"top_p":0.95,"stream":false,"user":"loadtest"}"#
);

static REQUEST: LazyLock<Vec<u8>> = LazyLock::new(|| {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: loadtest\r\n\
         Accept: application/json\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{PROMPT}",
        PROMPT.len()
    )
    .into_bytes()
});

const BUFFER: usize = 4096;
/// A contender that is down answers with errors as fast as it can: no need to count them all.
const ERRORS: u64 = 100;

/// The clients of one measurement, and what they saw.
#[derive(Debug)]
pub(crate) struct Load {
    target: SocketAddr,
    clients: Vec<Client>,
    /// Requests that may still be started.
    budget: u64,
    waiting: usize,
    tally: Tally,
}

/// Answers since the last reset, errors since the start.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) latency: Histogram<u64>,
    pub(crate) completed: u64,
    pub(crate) errors: u64,
    pub(crate) first_error: Option<String>,
}

#[derive(Debug)]
struct Client {
    stream: TcpStream,
    buffer: Box<[u8]>,
    filled: usize,
    sent: Option<Instant>,
}

// === impl Load ===

impl Load {
    /// Opens the connections; `start` sends the first requests.
    pub(crate) fn connect(registry: &Registry, target: SocketAddr, connections: usize) -> io::Result<Self> {
        let clients = (0..connections)
            .map(|key| Client::connect(registry, target, Token(key)))
            .collect::<io::Result<_>>()?;
        Ok(Self { target, clients, budget: 0, waiting: 0, tally: Tally::new() })
    }

    /// Lets every client send until `requests` have been started.
    pub(crate) fn start(&mut self, requests: u64) {
        self.budget = requests;
        let now = Instant::now();
        for key in 0..self.clients.len() {
            if self.clients[key].sent.is_none() {
                self.next(key, now);
            }
        }
    }

    /// No further request; those sent may still be answered.
    pub(crate) fn finish(&mut self) {
        self.budget = 0;
    }

    /// Requests sent and not answered.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Forgets the answers of the warm-up, but none of its errors.
    pub(crate) fn reset(&mut self) {
        self.tally.latency.reset();
        self.tally.completed = 0;
    }

    fn next(&mut self, key: usize, now: Instant) {
        if self.budget == 0 {
            return;
        }
        self.budget -= 1;
        let client = &mut self.clients[key];
        match client.stream.write(&REQUEST) {
            Ok(written) if written == REQUEST.len() => {
                client.sent = Some(now);
                self.waiting += 1;
            }
            // Nothing else is in the socket's buffer, so it always fits.
            Ok(_) => self.tally.fail("a request was cut".into()),
            Err(error) => self.tally.fail(format!("cannot send: {error}")),
        }
    }
}

impl Clients for Load {
    fn hopeless(&self) -> bool {
        self.tally.errors >= ERRORS
    }

    fn on_event(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let key = token.0;
        let client = &mut self.clients[key];
        let answered = match client.receive() {
            Ok(false) => return Ok(()),
            Ok(true) => Ok(()),
            Err(error) => Err(error),
        };
        let now = Instant::now();
        if let Some(sent) = client.sent.take() {
            self.waiting -= 1;
            self.tally.completed += 1;
            self.tally.latency.saturating_record(nanos(now - sent));
        }
        if let Err(why) = answered {
            self.tally.fail(why);
            if self.hopeless() {
                self.budget = 0;
            }
            self.clients[key] = Client::connect(registry, self.target, token)?;
        }
        self.next(key, now);
        Ok(())
    }
}

// === impl Client ===

impl Client {
    fn connect(registry: &Registry, target: SocketAddr, token: Token) -> io::Result<Self> {
        // Blocking, but to a listener on this machine: the kernel accepts at once or refuses.
        let stream = std::net::TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(stream);
        registry.register(&mut stream, token, Interest::READABLE)?;
        Ok(Self { stream, buffer: vec![0; BUFFER].into(), filled: 0, sent: None })
    }

    /// Whether the whole answer is there, and is the right one. As in the backend, a read that leaves
    /// room has emptied the socket.
    fn receive(&mut self) -> Result<bool, String> {
        match self.stream.read(&mut self.buffer[self.filled..]) {
            Ok(0) => return Err("the connection was closed".into()),
            Ok(read) => self.filled += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(format!("cannot receive: {error}")),
        }
        let complete = check(&self.buffer[..self.filled])?;
        if complete {
            if self.sent.is_none() {
                return Err("an answer that nobody asked for".into());
            }
            self.filled = 0;
        } else if self.filled == self.buffer.len() {
            return Err("an answer longer than was sent".into());
        }
        Ok(complete)
    }
}

// === impl Tally ===

impl Tally {
    fn new() -> Self {
        // Nanoseconds up to a minute, three digits.
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("valid bounds");
        Self { latency, completed: 0, errors: 0, first_error: None }
    }

    fn fail(&mut self, why: String) {
        self.errors += 1;
        self.first_error.get_or_insert(why);
    }
}

/// Whether `buf` is the backend's answer, complete.
fn check(buf: &[u8]) -> Result<bool, String> {
    let Some(head) = http::head(buf).map_err(|error| error.to_string())? else { return Ok(false) };
    let body = &buf[head.len..];
    if http::status(head.start) != Some(200) {
        let answer = String::from_utf8_lossy(&body[..body.len().min(200)]);
        return Err(format!("{} {answer}", String::from_utf8_lossy(head.start)));
    }
    if head.body != Framing::Length(ANSWER.len()) {
        return Err(format!("the answer's body should have {} bytes, it has {:?}", ANSWER.len(), head.body));
    }
    if body.len() < ANSWER.len() {
        return Ok(false);
    }
    if body != ANSWER.as_bytes() {
        return Err("the answer's body was changed on its way".into());
    }
    Ok(true)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_is_small_and_names_its_model() {
        let prompt: serde_json::Value = serde_json::from_str(PROMPT).unwrap();
        assert_eq!(prompt["model"], "tiny");
        assert!((280..320).contains(&PROMPT.len()), "{}", PROMPT.len());
    }

    #[test]
    fn only_the_whole_right_answer_counts() {
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{ANSWER}", ANSWER.len());
        assert_eq!(check(answer.as_bytes()), Ok(true));
        assert_eq!(check(&answer.as_bytes()[..answer.len() - 1]), Ok(false));
        assert!(check(answer.replace("200 OK", "503 No").as_bytes()).is_err());
        assert!(check(answer.replace("tiny", "huge").as_bytes()).is_err());
        assert!(check(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{").is_err());
        assert!(check(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").is_err());
        assert!(check(format!("{answer}!").as_bytes()).is_err());
    }
}
