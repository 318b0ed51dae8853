//! Strict HTTP/1 request framing, checked in front of hyper against request smuggling.
//!
//! hyper accepts a bare line feed as the end of a trailer line and skips what follows up to the next empty line, which may
//! be a whole request head (RFC 9112, sections 2.2 and 7.1.2). Ambiguous input is cut off here, so hyper sees an aborted
//! body. Costs one subtraction per read of a body of known length, and one byte per line of a head.

use memchr::{memchr, memchr2};

/// Tracks the requests of one connection as their bytes pass.
#[derive(Debug, Default)]
pub(super) struct RequestFraming {
    state: State,
    /// Complete heads so far.
    heads: u32,
    /// Bytes of the incomplete head, including empty lines before it.
    head_bytes: u32,
    /// Body length of the current head so far.
    length: Length,
    /// Start of a header line that may hold the length and continues in the next read.
    line: Box<[u8]>,
}

#[derive(Clone, Copy, Debug, Default)]
enum State {
    /// Between two requests: empty lines are skipped.
    #[default]
    Between,
    /// In a head, at the start of a line or after `line`.
    Line,
    /// In a head, inside a line that is irrelevant to the body.
    RestOfLine,
    /// In a body; bytes left.
    Content(u64),
    /// In a chunk size: value and number of digits.
    Size(u64, u8),
    /// In whitespace after the digits.
    SizeSpace(u64),
    Extension(u64),
    SizeLf(u64),
    /// In a chunk; bytes left.
    Chunk(u64),
    ChunkCr,
    ChunkLf,
    /// At the start of a trailer line; bytes of trailers so far.
    TrailerStart(usize),
    Trailer(usize),
    TrailerLf(usize),
    LastLf,
    /// Ambiguous input was found; no further bytes may pass.
    Cut,
}

#[derive(Clone, Copy, Debug, Default)]
enum Length {
    #[default]
    None,
    Known(u64),
    Chunked,
    /// hyper or the request path rejects the request.
    Unclear,
}

/// Limit on trailers. hyper has the same for chunk extensions.
const MAX_TRAILER_BYTES: usize = 16 << 10;

/// Limit on a stored header line: enough for the name, a length or coding, and generous whitespace.
const MAX_LINE_BYTES: usize = 256;

/// Hexadecimal digits of 64 bits.
const MAX_SIZE_DIGITS: u8 = 16;

// === impl RequestFraming ===

