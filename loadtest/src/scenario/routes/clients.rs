//! Open-loop clients: a request without a free connection waits, and its latency includes the wait. A stall of the
//! contender thus shows in all requests due during it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use crate::backend::COMPLETION_BODY;
use crate::clock::Instant;
use crate::http;

const CLIENT_BUFFER_BYTES: usize = 4096;
/// Requests that may wait for a free connection before the measurement is abandoned.
const MAX_WAITING_REQUESTS: usize = 100_000;

/// The connections and the schedule of requests.
#[derive(Debug)]
pub(super) struct RouteClients {
    clients: Vec<RouteClient>,
    free: Vec<usize>,
    /// Due times of requests waiting for a connection.
    waiting: VecDeque<Instant>,
    requests: Vec<Vec<u8>>,
    pause: Duration,
    next: Instant,
    sent: usize,
    pub(super) latency: Histogram<u64>,
    pub(super) first_error: Option<String>,
}

#[derive(Debug)]
struct RouteClient {
    stream: TcpStream,
    buffer: Box<[u8]>,
    filled: usize,
    due: Option<Instant>,
}

/// Builds a request for a model.
pub(super) fn request(model: &str) -> Vec<u8> {
    let body = format!(
        r#"{{"messages":[{{"role":"user","content":"Which planet of our solar system has the shortest day?"}}],"model":"{model}","max_tokens":64}}"#
    );
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

// === impl RouteClients ===

impl RouteClients {
    /// Connects, and schedules `rate` requests per second from now on, cycling through `requests`.
    pub(super) fn connect(
        registry: &Registry,
        proxy: SocketAddr,
        connections: usize,
        rate: u32,
        requests: Vec<Vec<u8>>,
    ) -> io::Result<Self> {
        let clients: Vec<_> = (0..connections)
            .map(|key| RouteClient::connect(registry, proxy, Token(key)))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            free: (0..clients.len()).collect(),
            clients,
            waiting: VecDeque::new(),
            requests,
            pause: Duration::from_secs(1) / rate,
            next: Instant::now(),
            sent: 0,
            latency: Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("valid bounds"),
            first_error: None,
        })
    }

    /// Sends the requests that are due.
    pub(super) fn send_due(&mut self, now: Instant) {
        while self.next <= now {
            let due = self.next;
            self.next += self.pause;
            match self.free.pop() {
                Some(key) => self.send(key, due),
                None => self.waiting.push_back(due),
            }
        }
        if self.waiting.len() > MAX_WAITING_REQUESTS {
            self.fail("the backlog is full: the contender cannot sustain the rate".into());
        }
    }

    /// Returns `true` once there are as many responses as connections and no request waits for a connection.
    pub(super) fn are_answered(&self) -> bool {
        self.latency.len() >= self.clients.len() as u64 && self.waiting.is_empty()
    }

    fn send(&mut self, key: usize, due: Instant) {
        let request = &self.requests[self.sent % self.requests.len()];
        self.sent += 1;
        match self.clients[key].stream.write(request) {
            Ok(written) if written == request.len() => self.clients[key].due = Some(due),
            Ok(_) => self.fail("a request was written only in part".into()),
            Err(error) => self.fail(format!("cannot send: {error}")),
        }
    }

    pub(super) fn on_event(&mut self, token: Token) {
        let key = token.0;
        match self.clients[key].receive() {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return self.fail(error),
        }
        let Some(due) = self.clients[key].due.take() else {
            return self.fail("unexpected response: no request is in flight".into());
        };
        let took = u64::try_from(due.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.latency.saturating_record(took);
        match self.waiting.pop_front() {
            Some(due) => self.send(key, due),
            None => self.free.push(key),
        }
    }

    fn fail(&mut self, why: String) {
        self.first_error.get_or_insert(why);
    }
}

// === impl RouteClient ===

impl RouteClient {
    fn connect(registry: &Registry, proxy: SocketAddr, token: Token) -> io::Result<Self> {
        // Blocking, but the listener is on this machine.
        let stream = std::net::TcpStream::connect_timeout(&proxy, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(stream);
        registry.register(&mut stream, token, Interest::READABLE)?;
        Ok(Self { stream, buffer: vec![0; CLIENT_BUFFER_BYTES].into(), filled: 0, due: None })
    }

    /// Reads once. Returns `true` once the expected response is complete.
    fn receive(&mut self) -> Result<bool, String> {
        match self.stream.read(&mut self.buffer[self.filled..]) {
            Ok(0) => return Err("the connection was closed".into()),
            Ok(read) => self.filled += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(format!("cannot receive: {error}")),
        }
        let buffer = &self.buffer[..self.filled];
        let Some(head) = http::head(buffer).map_err(|error| error.to_string())? else { return Ok(false) };
        let body = &buffer[head.len..];
        if http::status(head.start) != Some(200) {
            let start = String::from_utf8_lossy(head.start);
            return Err(format!("{start} {}", String::from_utf8_lossy(body)));
        }
        if body.len() < COMPLETION_BODY.len() {
            return Ok(false);
        }
        if body != COMPLETION_BODY.as_bytes() {
            return Err("the response body differs from the one that the backend sent".into());
        }
        self.filled = 0;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use mio::{Events, Poll};

    use super::*;

    #[test]
    fn latency_counts_from_the_scheduled_time() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut poll = Poll::new().unwrap();
        let proxy = listener.local_addr().unwrap();
        let mut clients =
            RouteClients::connect(poll.registry(), proxy, 1, 1000, vec![request("m0")]).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        // Two requests are due, 1 ms apart, on one connection.
        let begin = clients.next;
        clients.send_due(begin + Duration::from_millis(1));
        assert_eq!((clients.sent, clients.waiting.len()), (1, 1));
        let answer =
            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{COMPLETION_BODY}", COMPLETION_BODY.len());
        let mut events = Events::with_capacity(4);
        for answered in 1..=2 {
            let mut asked = [0; 1024];
            assert!(server.read(&mut asked).unwrap() > 0);
            std::thread::sleep(Duration::from_millis(5));
            server.write_all(answer.as_bytes()).unwrap();
            while clients.latency.len() < answered {
                poll.poll(&mut events, Some(Duration::from_millis(100))).unwrap();
                for event in &events {
                    clients.on_event(event.token());
                }
            }
        }
        assert_eq!(clients.first_error, None);
        // 5 ms for the first; for the second, 4 ms of waiting and 5 ms of its own.
        assert!(clients.latency.max() >= 9_000_000, "{}", clients.latency.max());
    }
}
