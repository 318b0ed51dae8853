//! The model server behind the contenders: it answers everything with the same few bytes, at once.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::LazyLock;

use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use slab::Slab;

use crate::http::{self, Framing};

/// Every answer's body: a small chat completion.
pub(crate) const ANSWER: &str = concat!(
    r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1750000000,"model":"tiny","#,
    r#""choices":[{"index":0,"message":{"role":"assistant","content":"Hello. How can I help you today?"},"#,
    r#""logprobs":null,"finish_reason":"stop"}],"#,
    r#""usage":{"prompt_tokens":24,"total_tokens":33,"completion_tokens":9}}"#
);

static RESPONSE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{ANSWER}",
        ANSWER.len()
    )
    .into_bytes()
});

const LISTENER: Token = Token(usize::MAX - 1);
/// Connections of the backend have this bit in their token, those of the clients do not.
const CONNECTION: usize = 1 << 32;
const BUFFER: usize = 16 * 1024;

/// A listener on a free port of 127.0.0.1 and its connections.
#[derive(Debug)]
pub(crate) struct Backend {
    listener: TcpListener,
    address: SocketAddr,
    connections: Slab<Connection>,
    accepted: u64,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    buffer: Box<[u8]>,
    filled: usize,
}

enum After {
    Keep,
    Close,
}

// === impl Backend ===

impl Backend {
    pub(crate) fn bind(registry: &Registry) -> io::Result<Self> {
        let mut listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        registry.register(&mut listener, LISTENER, Interest::READABLE)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address, connections: Slab::new(), accepted: 0 })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections accepted so far: while this stands still, the contender keeps its own alive.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted
    }

    pub(crate) fn owns(token: Token) -> bool {
        token == LISTENER || token.0 & CONNECTION != 0
    }

    pub(crate) fn on_event(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        if token == LISTENER {
            return self.accept(registry);
        }
        let key = token.0 & !CONNECTION;
        // An event of a connection that this batch has closed already.
        let Some(connection) = self.connections.get_mut(key) else { return Ok(()) };
        if let After::Close = connection.serve() {
            self.connections.remove(key);
        }
        Ok(())
    }

    fn accept(&mut self, registry: &Registry) -> io::Result<()> {
        loop {
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            stream.set_nodelay(true)?;
            let entry = self.connections.vacant_entry();
            registry.register(&mut stream, Token(entry.key() | CONNECTION), Interest::READABLE)?;
            entry.insert(Connection { stream, buffer: vec![0; BUFFER].into(), filled: 0 });
            self.accepted += 1;
        }
    }
}

// === impl Connection ===

impl Connection {
    /// Answers every complete request. A read that leaves room in the buffer has emptied the socket,
    /// and what comes later is a new edge: so the usual request costs one read and one write.
    fn serve(&mut self) -> After {
        loop {
            match self.stream.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return After::Close,
                Ok(read) => self.filled += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return After::Keep,
                Err(_) => return After::Close,
            }
            let full = self.filled == self.buffer.len();
            match self.answer() {
                // A request larger than the buffer: no scenario sends one.
                Ok(0) if full => return After::Close,
                Ok(_) if full => {}
                Ok(_) => return After::Keep,
                Err(_) => return After::Close,
            }
        }
    }

    /// Answers what is complete and keeps the rest; the number of bytes used.
    fn answer(&mut self) -> io::Result<usize> {
        let mut used = 0;
        while let Some(len) = request_len(&self.buffer[used..self.filled]).map_err(io::Error::other)? {
            // An answer always fits the socket's buffer; were it cut, the client would report it.
            self.stream.write_all(&RESPONSE)?;
            used += len;
        }
        self.buffer.copy_within(used..self.filled, 0);
        self.filled -= used;
        Ok(used)
    }
}

fn request_len(buf: &[u8]) -> Result<Option<usize>, http::Malformed> {
    let Some(head) = http::head(buf)? else { return Ok(None) };
    let body = match head.body {
        Framing::None => Some(0),
        Framing::Length(length) => Some(length),
        Framing::Chunked => http::chunked_len(&buf[head.len..])?,
    };
    Ok(body.map(|body| head.len + body).filter(|len| *len <= buf.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_complete_with_its_body() {
        let message = b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}GET /health HTTP/1.1\r\n\r\n";
        let first = request_len(message).unwrap().unwrap();
        assert_eq!(&message[first - 2..first], b"{}");
        assert_eq!(request_len(&message[..first - 1]), Ok(None));
        assert_eq!(request_len(&message[first..]), Ok(Some(message.len() - first)));

        let chunked = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
        assert_eq!(request_len(chunked), Ok(Some(chunked.len())));
    }

    #[test]
    fn the_answer_is_a_completion() {
        let answer: serde_json::Value = serde_json::from_str(ANSWER).unwrap();
        assert_eq!(answer["model"], "tiny");
    }
}
