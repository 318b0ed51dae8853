//! Closed-loop clients over HTTP/2: a fixed number of streams on each of a few connections. A stream that ends is
//! replaced by a new one.

use std::io::{self, Read, Write};
use std::net::SocketAddr;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::PROMPT;
use super::client::connect;
use super::tally::Tally;
use crate::backend::COMPLETION_BODY;
use crate::clients::{Clients, MeasuredClients};
use crate::clock::Instant;
use crate::http2::{self, ReceivedFrame};

const H2_READ_BUFFER_BYTES: usize = 64 * 1024;
/// Bytes a connection may send before the first update of its window (RFC 9113, section 6.9.2).
const H2_INITIAL_WINDOW_BYTES: i64 = 65_535;
/// Bytes received before a window update is sent.
const WINDOW_UPDATE_BYTES: u32 = 32 * 1024;

/// Connections of one measurement and the tally of their streams.
#[derive(Debug)]
pub(crate) struct H2 {
    connections: Vec<H2Connection>,
    block: Vec<u8>,
    /// True while ended streams are replaced by new ones.
    replaces_ended: bool,
    tally: Tally,
}

#[derive(Debug)]
struct H2Connection {
    stream: TcpStream,
    input: Box<[u8]>,
    filled: usize,
    output: Vec<u8>,
    /// Bytes of the output already written.
    written: usize,
    /// Bytes of request bodies that the peer still accepts.
    window: i64,
    /// Bytes received since the last update of our window.
    received: u32,
    next_stream: u32,
    open: Vec<H2Request>,
    /// Streams to be opened as soon as the window allows.
    wanted: usize,
}

#[derive(Debug)]
struct H2Request {
    id: u32,
    sent: Instant,
    /// The response headers have arrived, with status 200.
    ok: bool,
    /// Bytes of the response body received.
    got: usize,
}

// === impl H2 ===

impl H2 {
    /// Opens the connections with `streams` requests on each.
    pub(crate) fn connect(
        registry: &Registry,
        target: SocketAddr,
        connections: usize,
        streams: usize,
    ) -> io::Result<Self> {
        let mut load = Self {
            connections: Vec::new(),
            block: http2::post(PROMPT.len()),
            replaces_ended: true,
            tally: Tally::new(),
        };
        for key in 0..connections {
            let mut connection = H2Connection::connect(registry, target, Token(key), streams)?;
            if let Err(why) = connection.begin(&load.block, Instant::now()).and_then(|()| connection.flush())
            {
                load.tally.fail(why);
            }
            load.connections.push(connection);
        }
        Ok(load)
    }
}

impl MeasuredClients for H2 {
    fn finish(&mut self) {
        self.replaces_ended = false;
    }

    fn waiting(&self) -> usize {
        self.connections.iter().map(|connection| connection.open.len()).sum()
    }

    fn tally(&self) -> &Tally {
        &self.tally
    }

    fn reset(&mut self) {
        self.tally.reset();
    }
}

impl Clients for H2 {
    /// A broken connection ends all of its streams, so the first error ends the measurement.
    fn must_abandon(&self) -> bool {
        self.tally.errors > 0
    }

    fn on_event(&mut self, _registry: &Registry, token: Token) -> io::Result<()> {
        if self.must_abandon() {
            return Ok(());
        }
        let connection = &mut self.connections[token.0];
        let done = connection.receive(&mut self.tally).and_then(|ended| {
            if self.replaces_ended {
                connection.wanted += ended;
                connection.begin(&self.block, Instant::now())?;
            }
            connection.flush()
        });
        if let Err(why) = done {
            self.tally.fail(why);
        }
        Ok(())
    }
}

// === impl H2Connection ===

impl H2Connection {
    fn connect(registry: &Registry, target: SocketAddr, token: Token, streams: usize) -> io::Result<Self> {
        let mut stream = connect(target)?;
        registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        let mut output = Vec::new();
        http2::hello(&mut output);
        Ok(Self {
            stream,
            input: vec![0; H2_READ_BUFFER_BYTES].into(),
            filled: 0,
            output,
            written: 0,
            window: H2_INITIAL_WINDOW_BYTES,
            received: 0,
            next_stream: 1,
            open: Vec::with_capacity(streams),
            wanted: streams,
        })
    }

