//! Strict HTTP/1 request framing, checked in front of hyper against request smuggling.
//!
//! hyper accepts a bare line feed as the end of a trailer line and skips what follows up to the next empty line, which may
//! be a whole request head (RFC 9112, sections 2.2 and 7.1.2). Ambiguous input is cut off here, so hyper sees an aborted
//! body. Costs one subtraction per read of a body of known length, and one byte per line of a head.

use memchr::{memchr, memchr2};

/// Tracks the requests of one connection as their bytes pass.
#[derive(Debug, Default)]
pub(super) struct RequestFraming {
    state: FramingState,
    /// Complete heads so far.
    heads: u32,
    /// Bytes of the incomplete head, including empty lines before it.
    head_bytes: u32,
    /// Body length according to the header lines read so far.
    length: BodyLength,
    /// Start of a header line that may hold the length and continues in the next read.
    line: Box<[u8]>,
}

#[derive(Clone, Copy, Debug, Default)]
enum FramingState {
    /// Between two requests: empty lines are skipped.
    #[default]
    Between,
    /// In a head, at the start of a line or behind the stored part of one.
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
enum BodyLength {
    #[default]
    None,
    Known(u64),
    Chunked,
    /// The length or coding is invalid or contradictory, so hyper or the request path rejects the request.
    Unclear,
}

/// Limit on trailers. hyper has the same for chunk extensions.
const MAX_TRAILER_BYTES: usize = 16 << 10;

/// Limit on a stored header line: enough for the name, a length or coding, and generous whitespace.
const MAX_HEADER_LINE_BYTES: usize = 256;

/// Hexadecimal digits of 64 bits.
const MAX_SIZE_DIGITS: u8 = 16;

// === impl RequestFraming ===

impl RequestFraming {
    /// Takes the next bytes, and returns how many may pass. After a result smaller than the input, nothing may.
    #[must_use]
    pub(super) fn admit_bytes(&mut self, bytes: &[u8]) -> usize {
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
                    self.state = FramingState::Cut;
                    break;
                }
            }
        }
        bytes.len() - rest.len()
    }

    /// Returns `true` once ambiguous input was found.
    pub(super) const fn is_cut(&self) -> bool {
        matches!(self.state, FramingState::Cut)
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
        matches!(self.state, FramingState::Between | FramingState::Line | FramingState::RestOfLine)
    }

    /// Consumes a prefix of `bytes`, which must not be empty. Returns `None` for ambiguous input.
    fn step(&mut self, bytes: &[u8]) -> Option<usize> {
        let byte = bytes[0];
        let mut taken = 1;
        self.state = match (self.state, byte) {
            (FramingState::Between, b'\r' | b'\n') => FramingState::Between,
            (FramingState::Between | FramingState::Line, _) => return Some(self.consume_header_line(bytes)),
            (FramingState::RestOfLine, _) => match memchr(b'\n', bytes) {
                Some(end) => {
                    taken = end + 1;
                    FramingState::Line
                }
                None => return Some(bytes.len()),
            },
            (FramingState::Content(left), _) => {
                let left = pass(&mut taken, bytes, left);
                if left == 0 { FramingState::Between } else { FramingState::Content(left) }
            }
            (FramingState::Size(size, digits), _) if byte.is_ascii_hexdigit() && digits < MAX_SIZE_DIGITS => {
                let digit = char::from(byte).to_digit(16)?;
                FramingState::Size(size << 4 | u64::from(digit), digits + 1)
            }
            (FramingState::Size(_, 0), _) => return None,
            (FramingState::Size(size, _) | FramingState::SizeSpace(size), b' ' | b'\t') => {
                FramingState::SizeSpace(size)
            }
            (FramingState::Size(size, _) | FramingState::SizeSpace(size), b';') => {
                FramingState::Extension(size)
            }
            (FramingState::Size(size, _) | FramingState::SizeSpace(size), b'\r') => {
                FramingState::SizeLf(size)
            }
            (
                FramingState::Extension(_) | FramingState::TrailerStart(_) | FramingState::Trailer(_),
                b'\n',
            ) => return None,
            (FramingState::Extension(size), b'\r') => FramingState::SizeLf(size),
            (FramingState::Extension(_), _) => return Some(line_text_len(bytes)),
            (FramingState::SizeLf(0), b'\n') => FramingState::TrailerStart(0),
            (FramingState::SizeLf(size), b'\n') => FramingState::Chunk(size),
            (FramingState::Chunk(left), _) => {
                let left = pass(&mut taken, bytes, left);
                if left == 0 { FramingState::ChunkCr } else { FramingState::Chunk(left) }
            }
            (FramingState::ChunkCr, b'\r') => FramingState::ChunkLf,
            (FramingState::ChunkLf, b'\n') => FramingState::Size(0, 0),
            (FramingState::TrailerStart(_), b'\r') => FramingState::LastLf,
            (
                FramingState::TrailerStart(MAX_TRAILER_BYTES..) | FramingState::Trailer(MAX_TRAILER_BYTES..),
                _,
            ) => {
                return None;
            }
            (FramingState::Trailer(before), b'\r') => FramingState::TrailerLf(before + 1),
            (FramingState::TrailerStart(before) | FramingState::Trailer(before), _) => {
                taken = line_text_len(bytes).min(MAX_TRAILER_BYTES - before);
                FramingState::Trailer(before + taken)
            }
            (FramingState::TrailerLf(before), b'\n') => FramingState::TrailerStart(before + 1),
            (FramingState::LastLf, b'\n') => FramingState::Between,
            _ => return None,
        };
        Some(taken)
    }

    /// Consumes a header line, or the part that has arrived.
    fn consume_header_line(&mut self, bytes: &[u8]) -> usize {
        self.state = FramingState::Line;
        if let Some(end) = memchr(b'\n', bytes) {
            if self.line.is_empty() {
                self.parse_header_line(&bytes[..end]);
            } else {
                let line = [&*std::mem::take(&mut self.line), &bytes[..end]].concat();
                self.parse_header_line(&line);
            }
            return end + 1;
        }
        let first = self.line.first().unwrap_or(&bytes[0]);
        let is_of_interest = matches!(first, b'T' | b't' | b'C' | b'c' | b'\r');
        if is_of_interest && self.line.len() + bytes.len() <= MAX_HEADER_LINE_BYTES {
            self.line = [&*self.line, bytes].concat().into();
        } else {
            let begun = &bytes[..bytes.len().min(MAX_HEADER_LINE_BYTES)];
            let line = [&*std::mem::take(&mut self.line), begun].concat();
            if header_line_value(&line, b"transfer-encoding:")
                .or_else(|| header_line_value(&line, b"content-length:"))
                .is_some()
            {
                self.length = BodyLength::Unclear;
            }
            self.state = FramingState::RestOfLine;
        }
        bytes.len()
    }

    /// Reads a complete header line without its line feed.
    fn parse_header_line(&mut self, line: &[u8]) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match line.first() {
            None => self.end_head(),
            Some(b'T' | b't') => {
                if let Some(coding) = header_line_value(line, b"transfer-encoding:") {
                    // Overrides a valid length before or after it (RFC 9112, section 6.3).
                    self.length = match self.length {
                        BodyLength::None | BodyLength::Known(_)
                            if coding.eq_ignore_ascii_case(b"chunked") =>
                        {
                            BodyLength::Chunked
                        }
                        _ => BodyLength::Unclear,
                    };
                }
            }
            Some(b'C' | b'c') => {
                if let Some(digits) = header_line_value(line, b"content-length:") {
                    self.length = match (self.length, parse_digits(digits)) {
                        (BodyLength::Chunked, _) => BodyLength::Chunked,
                        (BodyLength::None, Some(length)) => BodyLength::Known(length),
                        (BodyLength::Known(length), Some(same)) if length == same => {
                            BodyLength::Known(length)
                        }
                        _ => BodyLength::Unclear,
                    };
                }
            }
            Some(_) => {}
        }
    }

    fn end_head(&mut self) {
        self.heads = self.heads.wrapping_add(1);
        self.state = match std::mem::take(&mut self.length) {
            BodyLength::None | BodyLength::Known(0) => FramingState::Between,
            BodyLength::Known(length) => FramingState::Content(length),
            BodyLength::Chunked => FramingState::Size(0, 0),
            BodyLength::Unclear => FramingState::Cut,
        };
    }
}

/// Returns the number of bytes before the end of the line.
fn line_text_len(bytes: &[u8]) -> usize {
    memchr2(b'\r', b'\n', bytes).unwrap_or(bytes.len())
}

/// Consumes up to `left` bytes, and returns how many remain.
fn pass(taken: &mut usize, bytes: &[u8], left: u64) -> u64 {
    *taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
    left - *taken as u64
}

/// Returns the value of a header line named `name`, which includes the colon.
fn header_line_value<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
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
fn parse_digits(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests;
