//! A model server that is down until enabled and records its observations: the time it was found ready, the times and
//! the order of requests, and their concurrency.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use memchr::memmem;
use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use slab::Slab;

use crate::clock::Instant;
use crate::http::{self, Framing};
use crate::listen;
use crate::member::{NumberedRequest, PLAIN, STREAMED};

/// Bit set in the tokens of this server, never in those of the clients or the rig's own backend.
const TARGET_TOKEN_BIT: usize = 1 << 33;
const TARGET_LISTENER: usize = TARGET_TOKEN_BIT | (1 << 31);
const TARGET_BUFFER_BYTES: usize = 16 * 1024;

const HEALTHY_RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
const UNHEALTHY_RESPONSE: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";

/// A listener on a free port of 127.0.0.1, its connections and the observations.
#[derive(Debug)]
pub(crate) struct TargetServer {
    listener: TcpListener,
    address: SocketAddr,
    connections: Slab<TargetConnection>,
    /// Health reported by `/health`.
    pub(crate) ready: bool,
    /// Time from a request to its response.
    pub(crate) delay: Duration,
    /// Requests a new endpoint may get at first, and at most.
    pub(crate) ramp: RampSettings,
    due: VecDeque<DueResponse>,
    pub(crate) seen: TargetStats,
}

/// Observations since the last [`TargetServer::reset_stats`].
#[derive(Debug, Default)]
pub(crate) struct TargetStats {
    /// Time of the first 200 from `/health`.
    pub(crate) known: Option<Instant>,
    /// Number in the body of each request, and its time of arrival.
    pub(crate) arrivals: Vec<(u32, Instant)>,
    pub(crate) answered: u64,
    /// Maximum number of concurrent requests.
    pub(crate) most: u64,
    /// Requests that arrived when the ramp's limit was already reached.
    pub(crate) beyond: u64,
    /// Connections accepted, including those of health checks.
    pub(crate) accepted: u64,
}

/// `concurrency` of the route.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RampSettings {
    pub(crate) start: u64,
    pub(crate) max: u64,
}

#[derive(Debug)]
struct TargetConnection {
    stream: TcpStream,
    buffer: Box<[u8]>,
    filled: usize,
}

#[derive(Debug)]
struct DueResponse {
    at: Instant,
    connection: usize,
    answer: &'static [u8],
}

// === impl TargetServer ===

