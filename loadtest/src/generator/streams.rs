//! Clients that read streams, one connection with one stream each, and record the arrival of every event.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::PROMPT;
use super::client::connect;
use super::tally::{Tally, histogram, nanos};
use crate::backend::Backend;
use crate::clients::Clients;
use crate::clock;
use crate::http::{self, Framing};
use crate::sse;

/// Read buffer, in bytes. A contender that gets this far ahead of its clients is an error of the run.
const STREAM_BUFFER_BYTES: usize = 64 * 1024;

/// Clients of one measurement and their observations.
#[derive(Debug)]
pub(crate) struct StreamLoad {
    target: SocketAddr,
    request: Vec<u8>,
    clients: Vec<StreamClient>,
    seen: StreamStats,
    /// Events since the start. The first event of a stream marks it as open.
    received: u64,
    opened: usize,
    ended: usize,
    /// Request the next event of a stream as soon as one arrives.
    echo: bool,
    /// Streams whose next event has been requested.
    asked: Vec<usize>,
}

/// Observations since the last reset; errors since the start.
#[derive(Debug)]
pub(crate) struct StreamStats {
    /// Latency of events, from the backend's write to the client's read.
    pub(crate) events: Tally,
    /// Additional time between two events of a stream, compared with the backend.
    pub(crate) stretch: Histogram<u64>,
    /// Events that arrived in one read with their predecessor: one of the two was delayed.
    pub(crate) together: u64,
}

#[derive(Debug)]
struct StreamClient {
    stream: TcpStream,
    buffer: Box<[u8]>,
    filled: usize,
    state: ReadState,
    /// Start of an event that continues in another chunk.
    cut: Vec<u8>,
    next: u32,
    /// Latency of the previous event.
    latency: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadState {
    Head,
    Body,
    Ended,
}

// === impl StreamLoad ===

impl StreamLoad {
    pub(crate) fn new(target: SocketAddr) -> Self {
        let body = PROMPT.replace(r#""stream":false"#, r#""stream":true"#);
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: loadtest\r\n\
             Accept: text/event-stream\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        Self {
            target,
            request: request.into_bytes(),
            clients: Vec::new(),
            seen: StreamStats { events: Tally::new(), stretch: histogram(), together: 0 },
            received: 0,
            opened: 0,
            ended: 0,
            echo: false,
            asked: Vec::new(),
        }
    }

    /// Opens another connection and requests a stream on it.
    pub(crate) fn open(&mut self, registry: &Registry) -> io::Result<()> {
        let mut stream = connect(self.target)?;
        registry.register(&mut stream, Token(self.clients.len()), Interest::READABLE)?;
        stream.write_all(&self.request)?;
        self.clients.push(StreamClient {
            stream,
            buffer: vec![0; STREAM_BUFFER_BYTES].into(),
            filled: 0,
            state: ReadState::Head,
            cut: Vec::new(),
            next: 0,
            latency: Duration::ZERO,
        });
        Ok(())
    }

    /// Enables or disables requesting the next event upon each event.
    pub(crate) fn echo(&mut self, echo: bool) {
        self.echo = echo;
    }

    /// Returns the number of streams whose first event has arrived.
    pub(crate) fn opened(&self) -> usize {
        self.opened
    }

    /// Returns the number of streams that have ended.
    pub(crate) fn ended(&self) -> usize {
        self.ended
    }

    /// Returns the number of events since the start.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    pub(crate) fn seen(&self) -> &StreamStats {
        &self.seen
    }

    pub(crate) fn reset(&mut self) {
        self.seen.events.reset();
        self.seen.stretch.reset();
        self.seen.together = 0;
    }
}

impl Clients for StreamLoad {
    /// Every stream must last until it is ended, so the first error ends the measurement.
    fn must_abandon(&self) -> bool {
        self.seen.events.errors > 0
    }

