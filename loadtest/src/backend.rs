//! The model server behind the contenders. It responds to every request at once with the same short completion or, if
//! enabled, to every POST with a stream.

mod pace;

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::LazyLock;

use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use slab::Slab;

use crate::clock::{self, Instant};
use crate::http::{self, Framing};
use crate::listen;
use crate::sse;
use pace::PacedStreams;

/// Body of every plain response: a small chat completion.
pub(crate) const COMPLETION_BODY: &str = concat!(
    r#"{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1750000000,"model":"tiny","#,
    r#""choices":[{"index":0,"message":{"role":"assistant","content":"Hello. How can I help you today?"},"#,
    r#""logprobs":null,"finish_reason":"stop"}],"#,
    r#""usage":{"prompt_tokens":24,"total_tokens":33,"completion_tokens":9}}"#
);

static RESPONSE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{COMPLETION_BODY}",
        COMPLETION_BODY.len()
    )
    .into_bytes()
});

const BACKEND_LISTENER: Token = Token(usize::MAX - 1);
/// Bit set in the tokens of the backend's connections, never in those of the clients.
const BACKEND_TOKEN_BIT: usize = 1 << 32;
const BACKEND_BUFFER_BYTES: usize = 16 * 1024;
/// Maximum events written per turn, before the clients get to read theirs.
const EVENTS_PER_TURN: usize = 32;
/// Size of the buffer for the rest of bodies larger than [`BACKEND_BUFFER_BYTES`]; that rest is counted, not kept.
const SCRATCH_BYTES: usize = 256 * 1024;

/// A listener on a free port of 127.0.0.1 and its connections.
#[derive(Debug)]
pub(crate) struct Backend {
    listener: TcpListener,
    address: SocketAddr,
    connections: Slab<BackendConnection>,
    accepted: u64,
    scratch: Box<[u8]>,
    /// Open streams. `None` while POSTs get plain responses.
    streams: Option<PacedStreams>,
    chunk: sse::EventChunk,
}

#[derive(Debug)]
struct BackendConnection {
    stream: TcpStream,
    buffer: Box<[u8]>,
    filled: usize,
    /// Bytes of a large body still to be read.
    rest: usize,
    /// Number of the next event if the connection's response is a stream.
    next_event: Option<u32>,
}

enum NextAction {
    Keep,
    /// The request is complete; its response is a stream.
    Stream,
    Close,
}

// === impl Backend ===

