//! Hand-made HTTP/2 (RFC 9113): frames as bytes, header blocks of literals only (RFC 7541, section 6.2.2).

use std::net::SocketAddr;

use crate::support::{Wire, soon};

pub const DATA: u8 = 0x0;
pub const HEADERS: u8 = 0x1;
pub const PRIORITY: u8 = 0x2;
pub const RST_STREAM: u8 = 0x3;
pub const SETTINGS: u8 = 0x4;
pub const PUSH_PROMISE: u8 = 0x5;
pub const PING: u8 = 0x6;
pub const GOAWAY: u8 = 0x7;
pub const WINDOW_UPDATE: u8 = 0x8;
pub const CONTINUATION: u8 = 0x9;

pub const END_STREAM: u8 = 0x1;
pub const ACK: u8 = 0x1;
pub const END_HEADERS: u8 = 0x4;

/// Error codes (RFC 9113, section 7).
pub const PROTOCOL_ERROR: u32 = 0x1;
pub const FLOW_CONTROL_ERROR: u32 = 0x3;
pub const CANCEL: u32 = 0x8;
pub const ENHANCE_YOUR_CALM: u32 = 0xb;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Frame received from the peer.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// HTTP/2 client that sends arbitrary bytes.
pub struct RawH2 {
    pub wire: Wire,
}

/// End of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectionEnd {
    /// GOAWAY with this error code and debug data.
    GoAway(u32, String),
    /// No GOAWAY.
    Cut,
}

/// Encodes a frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

pub fn settings(pairs: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> =
        pairs.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
    frame(SETTINGS, 0, 0, &payload)
}

pub fn ping() -> Vec<u8> {
    frame(PING, 0, 0, b"floodflo")
}

pub fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &code.to_be_bytes())
}

pub fn window(stream: u32, increment: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &increment.to_be_bytes())
}

/// Encodes an integer with a 7-bit prefix (RFC 7541, section 5.1).
fn number(mut value: usize, out: &mut Vec<u8>) {
    if value < 127 {
        return out.push(u8::try_from(value).unwrap());
    }
    out.push(127);
    value -= 127;
    while value >= 128 {
        out.push(u8::try_from(value % 128).unwrap() | 128);
        value /= 128;
    }
    out.push(u8::try_from(value).unwrap());
}

/// Encodes a header field without adding it to the dynamic table.
pub fn field(name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Vec<u8> {
    let mut out = vec![0];
    number(name.as_ref().len(), &mut out);
    out.extend(name.as_ref());
    number(value.as_ref().len(), &mut out);
    out.extend(value.as_ref());
    out
}

/// Encodes a header field and adds it to the dynamic table, where it is then [`NEWEST_TABLE_ENTRY`].
pub fn indexed_field(name: &str, value: &str) -> Vec<u8> {
    let mut field = field(name, value);
    field[0] = 0x40;
    field
}

/// Index of the newest entry of the dynamic table, in one byte.
pub const NEWEST_TABLE_ENTRY: u8 = 0x80 | 62;

/// Encodes a header block of these fields.
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| field(name, value)).collect()
}

/// Returns the fields that begin a POST to `path`.
pub fn post_fields(path: &str) -> Vec<(&str, &str)> {
    vec![
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "api.test"),
        ("content-type", "application/json"),
    ]
}

/// Encodes a whole POST.
pub fn post(stream: u32, path: &str, body: &str) -> Vec<u8> {
    [
        frame(HEADERS, END_HEADERS, stream, &block(&post_fields(path))),
        frame(DATA, END_STREAM, stream, body.as_bytes()),
    ]
    .concat()
}

/// Encodes a whole GET.
pub fn get(stream: u32, path: &str) -> Vec<u8> {
    let fields = [(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "api.test")];
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &block(&fields))
}

// === impl RawH2 ===

impl RawH2 {
    pub async fn connect(address: SocketAddr) -> Self {
        Self::with_settings(address, &[]).await
    }