    /// Opens the wanted streams, as far as the window allows.
    fn begin(&mut self, block: &[u8], now: Instant) -> Result<(), String> {
        let body = i64::try_from(PROMPT.len()).unwrap_or(i64::MAX);
        while self.wanted > 0 && self.window >= body {
            if self.next_stream > i32::MAX as u32 {
                return Err("all stream ids of a connection are used".into());
            }
            http2::request(&mut self.output, self.next_stream, block, PROMPT.as_bytes());
            self.open.push(H2Request { id: self.next_stream, sent: now, ok: false, got: 0 });
            self.next_stream += 2;
            self.window -= body;
            self.wanted -= 1;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), String> {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(format!("cannot send: {error}")),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(())
    }

    /// Handles all complete frames and returns the number of streams that ended.
    fn receive(&mut self, tally: &mut Tally) -> Result<usize, String> {
        let mut ended = 0;
        loop {
            match self.stream.read(&mut self.input[self.filled..]) {
                Ok(0) => return Err("the connection was closed".into()),
                Ok(read) => self.filled += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(ended),
                Err(error) => return Err(format!("cannot receive: {error}")),
            }
            let full = self.filled == self.input.len();
            let now = Instant::now();
            let mut used = 0;
            // Moved out of `self` temporarily: frames borrow the input while `self` is mutated.
            let mut input = std::mem::take(&mut self.input);
            let read = loop {
                match http2::frame(&input[used..self.filled]) {
                    Ok(None) => break Ok(()),
                    Ok(Some((frame, len))) => {
                        used += len;
                        match self.on_frame(&frame) {
                            Ok(None) => {}
                            Ok(Some(sent)) => {
                                tally.answer(now - sent);
                                ended += 1;
                            }
                            Err(why) => break Err(why),
                        }
                    }
                    Err(error) => break Err(error.to_string()),
                }
            };
            input.copy_within(used..self.filled, 0);
            self.input = input;
            self.filled -= used;
            read?;
            if !full {
                return Ok(ended);
            }
        }
    }

    /// Handles a frame. If it ends a stream successfully, returns the time the stream was opened.
    fn on_frame(&mut self, frame: &ReceivedFrame<'_>) -> Result<Option<Instant>, String> {
        match *frame {
            ReceivedFrame::Headers { stream, block, end } => {
                if !http2::is_ok(block) {
                    return Err(format!(
                        "the status of a response is not 200: its header block is {block:02x?}"
                    ));
                }
                self.stream(stream)?.ok = true;
                if end {
                    return Err("a response has no body".into());
                }
            }
            ReceivedFrame::Data { stream, data, flow, end } => {
                self.received += u32::try_from(flow).unwrap_or(u32::MAX);
                if self.received >= WINDOW_UPDATE_BYTES {
                    http2::window_update(&mut self.output, 0, std::mem::take(&mut self.received));
                }
                let found = self.stream(stream)?;
                if !found.ok
                    || COMPLETION_BODY.as_bytes().get(found.got..found.got + data.len()) != Some(data)
                {
                    return Err("the response body differs from the one that the backend sent".into());
                }
                found.got += data.len();
                if end {
                    if found.got != COMPLETION_BODY.len() {
                        return Err("a response body is incomplete".into());
                    }
                    let sent = found.sent;
                    self.open.retain(|open| open.id != stream);
                    return Ok(Some(sent));
                }
            }
            ReceivedFrame::Settings { window } => {
                if window.is_some_and(|window| (window as usize) < PROMPT.len()) {
                    return Err("the initial window is smaller than a request body".into());
                }
                http2::settings_ack(&mut self.output);
            }
            ReceivedFrame::Ping(payload) => http2::ping_ack(&mut self.output, payload),
            ReceivedFrame::WindowUpdate { stream: 0, more } => self.window += i64::from(more),
            ReceivedFrame::WindowUpdate { .. } | ReceivedFrame::Ignored => {}
            // HAProxy and nginx may send this after a complete response: the rest of the request body is not needed.
            ReceivedFrame::Reset { stream, code: 0 } if self.stream(stream).is_err() => {}
            ReceivedFrame::Reset { code, .. } => {
                return Err(format!("a stream was reset: error code {code}"));
            }
            ReceivedFrame::GoAway { code } => {
                return Err(format!("the server sent GOAWAY with error code {code}"));
            }
        }
        Ok(None)
    }

    fn stream(&mut self, id: u32) -> Result<&mut H2Request, String> {
        self.open
            .iter_mut()
            .find(|open| open.id == id)
            .ok_or_else(|| format!("stream {id} is not open, but something came on it"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;
    use crate::rig::Rig;

    const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

    /// Encodes the frames of a response, the body in two parts.
    fn answer(stream: u8) -> Vec<u8> {
        let (first, second) = COMPLETION_BODY.as_bytes().split_at(100);
        let head = |length: usize, kind, flags| {
            let [.., a, b] = length.to_be_bytes();
            [0, a, b, kind, flags, 0, 0, 0, stream]
        };
        [&head(1, 1, 4)[..], &[0x88], &head(first.len(), 0, 0), first, &head(second.len(), 0, 1), second]
            .concat()
    }

    fn served() -> (Rig, H2, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let rig = Rig::new(Arc::new(AtomicBool::new(false))).unwrap();
        let load = H2::connect(rig.registry(), listener.local_addr().unwrap(), 1, 2).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let mut preface = [0; 24];
        server.read_exact(&mut preface).unwrap();
        assert_eq!(preface, http2::CLIENT_PREFACE);
        (rig, load, server)
    }

    #[test]
    fn finished_stream_is_followed_by_the_next() {
        let (mut rig, mut load, mut server) = served();
        // Settings and a ping, then responses to both streams out of order.
        server.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).unwrap();
        server.write_all(&[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        for stream in [3, 1, 5] {
            server.write_all(&answer(stream)).unwrap();
            let before = load.tally.completed;
            assert!(rig.until(&mut load, RESPONSE_TIMEOUT, |load, _| load.tally.completed > before).unwrap());
        }
        assert_eq!((load.waiting(), load.tally.errors), (2, 0), "{:?}", load.tally.first_error);
        let open: Vec<_> = load.connections[0].open.iter().map(|stream| stream.id).collect();
        assert_eq!(open, [7, 9]);

        load.finish();
        server.write_all(&[answer(7), answer(9)].concat()).unwrap();
        assert!(rig.until(&mut load, RESPONSE_TIMEOUT, |load, _| load.waiting() == 0).unwrap());
    }

    #[test]
    fn no_body_is_sent_beyond_the_window() {
        let (mut rig, mut load, mut server) = served();
        let connection = &mut load.connections[0];
        connection.window = 0;
        server.write_all(&answer(1)).unwrap();
        assert!(rig.until(&mut load, RESPONSE_TIMEOUT, |load, _| load.tally.completed == 1).unwrap());
        assert_eq!((load.waiting(), load.connections[0].wanted), (1, 1));
        let more = u32::try_from(PROMPT.len()).unwrap().to_be_bytes();
        server.write_all(&[&[0, 0, 4, 8, 0, 0, 0, 0, 0], &more[..]].concat()).unwrap();
        assert!(rig.until(&mut load, RESPONSE_TIMEOUT, |load, _| load.waiting() == 2).unwrap());
        assert_eq!(load.connections[0].window, 0);
    }

    #[test]
    fn corrupted_response_is_an_error() {
        // Corrupts the status, then a letter of the body.
        for at in [9, answer(1).len() - 1] {
            let (mut rig, mut load, mut server) = served();
            let mut answer = answer(1);
            answer[at] = 0x8d;
            server.write_all(&answer).unwrap();
            assert!(!rig.until(&mut load, RESPONSE_TIMEOUT, |load, _| load.tally.completed > 0).unwrap());
            assert_eq!(load.tally.errors, 1);
        }
    }
}