impl Backend {
    pub(crate) fn bind(registry: &Registry) -> io::Result<Self> {
        let mut listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        registry.register(&mut listener, BACKEND_LISTENER, Interest::READABLE)?;
        let address = listener.local_addr()?;
        Ok(Self {
            listener,
            address,
            connections: Slab::new(),
            accepted: 0,
            scratch: vec![0; SCRATCH_BYTES].into(),
            streams: None,
            chunk: sse::EventChunk::new(),
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the number of connections accepted. A constant number means that the contender reuses its own.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted
    }

    pub(crate) fn owns(token: Token) -> bool {
        token == BACKEND_LISTENER || token.0 & BACKEND_TOKEN_BIT != 0
    }

    pub(crate) fn on_event(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        if token == BACKEND_LISTENER {
            return self.accept(registry);
        }
        let key = token.0 & !BACKEND_TOKEN_BIT;
        // The connection was closed earlier in this batch of events.
        let Some(connection) = self.connections.get_mut(key) else { return Ok(()) };
        match connection.serve(&mut self.scratch, self.streams.is_some()) {
            NextAction::Keep => {}
            NextAction::Stream => self.begin(key)?,
            NextAction::Close => {
                let connection = self.connections.remove(key);
                if let Some(streams) = &mut self.streams
                    && connection.next_event.is_some()
                {
                    streams.open.retain(|open| *open != key);
                }
            }
        }
        Ok(())
    }

    /// Enables or disables streams as the response to POSTs. Streams still open are forgotten.
    pub(crate) fn stream(&mut self, streams: bool) {
        self.streams = streams.then(PacedStreams::new);
    }

    pub(crate) fn streams(&mut self) -> Option<&mut PacedStreams> {
        self.streams.as_mut()
    }

    /// Sends the response head and the first event of the stream.
    fn begin(&mut self, key: usize) -> io::Result<()> {
        let (Some(connection), Some(streams)) = (self.connections.get_mut(key), &mut self.streams) else {
            return Ok(());
        };
        connection.stream.write_all(sse::STREAM_HEAD)?;
        connection.next_event = Some(0);
        streams.open.push(key);
        self.push(key)
    }

    /// Writes the next event of this connection's stream.
    pub(crate) fn push(&mut self, key: usize) -> io::Result<()> {
        let (Some(connection), Some(streams)) = (self.connections.get_mut(key), &mut self.streams) else {
            return Ok(());
        };
        let Some(number) = connection.next_event else { return Ok(()) };
        let stream = u32::try_from(key).unwrap_or(u32::MAX);
        let chunk = self.chunk.with(sse::EventStamp { stream, number, written: clock::stamp() });
        match connection.stream.write(chunk) {
            Ok(written) if written == chunk.len() => {
                connection.next_event = Some(number + 1);
                streams.sent += 1;
                Ok(())
            }
            Ok(_) => Err(io::Error::other("a stream's socket is full, so the contender does not read it")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(io::Error::other("a stream's socket is full, so the contender does not read it"))
            }
            // The contender closed the connection; its client reports the error.
            Err(_) => Ok(()),
        }
    }

    /// Ends all streams with the final chunk.
    pub(crate) fn end_streams(&mut self) -> io::Result<()> {
        let Some(streams) = &mut self.streams else { return Ok(()) };
        streams.hold();
        for key in streams.open.drain(..) {
            if let Some(connection) = self.connections.get_mut(key) {
                connection.next_event = None;
                connection.stream.write_all(sse::LAST_CHUNK)?;
            }
        }
        Ok(())
    }

    /// Writes due events and returns their number, at most [`EVENTS_PER_TURN`]: the clients should read these before more
    /// are written.
    pub(crate) fn on_turn(&mut self) -> io::Result<usize> {
        if !self.streams.as_ref().is_some_and(PacedStreams::is_paced) {
            return Ok(0);
        }
        let mut written = 0;
        let now = Instant::now();
        while written < EVENTS_PER_TURN
            && let Some(key) = self.streams.as_mut().and_then(|streams| streams.due(now))
        {
            self.push(key)?;
            written += 1;
        }
        Ok(written)
    }

    fn accept(&mut self, registry: &Registry) -> io::Result<()> {
        while let Some(mut stream) = listen::next(&self.listener)? {
            let entry = self.connections.vacant_entry();
            registry.register(&mut stream, Token(entry.key() | BACKEND_TOKEN_BIT), Interest::READABLE)?;
            entry.insert(BackendConnection {
                stream,
                buffer: vec![0; BACKEND_BUFFER_BYTES].into(),
                filled: 0,
                rest: 0,
                next_event: None,
            });
            self.accepted += 1;
        }
        Ok(())
    }
}

// === impl BackendConnection ===

impl BackendConnection {
    /// Responds to every complete request. A read that leaves room in the buffer has emptied the socket, and later
    /// data triggers a new edge, so the usual request costs one read and one write.
    fn serve(&mut self, scratch: &mut [u8], streams: bool) -> NextAction {
        loop {
            if self.rest > 0 {
                let room = self.rest.min(scratch.len());
                match self.stream.read(&mut scratch[..room]) {
                    Ok(0) => return NextAction::Close,
                    Ok(read) => self.rest -= read,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return NextAction::Keep,
                    Err(_) => return NextAction::Close,
                }
                if self.rest == 0 && self.stream.write_all(&RESPONSE).is_err() {
                    return NextAction::Close;
                }
                continue;
            }
            match self.stream.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return NextAction::Close,
                Ok(read) => self.filled += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return NextAction::Keep,
                Err(_) => return NextAction::Close,
            }
            let full = self.filled == self.buffer.len();
            // Anything but a POST is a health check and gets the plain response.
            if streams && self.buffer.starts_with(b"POST ") {
                match request_len(&self.buffer[..self.filled]) {
                    Ok(Some(len)) if len == self.filled => {
                        self.filled = 0;
                        return NextAction::Stream;
                    }
                    Ok(_) if !full => return NextAction::Keep,
                    _ => return NextAction::Close,
                }
            }
            match self.answer() {
                // The head exceeds the buffer; no scenario sends such a head.
                Ok(0) if full && self.rest == 0 => return NextAction::Close,
                Ok(_) if full || self.rest > 0 => {}
                Ok(_) => return NextAction::Keep,
                Err(_) => return NextAction::Close,
            }
        }
    }

    /// Responds to complete requests, keeps the bytes of an incomplete one, and returns the number of bytes consumed.
    /// Of a body larger than the buffer, only the length is kept.
    fn answer(&mut self) -> io::Result<usize> {
        let mut used = 0;
        while let Some(len) = request_len(&self.buffer[used..self.filled]).map_err(io::Error::other)? {
            let here = self.filled - used;
            if len > here {
                if len > self.buffer.len() {
                    self.rest = len - here;
                    used = self.filled;
                }
                break;
            }
            // The response always fits the socket buffer. The client would report a truncated one.
            self.stream.write_all(&RESPONSE)?;
            used += len;
        }
        self.buffer.copy_within(used..self.filled, 0);
        self.filled -= used;
        Ok(used)
    }
}

/// Returns the length of the request at the start of `buf`, or `None` while unknown. The request itself may be
/// incomplete.
fn request_len(buf: &[u8]) -> Result<Option<usize>, http::MalformedHttp> {
    let Some(head) = http::head(buf)? else { return Ok(None) };
    let body = match head.body {
        Framing::None => Some(0),
        Framing::Length(length) => Some(length),
        Framing::Chunked => http::chunked_len(&buf[head.len..])?,
    };
    Ok(body.map(|body| head.len + body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_len_includes_the_body() {
        let message = b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}GET /health HTTP/1.1\r\n\r\n";
        let first = request_len(message).unwrap().unwrap();
        assert_eq!(&message[first - 2..first], b"{}");
        assert_eq!(request_len(&message[..first - 1]), Ok(Some(first)), "known before it is there");
        assert_eq!(request_len(&message[..first - 4]), Ok(None));
        assert_eq!(request_len(&message[first..]), Ok(Some(message.len() - first)));

        let chunked = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
        assert_eq!(request_len(chunked), Ok(Some(chunked.len())));
    }

    #[test]
    fn plain_response_is_a_completion() {
        let answer: serde_json::Value = serde_json::from_str(COMPLETION_BODY).unwrap();
        assert_eq!(answer["model"], "tiny");
    }

    #[test]
    fn large_body_is_answered_at_its_end() {
        let mut poll = mio::Poll::new().unwrap();
        let mut events = mio::Events::with_capacity(8);
        let mut backend = Backend::bind(poll.registry()).unwrap();
        let mut client = std::net::TcpStream::connect(backend.address()).unwrap();
        client.set_nonblocking(true).unwrap();
        let body = vec![b'x'; 3 * SCRATCH_BYTES];
        let head = format!("POST / HTTP/1.1\r\ncontent-length: {}\r\n\r\n", body.len());
        let request = [head.as_bytes(), &body, b"GET / HTTP/1.1\r\n\r\n"].concat();
        let (mut sent, mut answers) = (0, Vec::new());
        while answers.len() < 2 * RESPONSE.len() {
            sent += client.write(&request[sent..]).unwrap_or(0);
            poll.poll(&mut events, Some(std::time::Duration::from_millis(10))).unwrap();
            for event in &events {
                backend.on_event(poll.registry(), event.token()).unwrap();
            }
            let mut buf = [0; 1024];
            let read = client.read(&mut buf).unwrap_or(0);
            answers.extend_from_slice(&buf[..read]);
            assert!(answers.is_empty() || sent > head.len() + body.len() - 1, "answered before its end");
        }
        assert_eq!(answers, [&RESPONSE[..], &RESPONSE].concat());
    }
}
