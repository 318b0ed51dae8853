//! Minimal HTTP/2 for a client in a load test (RFC 9113, RFC 7541): frames, a request in fixed bytes, and a check
//! that the header block of a response begins with status 200.

/// First bytes a client sends, before its settings.
pub(crate) const CLIENT_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes of a frame before its payload.
const FRAME_HEADER_BYTES: usize = 9;
/// Maximum payload bytes of a frame: the default, which our settings do not raise.
const MAX_FRAME: usize = 16_384;

const END_STREAM_FLAG: u8 = 0x1;
const ACK: u8 = 0x1;
const END_HEADERS_FLAG: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

const SETTINGS_INITIAL_WINDOW_SIZE: u16 = 4;

/// A frame, reduced to the parts relevant to a client.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReceivedFrame<'a> {
    /// `flow` is the number of bytes it consumes of the windows, including padding.
    Data {
        stream: u32,
        data: &'a [u8],
        flow: usize,
        end: bool,
    },
    Headers {
        stream: u32,
        block: &'a [u8],
        end: bool,
    },
    /// `window` is the initial window of a stream for request bodies, if the settings contain it.
    Settings {
        window: Option<u32>,
    },
    Ping(&'a [u8]),
    WindowUpdate {
        stream: u32,
        more: u32,
    },
    /// RST_STREAM with its error code.
    Reset {
        stream: u32,
        code: u32,
    },
    GoAway {
        code: u32,
    },
    /// An acknowledgement, or a frame of a type that a client must ignore.
    Ignored,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("HTTP/2: {0}")]