    fn on_event(&mut self, _registry: &Registry, token: Token) -> io::Result<()> {
        if self.must_abandon() {
            return Ok(());
        }
        let client = &mut self.clients[token.0];
        let asked = if self.echo { Some(&mut self.asked) } else { None };
        let before = (client.next, client.state);
        if let Err(why) = client.receive(&mut self.seen, asked) {
            self.seen.events.fail(format!("after {} events of a stream: {why}", client.next));
        }
        self.received += u64::from(client.next - before.0);
        self.opened += usize::from(before.0 == 0 && client.next > 0);
        self.ended += usize::from(before.1 != ReadState::Ended && client.state == ReadState::Ended);
        Ok(())
    }

    fn on_turn(&mut self, backend: &mut Backend) -> io::Result<usize> {
        let asked = self.asked.len();
        for stream in self.asked.drain(..) {
            backend.push(stream)?;
        }
        Ok(asked)
    }
}

// === impl StreamClient ===

impl StreamClient {
    fn receive(&mut self, seen: &mut StreamStats, mut asked: Option<&mut Vec<usize>>) -> Result<(), String> {
        loop {
            match self.stream.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return Err("the connection was closed".into()),
                Ok(read) => self.filled += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(format!("cannot receive: {error}")),
            }
            let full = self.filled == self.buffer.len();
            let now = clock::stamp();
            let mut used = 0;
            if self.state == ReadState::Head {
                let Some(len) = head_len(&self.buffer[..self.filled])? else { return Ok(()) };
                used = len;
                self.state = ReadState::Body;
            }
            let mut events = 0;
            while let Some(chunk) =
                http::chunk(&self.buffer[used..self.filled]).map_err(|error| error.to_string())?
            {
                if self.state == ReadState::Ended {
                    return Err("received data after the end of the stream".into());
                }
                used += chunk.len;
                if chunk.data.is_empty() {
                    self.state = ReadState::Ended;
                }
                let mut data = chunk.data;
                while !data.is_empty() {
                    let (part, rest) = data.split_at(data.len().min(sse::LEN - self.cut.len()));
                    data = rest;
                    let event = if part.len() == sse::LEN {
                        sse::read(part)
                    } else {
                        self.cut.extend_from_slice(part);
                        if self.cut.len() < sse::LEN {
                            continue;
                        }
                        let event = sse::read(&self.cut);
                        self.cut.clear();
                        event
                    };
                    let mark = event.ok_or("an event was changed on its way")?;
                    if mark.number != self.next {
                        return Err(format!("event {} came in place of {}", mark.number, self.next));
                    }
                    let latency = clock::between(mark.written, now);
                    seen.events.answer(latency);
                    if mark.number > 0 {
                        seen.stretch.saturating_record(nanos(latency.saturating_sub(self.latency)));
                    }
                    self.latency = latency;
                    self.next += 1;
                    events += 1;
                    if let Some(asked) = &mut asked {
                        asked.push(mark.stream as usize);
                    }
                }
            }
            seen.together += events.max(1) - 1;
            self.buffer.copy_within(used..self.filled, 0);
            self.filled -= used;
            if !full {
                return Ok(());
            }
            if used == 0 {
                return Err(format!("a chunk of more than {STREAM_BUFFER_BYTES} bytes"));
            }
        }
    }
}