impl RequestFraming {
    /// Takes the next bytes, and returns how many may pass. After a result smaller than the input, nothing may.
    #[must_use]
    pub(super) fn came(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (was_in_head, heads) = (self.is_in_head(), self.heads);
            match self.step(rest) {
                Some(taken) => {
                    let is_same_head = was_in_head && self.is_in_head() && self.heads == heads;
                    let taken_bytes = u32::try_from(taken).unwrap_or(u32::MAX);
                    self.head_bytes =
                        if is_same_head { self.head_bytes.saturating_add(taken_bytes) } else { 0 };
                    rest = &rest[taken..];
                }
                None => {
                    self.state = State::Cut;
                    break;
                }
            }
        }
        bytes.len() - rest.len()
    }

    /// Returns `true` once ambiguous input was found.
    pub(super) const fn is_cut(&self) -> bool {
        matches!(self.state, State::Cut)
    }

    /// Returns `true` if the first `begun` requests have passed completely.
    pub(super) const fn is_beyond(&self, begun: u32) -> bool {
        self.heads > begun || (self.heads == begun && self.is_in_head())
    }

    /// Returns the bytes of the incomplete head.
    pub(super) const fn head_bytes(&self) -> usize {
        self.head_bytes as usize
    }

    const fn is_in_head(&self) -> bool {
        matches!(self.state, State::Between | State::Line | State::RestOfLine)
    }

    /// Consumes a prefix of `bytes`, which must not be empty. Returns `None` for ambiguous input.
    fn step(&mut self, bytes: &[u8]) -> Option<usize> {
        let byte = bytes[0];
        let mut taken = 1;
        self.state = match (self.state, byte) {
            (State::Between, b'\r' | b'\n') => State::Between,
            (State::Between | State::Line, _) => return Some(self.line(bytes)),
            (State::RestOfLine, _) => match memchr(b'\n', bytes) {
                Some(end) => {
                    taken = end + 1;
                    State::Line
                }
                None => return Some(bytes.len()),
            },
            (State::Content(left), _) => {
                let left = pass(&mut taken, bytes, left);
                if left == 0 { State::Between } else { State::Content(left) }
            }
            (State::Size(size, digits), _) if byte.is_ascii_hexdigit() && digits < MAX_SIZE_DIGITS => {
                let digit = char::from(byte).to_digit(16)?;
                State::Size(size << 4 | u64::from(digit), digits + 1)
            }
            (State::Size(_, 0), _) => return None,
            (State::Size(size, _) | State::SizeSpace(size), b' ' | b'\t') => State::SizeSpace(size),
            (State::Size(size, _) | State::SizeSpace(size), b';') => State::Extension(size),
            (State::Size(size, _) | State::SizeSpace(size), b'\r') => State::SizeLf(size),
            (State::Extension(_) | State::TrailerStart(_) | State::Trailer(_), b'\n') => return None,
            (State::Extension(size), b'\r') => State::SizeLf(size),
            (State::Extension(_), _) => return Some(text(bytes)),
            (State::SizeLf(0), b'\n') => State::TrailerStart(0),
            (State::SizeLf(size), b'\n') => State::Chunk(size),
            (State::Chunk(left), _) => {
                let left = pass(&mut taken, bytes, left);
                if left == 0 { State::ChunkCr } else { State::Chunk(left) }
            }
            (State::ChunkCr, b'\r') => State::ChunkLf,
            (State::ChunkLf, b'\n') => State::Size(0, 0),
            (State::TrailerStart(_), b'\r') => State::LastLf,
            (State::TrailerStart(MAX_TRAILER_BYTES..) | State::Trailer(MAX_TRAILER_BYTES..), _) => {
                return None;
            }
            (State::Trailer(before), b'\r') => State::TrailerLf(before + 1),
            (State::TrailerStart(before) | State::Trailer(before), _) => {
                taken = text(bytes).min(MAX_TRAILER_BYTES - before);
                State::Trailer(before + taken)
            }
            (State::TrailerLf(before), b'\n') => State::TrailerStart(before + 1),
            (State::LastLf, b'\n') => State::Between,
            _ => return None,
        };
        Some(taken)
    }

    /// Consumes a header line, or the part that has arrived.
    fn line(&mut self, bytes: &[u8]) -> usize {
        self.state = State::Line;
        if let Some(end) = memchr(b'\n', bytes) {
            if self.line.is_empty() {
                self.whole_line(&bytes[..end]);
            } else {
                let line = [&*std::mem::take(&mut self.line), &bytes[..end]].concat();
                self.whole_line(&line);
            }
            return end + 1;
        }
        let first = self.line.first().unwrap_or(&bytes[0]);
        let is_of_interest = matches!(first, b'T' | b't' | b'C' | b'c' | b'\r');
        if is_of_interest && self.line.len() + bytes.len() <= MAX_LINE_BYTES {
            self.line = [&*self.line, bytes].concat().into();
        } else {
            let begun = &bytes[..bytes.len().min(MAX_LINE_BYTES)];
            let line = [&*std::mem::take(&mut self.line), begun].concat();
            if value(&line, b"transfer-encoding:").or_else(|| value(&line, b"content-length:")).is_some() {
                self.length = Length::Unclear;
            }
            self.state = State::RestOfLine;
        }
        bytes.len()
    }

    /// Reads a complete header line without its line feed.
    fn whole_line(&mut self, line: &[u8]) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match line.first() {
            None => self.end_head(),
            Some(b'T' | b't') => {
                if let Some(coding) = value(line, b"transfer-encoding:") {
                    // Overrides a valid length before or after it (RFC 9112, section 6.3).
                    self.length = match self.length {
                        Length::None | Length::Known(_) if coding.eq_ignore_ascii_case(b"chunked") => {
                            Length::Chunked
                        }
                        _ => Length::Unclear,
                    };
                }
            }
            Some(b'C' | b'c') => {
                if let Some(digits) = value(line, b"content-length:") {
                    self.length = match (self.length, number(digits)) {
                        (Length::Chunked, _) => Length::Chunked,
                        (Length::None, Some(length)) => Length::Known(length),
                        (Length::Known(length), Some(same)) if length == same => Length::Known(length),
                        _ => Length::Unclear,
                    };
                }
            }
            Some(_) => {}
        }
    }

    fn end_head(&mut self) {
        self.heads = self.heads.wrapping_add(1);
        self.state = match std::mem::take(&mut self.length) {
            Length::None | Length::Known(0) => State::Between,
            Length::Known(length) => State::Content(length),
            Length::Chunked => State::Size(0, 0),
            Length::Unclear => State::Cut,
        };
    }
}

/// Returns the number of bytes before the end of the line.
fn text(bytes: &[u8]) -> usize {
    memchr2(b'\r', b'\n', bytes).unwrap_or(bytes.len())
}

/// Consumes up to `left` bytes, and returns how many remain.
fn pass(taken: &mut usize, bytes: &[u8], left: u64) -> u64 {
    *taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
    left - *taken as u64
}

/// Returns the value of a header line named `name`, which includes the colon.
fn value<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (start, value) = line.split_at_checked(name.len())?;
    start.eq_ignore_ascii_case(name).then(|| trim(value))
}

fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

/// Parses a number of digits only (RFC 9112, section 6.2).
fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests;
