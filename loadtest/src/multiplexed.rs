//! Many members of a crowd on one HTTP/2 connection, used if there are too few file descriptors for a connection each.

use std::io::{self, Read, Write};
use std::ops::Range;

use mio::net::TcpStream;

use crate::http2::{self, ReceivedFrame};
use crate::member::{MEMBER_BODY_BYTES, NumberedRequest, ReadProgress, STREAMED};

/// Streams per connection: the limit that servers commonly set.
pub(crate) const STREAMS_PER_CONNECTION: usize = 100;
/// Flow-control window in bytes before the server sends its own (RFC 9113, section 6.9.2).
const MULTIPLEXED_INITIAL_WINDOW_BYTES: i64 = 65_535;

/// A connection with one request on each of its streams.
#[derive(Debug)]
pub(crate) struct Multiplexed {
    stream: TcpStream,
    /// Received bytes of an incomplete frame.
    part: Vec<u8>,
    output: Vec<u8>,
    /// Bytes of request bodies that the server still accepts.
    window: i64,
    /// Numbers that identify the requests still to be sent.
    unsent: Range<u32>,
    /// Text of each stream so far, without heartbeats; `None` once it has ended.
    open: Vec<Option<Vec<u8>>>,
}

// === impl Multiplexed ===

impl Multiplexed {
    /// Starts the HTTP/2 connection. `stream` must be registered for both directions.
    pub(crate) fn new(stream: TcpStream) -> Self {
        let mut output = Vec::new();
        http2::hello(&mut output);
        // The maximum, so that no further updates are needed.
        http2::window_update(&mut output, 0, 0x7fff_ffff - 65_535);
        Self {
            stream,
            part: Vec::new(),
            output,
            window: MULTIPLEXED_INITIAL_WINDOW_BYTES,
            unsent: 0..0,
            open: Vec::new(),
        }
    }

    /// Sends requests with these numbers, as fast as the server accepts them.
    pub(crate) fn send(&mut self, numbers: Range<u32>, message: &mut NumberedRequest) -> Result<(), String> {
        self.unsent = numbers;
        self.send_pending_requests(message)
    }