impl TargetServer {
    pub(crate) fn bind(registry: &Registry) -> io::Result<Self> {
        let mut listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        registry.register(&mut listener, Token(TARGET_LISTENER), Interest::READABLE)?;
        let address = listener.local_addr()?;
        Ok(Self {
            listener,
            address,
            connections: Slab::new(),
            ready: false,
            delay: Duration::ZERO,
            ramp: RampSettings { start: u64::MAX, max: u64::MAX },
            due: VecDeque::new(),
            seen: TargetStats::default(),
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn owns(token: Token) -> bool {
        token.0 & TARGET_TOKEN_BIT != 0
    }

    /// Discards the observations, but not the pending responses.
    pub(crate) fn reset_stats(&mut self) {
        self.seen = TargetStats::default();
    }

    pub(crate) fn on_event(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        if token.0 == TARGET_LISTENER {
            return self.accept(registry);
        }
        let key = token.0 & !TARGET_TOKEN_BIT;
        while let Some(connection) = self.connections.get_mut(key) {
            // A read that leaves room in the buffer has emptied the socket; later data triggers a new edge.
            match connection.stream.read(&mut connection.buffer[connection.filled..]) {
                Ok(read) if read > 0 => connection.filled += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                _ => {
                    self.connections.remove(key);
                    break;
                }
            }
            let full = connection.filled == connection.buffer.len();
            self.serve(key)?;
            if !full {
                break;
            }
        }
        Ok(())
    }

    /// Sends due responses and returns their number.
    pub(crate) fn on_turn(&mut self) -> io::Result<usize> {
        if self.due.is_empty() {
            return Ok(0);
        }
        let now = Instant::now();
        let count = self.due.iter().take_while(|due| due.at <= now).count();
        for _ in 0..count {
            if let Some(due) = self.due.pop_front() {
                self.answer(due.connection, due.answer)?;
            }
        }
        Ok(count)
    }

    fn accept(&mut self, registry: &Registry) -> io::Result<()> {
        while let Some(mut stream) = listen::next(&self.listener)? {
            let entry = self.connections.vacant_entry();
            registry.register(&mut stream, Token(entry.key() | TARGET_TOKEN_BIT), Interest::READABLE)?;
            entry.insert(TargetConnection { stream, buffer: vec![0; TARGET_BUFFER_BYTES].into(), filled: 0 });
            self.seen.accepted += 1;
        }
        Ok(())
    }

    /// Handles every complete request on a connection.
    fn serve(&mut self, key: usize) -> io::Result<()> {
        let mut used = 0;
        while let Some(connection) = self.connections.get_mut(key) {
            let Some(request) = ParsedRequest::read(&connection.buffer[used..connection.filled])? else {
                connection.buffer.copy_within(used..connection.filled, 0);
                connection.filled -= used;
                break;
            };
            used += request.len;
            let Some(number) = request.number else {
                if self.ready {
                    self.seen.known.get_or_insert_with(Instant::now);
                }
                connection.stream.write_all(if self.ready {
                    HEALTHY_RESPONSE
                } else {
                    UNHEALTHY_RESPONSE
                })?;
                continue;
            };
            let now = Instant::now();
            let answer: &[u8] = if request.streamed { &STREAMED.response } else { &PLAIN.response };
            self.seen.count_arrival(number, now, self.ramp);
            if self.delay.is_zero() {
                self.answer(key, answer)?;
            } else {
                self.due.push_back(DueResponse { at: now + self.delay, connection: key, answer });
            }
        }
        Ok(())
    }

    fn answer(&mut self, key: usize, answer: &[u8]) -> io::Result<()> {
        self.seen.answered += 1;
        match self.connections.get_mut(key) {
            // The response always fits the socket buffer.
            Some(connection) => connection.stream.write_all(answer),
            // The client has disconnected.
            None => Ok(()),
        }
    }
}

// === impl TargetStats ===

impl TargetStats {
    /// Counts a request. Anteroom learns of a response later than this server, so its own limit is never above
    /// `allowed`.
    fn count_arrival(&mut self, number: u32, now: Instant, ramp: RampSettings) {
        self.arrivals.push((number, now));
        let here = self.arrivals.len() as u64 - self.answered;
        self.most = self.most.max(here);
        let allowed = ramp.start.max(self.answered.saturating_mul(2)).min(ramp.max);
        self.beyond += u64::from(here > allowed);
    }

    /// Returns the time from the first 200 of `/health` to the arrival of the first request.
    pub(crate) fn time_to_first_arrival(&self) -> Option<Duration> {
        Some(self.arrivals.first()?.1.saturating_duration_since(self.known?))
    }

    /// Returns the number of requests that arrived later than their position in the sending order, and the largest
    /// displacement in places.
    pub(crate) fn count_reordered(&self) -> (usize, usize) {
        let late =
            self.arrivals.iter().enumerate().map(|(at, (number, _))| at.saturating_sub(*number as usize));
        late.fold((0, 0), |(count, most), late| (count + usize::from(late > 0), most.max(late)))
    }
}

/// The relevant parts of a request.
#[derive(Debug, PartialEq, Eq)]
struct ParsedRequest {
    len: usize,
    /// `None` for a health check.
    number: Option<u32>,
    streamed: bool,
}

// === impl ParsedRequest ===

impl ParsedRequest {
    fn read(buf: &[u8]) -> io::Result<Option<Self>> {
        let Some(head) = http::head(buf).map_err(io::Error::other)? else { return Ok(None) };
        let len = match head.body {
            Framing::None => return Ok(Some(Self { len: head.len, number: None, streamed: false })),
            Framing::Length(length) => head.len + length,
            Framing::Chunked => {
                return Err(io::Error::other("a held request's body came without its length"));
            }
        };
        let Some(body) = buf.get(head.len..len) else { return Ok(None) };
        let number = NumberedRequest::number(body)
            .ok_or_else(|| io::Error::other("a request's body was changed on its way"))?;
        let streamed = memmem::find(body, b"\"stream\":true").is_some();
        Ok(Some(Self { len, number: Some(number), streamed }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_beyond_the_ramp_are_counted() {
        let ramp = RampSettings { start: 2, max: 4 };
        let mut seen = TargetStats::default();
        let arrive = |seen: &mut TargetStats, count: u32| {
            (0..count).for_each(|at| seen.count_arrival(at, Instant::now(), ramp))
        };
        arrive(&mut seen, 2);
        assert_eq!((seen.most, seen.beyond), (2, 0));
        arrive(&mut seen, 1);
        assert_eq!((seen.most, seen.beyond), (3, 1));
        // With two responses sent, four requests may be present; four is also the maximum.
        seen.answered = 2;
        arrive(&mut seen, 3);
        assert_eq!((seen.most, seen.beyond), (4, 1));
        seen.answered = 6;
        arrive(&mut seen, 5);
        assert_eq!((seen.most, seen.beyond), (5, 2));
    }

    #[test]
    fn request_after_its_turn_counts_as_late() {
        let seen = |numbers: &[u32]| {
            let arrivals = numbers.iter().map(|number| (*number, Instant::now())).collect();
            TargetStats { arrivals, ..TargetStats::default() }
        };
        assert_eq!(seen(&[0, 1, 2, 3]).count_reordered(), (0, 0));
        assert_eq!(seen(&[1, 2, 0, 3]).count_reordered(), (1, 2));
        assert_eq!(seen(&[1, 0, 3, 2]).count_reordered(), (2, 1));
    }

    #[test]
    fn requests_are_distinguished_from_health_checks() {
        let health = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n";
        let read = |bytes: &[u8]| ParsedRequest::read(bytes).unwrap();
        assert_eq!(read(health), Some(ParsedRequest { len: health.len(), number: None, streamed: false }));
        for streamed in [false, true] {
            let mut message = NumberedRequest::new(streamed);
            let bytes = message.numbered(77);
            let expected = ParsedRequest { len: bytes.len(), number: Some(77), streamed };
            assert_eq!(read(bytes), Some(expected));
            assert_eq!(read(&bytes[..bytes.len() - 1]), None);
        }
        assert!(
            ParsedRequest::read(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}").is_err(),
            "none of ours"
        );
    }
}