/// Returns the length of the response head at the start of `buf`. Fails unless a stream follows.
fn head_len(buf: &[u8]) -> Result<Option<usize>, String> {
    let Some(head) = http::head(buf).map_err(|error| error.to_string())? else { return Ok(None) };
    if http::status(head.start) != Some(200) || head.body != Framing::Chunked {
        return Err(format!(
            "no stream but {} with a body of {:?}",
            String::from_utf8_lossy(head.start),
            head.body
        ));
    }
    Ok(Some(head.len))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::clock::Instant;
    use crate::rig::Rig;

    const SECOND: Duration = Duration::from_secs(1);

    fn open(count: usize) -> (Rig, StreamLoad) {
        let mut rig = Rig::new(Arc::new(AtomicBool::new(false))).unwrap();
        rig.backend_mut().stream(true);
        let mut load = StreamLoad::new(rig.backend());
        for _ in 0..count {
            load.open(rig.registry()).unwrap();
        }
        assert!(rig.until(&mut load, 5 * SECOND, |load, _| load.opened() == count).unwrap());
        (rig, load)
    }

    #[test]
    fn paced_stream_arrives_complete() {
        let (mut rig, mut load) = open(20);
        rig.backend_mut().streams().unwrap().pace(Instant::now(), SECOND / 100);
        assert!(rig.until(&mut load, 5 * SECOND, |load, _| load.received() >= 20 * 5).unwrap());
        rig.backend_mut().streams().unwrap().hold();
        let sent = rig.backend_mut().streams().unwrap().sent;
        assert!(rig.until(&mut load, 5 * SECOND, |load, _| load.received() == sent).unwrap());
        rig.backend_mut().end_streams().unwrap();
        assert!(rig.until(&mut load, 5 * SECOND, |load, _| load.ended() == 20).unwrap());
        let seen = load.seen();
        assert_eq!((seen.events.completed, seen.events.errors), (sent, 0), "{:?}", seen.events.first_error);
    }

    #[test]
    fn echo_mode_requests_the_next_event() {
        let (mut rig, mut load) = open(2);
        load.echo(true);
        let streams = rig.backend_mut().streams().unwrap().open.clone();
        rig.backend_mut().push(streams[0]).unwrap();
        assert!(rig.until(&mut load, 5 * SECOND, |load, _| load.received() >= 50).unwrap());
        // The other stream stays at its first event.
        assert_eq!(load.clients.iter().map(|client| client.next).min(), Some(1));
        assert_eq!((load.seen().together, load.seen().events.errors), (0, 0));
    }

    #[test]
    fn lost_event_is_an_error_joint_one_is_counted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut rig = Rig::new(Arc::new(AtomicBool::new(false))).unwrap();
        let mut load = StreamLoad::new(listener.local_addr().unwrap());
        load.open(rig.registry()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let mut chunk = sse::EventChunk::new();
        let mut event =
            |number| chunk.with(sse::EventStamp { stream: 0, number, written: clock::stamp() }).to_vec();

        server.write_all(&[sse::STREAM_HEAD, &event(0), &event(1)].concat()).unwrap();
        assert!(rig.until(&mut load, 5 * SECOND, |load, _| load.received() == 2).unwrap());
        assert_eq!(load.seen().together, 1);

        server.write_all(&event(3)).unwrap();
        assert!(!rig.until(&mut load, 5 * SECOND, |_, _| false).unwrap());
        let error = load.seen().events.first_error.as_deref();
        assert_eq!(error, Some("after 2 events of a stream: event 3 came in place of 2"));
    }

    #[test]
    fn events_may_be_cut_into_chunks_anywhere() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut rig = Rig::new(Arc::new(AtomicBool::new(false))).unwrap();
        let mut load = StreamLoad::new(listener.local_addr().unwrap());
        load.open(rig.registry()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(sse::STREAM_HEAD).unwrap();
        let mut chunk = sse::EventChunk::new();
        let events: Vec<u8> = (0..40)
            .flat_map(|number| {
                let bytes = chunk.with(sse::EventStamp { stream: 0, number, written: 0 });
                http::chunk(bytes).unwrap().unwrap().data.to_vec()
            })
            .collect();
        for part in events.chunks(sse::LEN * 2 / 3) {
            server.write_all(&[format!("{:x}\r\n", part.len()).as_bytes(), part, b"\r\n"].concat()).unwrap();
        }
        server.write_all(sse::LAST_CHUNK).unwrap();
        assert!(rig.until(&mut load, 5 * SECOND, |load, _| load.ended() == 1).unwrap(), "{:?}", load.seen());
        assert_eq!(load.received(), 40);
    }
}
