//! Tracking of WebSocket frames, to find the places where one more may be inserted (RFC 6455, section 5.2).

use bytes::{BufMut, Bytes, BytesMut};

use crate::error::ProxyError;

/// Tracker of the frames that one side sends, however they are split.
#[derive(Debug, Default)]
pub(super) struct WsFrameTracker {
    /// Header of the current frame, as far as it has arrived.
    header: [u8; Self::MAX_HEADER_BYTES],
    header_len: usize,
    /// Payload bytes of the frame still to come.
    left: u64,
    /// A close frame has been passed on; no frame may follow.
    closed: bool,
    /// A part is being written, and the amount already sent is unknown.
    is_write_pending: bool,
}

/// Maximum payload of a close frame, in bytes; two of them are the code.
const MAX_CLOSE_BYTES: usize = 125;

// === impl WsFrameTracker ===

impl WsFrameTracker {
    /// Maximum size of a frame header: two bytes, a length of eight and a mask of four.
    const MAX_HEADER_BYTES: usize = 14;

    /// Marks the start of a write.
    pub(super) const fn begin(&mut self) {
        self.is_write_pending = true;
    }

    /// Records a completed write.
    pub(super) fn pass(&mut self, mut part: &[u8]) {
        self.is_write_pending = false;
        while !part.is_empty() {
            if self.left > 0 {
                let skipped = part.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= skipped as u64;
                part = &part[skipped..];
                continue;
            }
            self.header[self.header_len] = part[0];
            self.header_len += 1;
            part = &part[1..];
            if let Some(length) = self.length() {
                self.left = length;
                self.closed |= self.header[0] & 0x0f == 8;
                self.header_len = 0;
            }
        }
    }

    /// Returns the length of the payload, once the header is complete.
    fn length(&self) -> Option<u64> {
        let header = &self.header[..self.header_len];
        let [_, second, rest @ ..] = header else { return None };
        let mask = if second & 0x80 == 0 { 0 } else { 4 };
        let extended = match second & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        if rest.len() < extended + mask {
            return None;
        }
        let length = rest[..extended].iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
        Some(if extended == 0 { u64::from(second & 0x7f) } else { length })
    }

    /// Returns `true` if a close frame has been passed on.
    pub(super) const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Returns `true` if a close frame may be inserted here.
    pub(super) const fn may_close(&self) -> bool {
        !(self.is_write_pending || self.closed || self.header_len > 0 || self.left > 0)
    }

    /// Builds the close frame with the reason for ending the server's side; `None` if no frame may be inserted here.
    pub(super) fn close(&self, error: &ProxyError) -> Option<Bytes> {
        if !self.may_close() {
            return None;
        }
        let mut reason = format!("{}: {error}", error.answer().code);
        reason.truncate(reason.floor_char_boundary(MAX_CLOSE_BYTES - 2));
        let mut frame = BytesMut::with_capacity(MAX_CLOSE_BYTES + 2);
        // FIN with the opcode, the length without a mask, and the code.
        frame.put_u8(0x88);
        frame.put_u8(reason.len() as u8 + 2);
        frame.put_u16(error.close_code());
        frame.put_slice(reason.as_bytes());
        Some(frame.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error() -> ProxyError {
        ProxyError::UpstreamError { route: "tiny".into(), reason: "ü".repeat(100) }
    }

    fn frame(opcode: u8, length: usize, mask: bool) -> Vec<u8> {
        let mut frame = vec![0x80 | opcode];
        let bit = if mask { 0x80 } else { 0 };
        match length {
            0..126 => frame.push(bit | length as u8),
            126..0x1_0000 => {
                frame.push(bit | 126);
                frame.extend((length as u16).to_be_bytes());
            }
            _ => {
                frame.push(bit | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend([0x81; 4].iter().take(if mask { 4 } else { 0 }));
        // Every byte of the payload could be the first of a frame.
        frame.extend(std::iter::repeat_n(0x88, length));
        frame
    }

    #[test]
    fn close_frame_fits_between_frames_only() {
        let stream: Vec<_> = [(1, 0), (2, 5), (9, 125), (0, 126), (2, 70_000)]
            .map(|(op, length)| frame(op, length, false))
            .concat();
        let mut ends = vec![0];
        for (op, length) in [(1, 0), (2, 5), (9, 125), (0, 126), (2, 70_000)] {
            ends.push(ends[ends.len() - 1] + frame(op, length, false).len());
        }
        for cut in (0..300).chain([stream.len() - 1, stream.len()]) {
            let mut frames = WsFrameTracker::default();
            frames.pass(&stream[..cut]);
            assert_eq!(frames.close(&error()).is_some(), ends.contains(&cut), "{cut} of {ends:?}");
            frames.pass(&stream[cut..]);
            assert!(frames.close(&error()).is_some(), "the rest after {cut}");
        }
        let mut masked = WsFrameTracker::default();
        masked.pass(&frame(1, 200, true));
        assert!(masked.close(&error()).is_some());
    }

    #[test]
    fn close_frame_or_open_fragment_blocks_insertion() {
        let mut frames = WsFrameTracker::default();
        frames.begin();
        assert!(frames.close(&error()).is_none());
        frames.pass(&frame(1, 3, false));
        assert!(frames.close(&error()).is_some());
        frames.pass(&frame(8, 2, false));
        assert!(frames.close(&error()).is_none());
    }

    #[test]
    fn close_frame_has_code_and_fitting_reason() {
        let close = WsFrameTracker::default().close(&error()).unwrap();
        let [0x88, length, 0x03, 0xf3, reason @ ..] = &close[..] else { panic!("{close:?}: not 1011") };
        assert_eq!(usize::from(*length), reason.len() + 2);
        assert!(close.len() <= 127);
        assert!(str::from_utf8(reason).unwrap().starts_with("upstream_error: `tiny` failed: ü"));
        let close = WsFrameTracker::default().close(&ProxyError::Draining { admitted: true }).unwrap();
        assert_eq!(close[2..4], 1012_u16.to_be_bytes());
    }
}