pub(crate) struct MalformedHttp2(&'static str);

/// Reads the frame at the start of `buf` and returns it with its length, or `None` if it is incomplete.
pub(crate) fn frame(buf: &[u8]) -> Result<Option<(ReceivedFrame<'_>, usize)>, MalformedHttp2> {
    let Some((head, rest)) = buf.split_first_chunk::<FRAME_HEADER_BYTES>() else { return Ok(None) };
    let &[a, b, c, kind, flags, ref stream @ ..] = head;
    let length = u32::from_be_bytes([0, a, b, c]) as usize;
    if length > MAX_FRAME {
        return Err(MalformedHttp2("a frame larger than allowed"));
    }
    let Some(payload) = rest.get(..length) else { return Ok(None) };
    let stream = u32::from_be_bytes(*stream) & 0x7fff_ffff;
    let end = flags & END_STREAM_FLAG != 0;
    let frame = match kind {
        0 => ReceivedFrame::Data { stream, data: unpadded(payload, flags)?, flow: length, end },
        1 => {
            let mut block = unpadded(payload, flags)?;
            if flags & PRIORITY != 0 {
                block = block.get(5..).ok_or(MalformedHttp2("a header frame is too short"))?;
            }
            if flags & END_HEADERS_FLAG == 0 {
                return Err(MalformedHttp2("an answer's headers in several frames"));
            }
            ReceivedFrame::Headers { stream, block, end }
        }
        3 => ReceivedFrame::Reset { stream, code: number(payload, 0)? },
        4 if flags & ACK != 0 => ReceivedFrame::Ignored,
        4 => {
            let window = payload
                .chunks_exact(6)
                .filter(|setting| setting[..2] == SETTINGS_INITIAL_WINDOW_SIZE.to_be_bytes())
                .map(|setting| number(setting, 2))
                .next_back()
                .transpose()?;
            ReceivedFrame::Settings { window }
        }
        5 => return Err(MalformedHttp2("a push that was not allowed")),
        6 if flags & ACK != 0 => ReceivedFrame::Ignored,
        6 => ReceivedFrame::Ping(payload),
        7 => ReceivedFrame::GoAway { code: number(payload, 4)? },
        8 => ReceivedFrame::WindowUpdate { stream, more: number(payload, 0)? & 0x7fff_ffff },
        _ => ReceivedFrame::Ignored,
    };
    Ok(Some((frame, FRAME_HEADER_BYTES + length)))
}

fn unpadded(payload: &[u8], flags: u8) -> Result<&[u8], MalformedHttp2> {
    if flags & PADDED == 0 {
        return Ok(payload);
    }
    payload
        .split_first()
        .and_then(|(padding, data)| data.get(..data.len().checked_sub(usize::from(*padding))?))
        .ok_or(MalformedHttp2("more padding than frame"))
}

fn number(payload: &[u8], at: usize) -> Result<u32, MalformedHttp2> {
    let bytes = payload.get(at..at + 4).ok_or(MalformedHttp2("a frame is too short"))?;
    Ok(bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
}

/// Returns `true` if a header block begins with `:status: 200`, indexed in the static table, after any updates of the
/// size of the dynamic table. All measured servers encode it that way.
pub(crate) fn is_ok(mut block: &[u8]) -> bool {
    while let Some((&first, rest)) = block.split_first()
        && first & 0xe0 == 0x20
    {
        block = rest;
        if first & 0x1f == 0x1f {
            let more = block.iter().take_while(|byte| **byte & 0x80 != 0).count();
            block = block.get(more + 1..).unwrap_or_default();
        }
    }
    block.first() == Some(&0x88)
}

/// Writes the preface and our settings: no push, responses of any size.
pub(crate) fn hello(out: &mut Vec<u8>) {
    out.extend_from_slice(CLIENT_PREFACE);
    let settings: [(u16, u32); 2] = [(2, 0), (SETTINGS_INITIAL_WINDOW_SIZE, 0x7fff_ffff)];
    let payload: Vec<u8> = settings
        .iter()
        .flat_map(|(name, value)| [&name.to_be_bytes()[..], &value.to_be_bytes()].concat())
        .collect();
    put(out, 4, 0, 0, &payload);
}

/// Writes the preface and the settings of a client that never reads responses: windows of zero.
pub(crate) fn hello_unread(out: &mut Vec<u8>) {
    out.extend_from_slice(CLIENT_PREFACE);
    let payload = [&SETTINGS_INITIAL_WINDOW_SIZE.to_be_bytes()[..], &0_u32.to_be_bytes()].concat();
    put(out, 4, 0, 0, &payload);
    settings_ack(out);
}

/// Writes a GET of a path that does not exist. The first stream adds the path to the dynamic table of the connection.
pub(crate) fn get_nothing(out: &mut Vec<u8>, stream: u32) {
    /// Length at which the entry fills the table of 4,096 bytes (RFC 7541, section 4.1).
    const TABLE_FILL_BYTES: usize = 4000;
    // `:method: GET`, `:scheme: http`, and `:authority: a`, not indexed.
    let mut block = vec![0x82, 0x86, 0x01, 1, b'a'];
    if stream == 1 {
        // `:path`, indexed, with a length of 127 + 33 + 30 × 128.
        block.extend([0x44, 0x7f, 0x80 | 33, 30]);
        block.push(b'/');
        block.resize(block.len() + TABLE_FILL_BYTES - 1, b'a');
    } else {
        block.push(0x80 | 62);
    }
    put(out, 1, END_HEADERS_FLAG | END_STREAM_FLAG, stream, &block);
}

pub(crate) fn settings_ack(out: &mut Vec<u8>) {
    put(out, 4, ACK, 0, &[]);
}

pub(crate) fn ping_ack(out: &mut Vec<u8>, payload: &[u8]) {
    put(out, 6, ACK, 0, payload);
}

pub(crate) fn window_update(out: &mut Vec<u8>, stream: u32, more: u32) {
    put(out, 8, 0, stream, &more.to_be_bytes());
}

/// Writes a request on `stream`: its header block, and its whole body in one frame.
pub(crate) fn request(out: &mut Vec<u8>, stream: u32, block: &[u8], body: &[u8]) {
    put(out, 1, END_HEADERS_FLAG, stream, block);
    put(out, 0, END_STREAM_FLAG, stream, body);
}

/// Returns the header block of a POST with a body of `length` bytes. It adds nothing to the dynamic table, so it is
/// the same on every stream.
pub(crate) fn post(length: usize) -> Vec<u8> {
    // `:method: POST` and `:scheme: http`, of the static table.
    let mut block = vec![0x83, 0x86];
    let length = length.to_string();
    let fields: [(u8, &str); 6] = [
        (4, "/v1/chat/completions"), // :path
        (1, "127.0.0.1"),            // :authority
        (58, "loadtest"),            // user-agent
        (19, "application/json"),    // accept
        (31, "application/json"),    // content-type
        (28, &length),               // content-length
    ];
    for (name, value) in fields {
        // A literal without indexing, with its name from the static table: an index above 14 takes a second byte.
        match name.checked_sub(15) {
            None => block.push(name),
            Some(rest) => block.extend([15, rest]),
        }
        block.push(u8::try_from(value.len()).unwrap_or(u8::MAX));
        block.extend_from_slice(value.as_bytes());
    }
    block
}

fn put(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    out.extend_from_slice(&length[1..]);
    out.extend([kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_are_written() {
        let mut out = Vec::new();
        request(&mut out, 7, &[0x88, 0x01], b"{}");
        window_update(&mut out, 0, 1000);
        settings_ack(&mut out);
        let mut at = 0;
        let mut frames = Vec::new();
        while let Some((frame, len)) = frame(&out[at..]).unwrap() {
            frames.push(frame);
            at += len;
        }
        assert_eq!(at, out.len());
        assert_eq!(
            frames,
            [
                ReceivedFrame::Headers { stream: 7, block: &[0x88, 0x01], end: false },
                ReceivedFrame::Data { stream: 7, data: b"{}", flow: 2, end: true },
                ReceivedFrame::WindowUpdate { stream: 0, more: 1000 },
                ReceivedFrame::Ignored,
            ]
        );
        for cut in 0..11 {
            assert_eq!(frame(&out[..cut]), Ok(None), "cut at {cut}");
        }
    }

    #[test]
    fn padding_and_priority_are_stripped() {
        let mut out = Vec::new();
        put(&mut out, 0, PADDED | END_STREAM_FLAG, 1, &[2, b'h', b'i', 0, 0]);
        let data = ReceivedFrame::Data { stream: 1, data: b"hi", flow: 5, end: true };
        assert_eq!(frame(&out), Ok(Some((data, 14))));
        out.clear();
        put(&mut out, 1, PRIORITY | END_HEADERS_FLAG, 3, &[0, 0, 0, 0, 9, 0x88]);
        let headers = ReceivedFrame::Headers { stream: 3, block: &[0x88], end: false };
        assert_eq!(frame(&out), Ok(Some((headers, 15))));
        out.clear();
        put(&mut out, 0, PADDED, 1, &[9, 0]);
        assert!(frame(&out).is_err());
    }

    #[test]
    fn window_is_the_last_one_in_settings() {
        let mut out = Vec::new();
        put(&mut out, 4, 0, 0, &[0, 3, 0, 0, 0, 100, 0, 4, 0, 0, 1, 0, 0, 4, 0, 0, 2, 0]);
        assert_eq!(frame(&out).unwrap().unwrap().0, ReceivedFrame::Settings { window: Some(512) });
        out.clear();
        hello(&mut out);
        assert_eq!(
            frame(&out[CLIENT_PREFACE.len()..]).unwrap().unwrap().0,
            ReceivedFrame::Settings { window: Some(0x7fff_ffff) }
        );
    }

    #[test]
    fn status_after_table_size_update_is_decoded() {
        assert!(is_ok(&[0x88, 0x5f]));
        assert!(is_ok(&[0x20, 0x3f, 0xe1, 0x1f, 0x88]));
        assert!(!is_ok(&[0x8d]) && !is_ok(&[]) && !is_ok(&[0x3f, 0xff]));
    }

    #[test]
    fn a_post_is_plain_literals() {
        let block = post(298);
        assert_eq!(block[..4], [0x83, 0x86, 4, 20]);
        // `content-length` has index 28 in the static table: 15 plus 13.
        assert!(block.ends_with(&[15, 13, 3, b'2', b'9', b'8']));
    }
}