    pub async fn with_settings(address: SocketAddr, pairs: &[(u16, u32)]) -> Self {
        let mut client = Self { wire: Wire::connect(address).await };
        client.send([PREFACE, &settings(pairs), &frame(SETTINGS, ACK, 0, &[])].concat()).await;
        client
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.wire.send(bytes).await;
    }

    /// Sends the bytes; returns false if the peer has closed the connection.
    pub async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        use tokio::io::AsyncWriteExt as _;
        soon("the other side to read", self.wire.stream.write_all(bytes.as_ref())).await.is_ok()
    }

    /// Returns the next frame; `None` at the end of the connection.
    pub async fn frame(&mut self) -> Option<Frame> {
        let head = self.wire.exact(9).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Some(Frame { kind: head[3], flags: head[4], stream, payload: self.wire.exact(length).await? })
    }

    /// Returns the next frame of one of these kinds.
    pub async fn frame_of(&mut self, kinds: &[u8]) -> Option<Frame> {
        loop {
            let frame = self.frame().await?;
            if kinds.contains(&frame.kind) {
                return Some(frame);
            }
        }
    }

    /// Waits until the peer has read everything sent so far, by means of a PING.
    pub async fn settled(&mut self) {
        self.send(ping()).await;
        while let Some(frame) = self.frame_of(&[PING]).await {
            if frame.flags & ACK != 0 {
                return;
            }
        }
        panic!("the connection ended");
    }

    /// Returns the status of the response on this stream, or the error code that ended the stream or the connection.
    pub async fn answer(&mut self, stream: u32) -> Result<u16, u32> {
        self.try_answer(stream).await.expect("an answer, but the connection ended without a word")
    }

    /// Same as [`answer`](Self::answer), but returns `None` if the connection ends without an error code.
    pub async fn try_answer(&mut self, stream: u32) -> Option<Result<u16, u32>> {
        while let Some(frame) = self.frame_of(&[HEADERS, RST_STREAM, GOAWAY]).await {
            match frame.kind {
                HEADERS if frame.stream == stream => return Some(Ok(status(&frame.payload))),
                RST_STREAM if frame.stream == stream => return Some(Err(code(&frame.payload))),
                GOAWAY => return Some(Err(code(&frame.payload[4..]))),
                _ => {}
            }
        }
        None
    }

    /// Waits for the end of the connection.
    pub async fn end(&mut self) -> ConnectionEnd {
        let mut end = ConnectionEnd::Cut;
        while let Some(frame) = self.frame().await {
            if frame.kind == GOAWAY {
                let word = String::from_utf8_lossy(&frame.payload[8..]).into_owned();
                end = ConnectionEnd::GoAway(code(&frame.payload[4..]), word);
            }
        }
        end
    }
}

pub fn code(payload: &[u8]) -> u32 {
    u32::from_be_bytes(payload[..4].try_into().unwrap())
}

/// Decodes the status at the start of a header block: an entry of the static table, or three Huffman-coded digits (RFC
/// 7541, appendices A and B).
fn status(block: &[u8]) -> u16 {
    match block[0] {
        index @ 0x88..=0x8e => [200, 204, 206, 304, 400, 404, 500][usize::from(index - 0x88)],
        0x48 => {
            assert_eq!(block[1] & 0x80, 0x80, "Huffman's code");
            let bits: String = block[2..].iter().take(3).map(|byte| format!("{byte:08b}")).collect();
            let mut rest = &bits[..];
            let mut status = 0;
            for _ in 0..3 {
                let five = u16::from_str_radix(&rest[..5], 2).unwrap();
                let (digit, length) = match five {
                    0..=2 => (five, 5),
                    _ => (u16::from_str_radix(&rest[..6], 2).unwrap() - 0x19 + 3, 6),
                };
                status = status * 10 + digit;
                rest = &rest[length..];
            }
            status
        }
        other => panic!("a status instead of {other:#x}"),
    }
}