    /// Reads and writes as much as possible; calls `each` with every result.
    pub(crate) fn on_event(
        &mut self,
        buffer: &mut [u8],
        message: &mut NumberedRequest,
        mut each: impl FnMut(ReadProgress),
    ) -> Result<(), String> {
        loop {
            let read = match self.stream.read(buffer) {
                Ok(0) => return Err("a connection was closed".into()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(format!("cannot receive: {error}")),
            };
            self.part.extend_from_slice(&buffer[..read]);
            let part = std::mem::take(&mut self.part);
            let mut at = 0;
            while let Some((frame, len)) = http2::frame(&part[at..]).map_err(|error| error.to_string())? {
                each(self.on_frame(&frame)?);
                at += len;
            }
            self.part = part[at..].to_vec();
            // A read that leaves room has emptied the socket; later data triggers a new edge.
            if read < buffer.len() {
                break;
            }
        }
        self.send_pending_requests(message)
    }

    fn on_frame(&mut self, frame: &ReceivedFrame<'_>) -> Result<ReadProgress, String> {
        let mut news = ReadProgress::default();
        match *frame {
            ReceivedFrame::Headers { block, end: false, .. } if http2::is_ok(block) => news.begun = true,
            ReceivedFrame::Headers { .. } => {
                return Err("response over HTTP/2 without a stream of events".into());
            }
            ReceivedFrame::Data { stream, data, end, .. } => {
                let open = self.open.get_mut(stream as usize / 2);
                let text = open.ok_or("an answer on a stream that is none")?;
                if data.starts_with(b":") {
                    news.heartbeats += u32::from(ReadProgress::is_heartbeat(data));
                } else {
                    text.as_mut().ok_or("an answer after its end")?.extend_from_slice(data);
                }
                if end {
                    news.end = Some(STREAMED.ended(&text.take().ok_or("two answers on one stream")?)?);
                }
            }
            ReceivedFrame::Settings { .. } => http2::settings_ack(&mut self.output),
            ReceivedFrame::Ping(payload) => http2::ping_ack(&mut self.output, payload),
            ReceivedFrame::WindowUpdate { stream: 0, more } => self.window += i64::from(more),
            ReceivedFrame::WindowUpdate { .. } | ReceivedFrame::Ignored => {}
            ReceivedFrame::Reset { code, .. } => {
                return Err(format!("a stream was reset with error code {code}"));
            }
            ReceivedFrame::GoAway { code } => {
                return Err(format!("a connection was closed with error code {code}"));
            }
        }
        Ok(news)
    }

    /// Sends pending requests. The window of a stream always has room for one body, whatever the server's settings.
    fn send_pending_requests(&mut self, message: &mut NumberedRequest) -> Result<(), String> {
        while self.window >= MEMBER_BODY_BYTES as i64
            && let Some(number) = self.unsent.next()
        {
            self.window -= MEMBER_BODY_BYTES as i64;
            let stream = self.open.len() as u32 * 2 + 1;
            http2::request(&mut self.output, stream, &http2::post(MEMBER_BODY_BYTES), message.body(number));
            self.open.push(Some(Vec::new()));
        }
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(written) => drop(self.output.drain(..written)),
                // Writability triggers the next event.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(format!("cannot send: {error}")),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use super::*;
    use crate::member::RequestEnd;

    fn served() -> (Multiplexed, std::net::TcpStream) {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.set_nonblocking(true).unwrap();
        (Multiplexed::new(TcpStream::from_std(stream)), listener.accept().unwrap().0)
    }

    fn data(stream: u32, text: &[u8], end: bool) -> Vec<u8> {
        let length = u32::try_from(text.len()).unwrap().to_be_bytes();
        [&length[1..], &[0, u8::from(end)], &stream.to_be_bytes(), text].concat()
    }

    #[test]
    fn no_body_is_sent_beyond_the_window() {
        let (mut client, _server) = served();
        client.send(0..100, &mut NumberedRequest::new(true)).unwrap();
        assert_eq!(client.open.len(), 65_535 / MEMBER_BODY_BYTES);
        client.on_frame(&ReceivedFrame::WindowUpdate { stream: 0, more: 1 << 20 }).unwrap();
        client.send_pending_requests(&mut NumberedRequest::new(true)).unwrap();
        assert_eq!(client.open.len(), 100);
    }

    #[test]
    fn each_stream_gets_its_own_response() {
        let (mut client, mut server) = served();
        let mut message = NumberedRequest::new(true);
        client.send(0..2, &mut message).unwrap();
        let (one, two) = STREAMED.body.split_at(50);
        let beat = b": waiting phase=queue waited=20s\n\n";
        let headers = [0, 0, 1, 1, 4, 0, 0, 0, 3, 0x88];
        let said = [&headers[..], &data(3, beat, false), &data(1, one, false), &data(3, one, false)].concat();
        server.write_all(&[&said[..], &data(3, two, true), &data(1, two, true)].concat()).unwrap();
        let mut news = Vec::new();
        while news.len() < 6 {
            let mut one = |one| news.push(one);
            client.on_event(&mut [0; 64], &mut message, &mut one).unwrap();
        }
        assert_eq!(news.iter().filter(|news| news.end == Some(RequestEnd::Served)).count(), 2);
        assert_eq!((news.iter().filter(|news| news.begun).count(), news[1].heartbeats), (1, 1));
        server.write_all(&data(1, b"more", false)).unwrap();
        while client.on_event(&mut [0; 64], &mut message, |_| {}).is_ok() {}
    }

    #[test]
    fn incomplete_h2_response_is_an_error() {
        let (mut client, _server) = served();
        client.send(0..1, &mut NumberedRequest::new(true)).unwrap();
        let half = &STREAMED.body[..50];
        assert!(
            client.on_frame(&ReceivedFrame::Data { stream: 1, data: half, flow: 50, end: true }).is_err()
        );
    }
}
