//! Minimal HTTP/1.1 framing for both ends of a load test.
//!
//! It reads only well-formed messages that the load test itself wrote and a proxy forwarded; anything else is an
//! error of the run, so it is strict.

use memchr::memchr;

/// Head of a message and framing of its body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MessageHead<'a> {
    /// Request line or status line, without its line end.
    pub(crate) start: &'a [u8],
    /// Bytes up to and including the empty line.
    pub(crate) len: usize,
    pub(crate) body: Framing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// Neither `Content-Length` nor `Transfer-Encoding`: a request without a body.
    None,
    Length(usize),
    Chunked,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct MalformedHttp(&'static str);

/// Reads the head at the start of `buf`. Returns `None` if it is incomplete.
pub(crate) fn head(buf: &[u8]) -> Result<Option<MessageHead<'_>>, MalformedHttp> {
    let Some(mut at) = memchr(b'\n', buf) else { return Ok(None) };
    let start = trim_cr(&buf[..at]);
    let mut body = Framing::None;
    loop {
        at += 1;
        let Some(end) = memchr(b'\n', &buf[at..]) else { return Ok(None) };
        let line = trim_cr(&buf[at..at + end]);
        at += end;
        match line.first() {
            None => return Ok(Some(MessageHead { start, len: at + 1, body })),
            Some(b'c' | b'C') => {
                if let Some(value) = value_of(line, b"content-length:") {
                    body =
                        Framing::Length(decimal(value).ok_or(MalformedHttp("Content-Length is no number"))?);
                }
            }
            Some(b't' | b'T') => {
                if value_of(line, b"transfer-encoding:").is_some() {
                    body = Framing::Chunked;
                }
            }
            Some(_) => {}
        }
    }
}

/// Returns the length of the chunked body at the start of `buf`, or `None` if it is incomplete.
pub(crate) fn chunked_len(buf: &[u8]) -> Result<Option<usize>, MalformedHttp> {
    let mut at = 0;
    loop {
        let Some(chunk) = chunk(&buf[at..])? else { return Ok(None) };
        at += chunk.len;
        if chunk.data.is_empty() {
            return Ok(Some(at));
        }
    }
}

/// One chunk of a body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BodyChunk<'a> {
    /// Empty in the last chunk.
    pub(crate) data: &'a [u8],
    /// Bytes of the chunk including its size and line ends.
    pub(crate) len: usize,
}

/// Reads the chunk at the start of `buf`. Returns `None` if it is incomplete.
pub(crate) fn chunk(buf: &[u8]) -> Result<Option<BodyChunk<'_>>, MalformedHttp> {
    let Some(end) = memchr(b'\n', buf) else { return Ok(None) };
    let size = std::str::from_utf8(trim_cr(&buf[..end]))
        .ok()
        .and_then(|line| usize::from_str_radix(line, 16).ok())
        .ok_or(MalformedHttp("a chunk has no size"))?;
    // The size line, the data and the line end of the data; no trailers.
    let data = end + 1;
    let len = data + size + 2;
    Ok((len <= buf.len()).then(|| BodyChunk { data: &buf[data..data + size], len }))
}

/// Parses the three digits of a status line.
pub(crate) fn status(start: &[u8]) -> Option<u16> {
    let digits = start.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
    decimal(digits).and_then(|status| u16::try_from(status).ok())
}

fn value_of<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (found, value) = line.split_at_checked(name.len())?;
    found.eq_ignore_ascii_case(name).then(|| value.trim_ascii())
}

fn decimal(digits: &[u8]) -> Option<usize> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn trim_cr(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_ends_at_the_empty_line() {
        let message = b"POST /v1 HTTP/1.1\r\nHost: a\r\ncontent-length:  12 \r\n\r\n{}";
        let found = head(message).unwrap().unwrap();
        assert_eq!(found.start, b"POST /v1 HTTP/1.1");
        assert_eq!(found.body, Framing::Length(12));
        assert_eq!(&message[found.len..], b"{}");
        for cut in 0..found.len {
            assert_eq!(head(&message[..cut]), Ok(None), "cut at {cut}");
        }
    }

    #[test]
    fn framing_is_recognized() {
        let of = |message: &'static [u8]| head(message).map(|found| found.unwrap().body);
        assert_eq!(of(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"), Ok(Framing::None));
        assert_eq!(of(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), Ok(Framing::Chunked));
        assert!(of(b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n").is_err());
    }

    #[test]
    fn a_chunked_body_ends_at_its_empty_chunk() {
        let body = b"5\r\nhello\r\n1a\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\n\r\n";
        assert_eq!(chunked_len(body), Ok(Some(body.len())));
        for cut in 0..body.len() {
            assert_eq!(chunked_len(&body[..cut]), Ok(None), "cut at {cut}");
        }
        assert!(chunked_len(b"hello\r\n").is_err());
    }

    #[test]
    fn a_status_is_three_digits() {
        assert_eq!(status(b"HTTP/1.1 503 Service Unavailable"), Some(503));
        assert_eq!(status(b"HTTP/1.1 200"), Some(200));
        assert_eq!(status(b"HTTP/2 200"), None);
    }
}
