//! An HTTP/1.1 connection with one request at a time, and the request it sends.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use crate::backend::COMPLETION_BODY;
use crate::clock::Instant;
use crate::http::{self, Framing};

const CLIENT_BUFFER_BYTES: usize = 4096;

/// A request and its expected response.
#[derive(Debug)]
pub(crate) struct ExpectedExchange {
    request: Vec<u8>,
    expect: ExpectedResponse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpectedResponse {
    /// The backend's response.
    Answer,
    /// A response of the contender itself, with this status.
    Status(u16),
}

#[derive(Debug)]
pub(crate) struct LoadClient {
    stream: TcpStream,
    buffer: Box<[u8]>,
    filled: usize,
    /// Bytes of the request already written.
    written: usize,
    /// Start of the latency measurement of the request in flight.
    pub(crate) sent: Option<Instant>,
}

// === impl ExpectedExchange ===

impl ExpectedExchange {
    pub(crate) fn new(body: &str, expect: ExpectedResponse) -> Self {
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: loadtest\r\n\
             Accept: application/json\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        Self { request: [head.as_bytes(), body.as_bytes()].concat(), expect }
    }

    /// Returns `true` if `buf` is complete. Fails if it is not the expected response.
    fn check(&self, buf: &[u8]) -> Result<bool, String> {
        let Some(head) = http::head(buf).map_err(|error| error.to_string())? else { return Ok(false) };
        let body = &buf[head.len..];
        let status = match self.expect {
            ExpectedResponse::Answer => 200,
            ExpectedResponse::Status(status) => status,
        };
        if http::status(head.start) != Some(status) {
            let answer = String::from_utf8_lossy(&body[..body.len().min(200)]);
            return Err(format!("{} {answer}", String::from_utf8_lossy(head.start)));
        }
        match (self.expect, head.body) {
            (ExpectedResponse::Answer, Framing::Length(length)) if length == COMPLETION_BODY.len() => {
                match body.len() < length {
                    true => Ok(false),
                    false if body == COMPLETION_BODY.as_bytes() => Ok(true),
                    false => Err("the response body differs from the one that the backend sent".into()),
                }
            }
            (ExpectedResponse::Status(_), Framing::Length(length)) => Ok(body.len() >= length),
            (_, framing) => Err(format!(
                "the answer's body should have {} bytes, it has {framing:?}",
                COMPLETION_BODY.len()
            )),
        }
    }
}

// === impl LoadClient ===

impl LoadClient {
    pub(crate) fn connect(registry: &Registry, target: SocketAddr, token: Token) -> io::Result<Self> {
        let mut stream = connect(target)?;
        // Both edges: writing a large body resumes when the socket has room again.
        registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self {
            stream,
            buffer: vec![0; CLIENT_BUFFER_BYTES].into(),
            filled: 0,
            written: usize::MAX,
            sent: None,
        })
    }

    /// Sends a request with its latency measured from `moment`.
    pub(crate) fn send(&mut self, exchange: &ExpectedExchange, moment: Instant) -> Result<(), String> {
        self.sent = Some(moment);
        self.written = 0;
        self.write(exchange)
    }

    /// Continues after an event. Returns `true` once the expected response is complete.
    pub(crate) fn proceed(&mut self, exchange: &ExpectedExchange) -> Result<bool, String> {
        if self.written < exchange.request.len() {
            self.write(exchange)?;
        }
        self.receive(exchange)
    }

    fn write(&mut self, exchange: &ExpectedExchange) -> Result<(), String> {
        while self.written < exchange.request.len() {
            match self.stream.write(&exchange.request[self.written..]) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(format!("cannot send: {error}")),
            }
        }
        Ok(())
    }

    /// Reads once: as in the backend, a read that leaves room has emptied the socket.
    fn receive(&mut self, exchange: &ExpectedExchange) -> Result<bool, String> {
        match self.stream.read(&mut self.buffer[self.filled..]) {
            Ok(0) => return Err("the connection was closed".into()),
            Ok(read) => self.filled += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(format!("cannot receive: {error}")),
        }
        let complete = exchange.check(&self.buffer[..self.filled])?;
        if complete {
            if self.sent.is_none() {
                return Err("unexpected response: no request is in flight".into());
            }
            if self.written < exchange.request.len() {
                return Err("response before the end of the request".into());
            }
            self.filled = 0;
        } else if self.filled == self.buffer.len() {
            return Err("the response is longer than the backend sent".into());
        }
        Ok(complete)
    }
}

/// Connects, blocking; the listener is on this machine, so the kernel accepts or refuses at once.
pub(crate) fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let stream = std::net::TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(TcpStream::from_std(stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_correct_response_counts() {
        let exchange = ExpectedExchange::new("{}", ExpectedResponse::Answer);
        let check = |buf: &[u8]| exchange.check(buf);
        let answer =
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{COMPLETION_BODY}", COMPLETION_BODY.len());
        assert_eq!(check(answer.as_bytes()), Ok(true));
        assert_eq!(check(&answer.as_bytes()[..answer.len() - 1]), Ok(false));
        assert!(check(answer.replace("200 OK", "503 No").as_bytes()).is_err());
        assert!(check(answer.replace("tiny", "huge").as_bytes()).is_err());
        assert!(check(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{").is_err());
        assert!(check(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").is_err());
        assert!(check(format!("{answer}!").as_bytes()).is_err());
    }

    #[test]
    fn expected_refusal_counts_as_success() {
        let exchange = ExpectedExchange::new("[", ExpectedResponse::Status(400));
        let refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(exchange.check(refusal), Ok(true));
        assert_eq!(exchange.check(&refusal[..refusal.len() - 1]), Ok(false));
        assert!(exchange.check(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").is_err());
    }
}
