//! Frames that an HTTP/2 client sends besides requests: counted and bounded on every HTTP/2 listener.
//!
//! h2 answers each PING and SETTINGS before it reads on, and stores nothing of PRIORITY, WINDOW_UPDATE, unknown frames,
//! or heads of closed streams. So a flood of them takes no memory, but CPU time for as long as it lasts.

use std::time::Duration;

use tokio::time::Instant;

/// Parser of the headers of frames that a client sends (RFC 9113, section 4.1). Counts frames that are no part of a
/// request.
#[derive(Debug)]
pub(crate) struct H2FrameParser {
    /// Header of the next frame, as far as it has arrived.
    head: [u8; 9],
    frame_head_len: usize,
    /// Bytes to skip before `head`: the rest of the current frame or of the preface.
    skip: usize,
    /// State of a request head that takes more than one frame.
    block: HeaderBlock,
    /// Highest id of a stream that the client has opened.
    newest: u32,
    /// Frames allowed per second, and in a burst.
    most: u32,
    frames_left: u32,
    since: Instant,
    /// Bytes written since `since`.
    written: usize,
}

/// Progress of a request head that takes more than one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HeaderBlock {
    Whole,
    /// The next frame belongs to the head.
    Open,
    /// The current frame is the last one of the head.
    Last,
}

/// Bytes sent to a client that allow it one more frame: the faster a client reads, the more often it sends
/// WINDOW_UPDATE.
const BYTES_PER_FRAME_CREDIT: usize = 1 << 10;

/// Connection preface of HTTP/2 (RFC 9113, section 3.4).
pub(crate) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Error of a connection with too many such frames.
pub(crate) const TOO_MANY_FRAMES: &str = "too many frames that are no part of a request";

/// Part of a request. h2 itself limits empty DATA frames.
const DATA: u8 = 0x0;
/// Start of a request, if its stream is new.
const HEADERS: u8 = 0x1;
/// Continuation of a head.
const CONTINUATION: u8 = 0x9;
/// Flag of HEADERS and CONTINUATION: the head ends with this frame.
const END_HEADERS: u8 = 0x4;

const REFILL_PERIOD: Duration = Duration::from_secs(1);

impl H2FrameParser {
    /// Creates a parser that expects the preface first. `most`: frames allowed per second, and in a burst.
    pub(crate) fn new(most: u32) -> Self {
        Self {
            head: [0; 9],
            frame_head_len: 0,
            skip: PREFACE.len(),
            block: HeaderBlock::Whole,
            newest: 0,
            most,
            frames_left: most,
            since: Instant::now(),
            written: 0,
        }
    }

    /// Records bytes written.
    pub(crate) const fn wrote(&mut self, bytes: usize) {
        self.written = self.written.saturating_add(bytes);
    }

    /// Returns `true` while a head of several frames is incomplete; h2 stores its fields.
    pub(crate) fn is_in_head(&self) -> bool {
        self.block != HeaderBlock::Whole
    }

    /// Returns the highest id of a stream that the client has opened; 0 before the first.
    pub(crate) const fn newest(&self) -> u32 {
        self.newest
    }

    /// Returns `true` if all frames and heads received are complete, so that another frame may follow.
    pub(crate) fn is_between(&self) -> bool {
        self.frame_head_len == 0 && self.skip == 0 && !self.is_in_head()
    }

    /// Parses bytes received. Returns `false` if there were too many frames that are no part of a request.
    #[must_use]
    pub(crate) fn parse_frames(&mut self, mut bytes: &[u8]) -> bool {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if self.skip == 0 && self.block == HeaderBlock::Last {
                self.block = HeaderBlock::Whole;
            }
            let taken = (self.head.len() - self.frame_head_len).min(bytes.len());
            self.head[self.frame_head_len..self.frame_head_len + taken].copy_from_slice(&bytes[..taken]);
            self.frame_head_len += taken;
            bytes = &bytes[taken..];
            if self.frame_head_len < self.head.len() {
                return true;
            }
            self.frame_head_len = 0;
            let [high, middle, low, kind, flags, stream @ ..] = self.head;
            self.skip = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
            let stream = u32::from_be_bytes(stream);
            if matches!(kind, HEADERS | CONTINUATION) {
                self.block = match (self.block, flags & END_HEADERS != 0) {
                    (_, false) => HeaderBlock::Open,
                    (HeaderBlock::Open, true) => HeaderBlock::Last,
                    (block, true) => block,
                };
            }
            let is_part = kind == DATA || (kind == HEADERS && stream > self.newest);
            if is_part {
                self.newest = self.newest.max(stream);
            } else if !self.count() {
                return false;
            }
        }
    }

    /// Counts a frame. Reads the clock only when the allowance is used up.
    fn count(&mut self) -> bool {
        if self.frames_left == 0 {
            let passed = self.since.elapsed().min(REFILL_PERIOD);
            let earned = u128::from(self.most) * passed.as_millis() / REFILL_PERIOD.as_millis();
            let answered =
                u32::try_from(self.written / BYTES_PER_FRAME_CREDIT).unwrap_or(self.most).min(self.most);
            self.frames_left = u32::try_from(earned).unwrap_or(self.most).saturating_add(answered);
            if self.frames_left == 0 {
                return false;
            }
            self.since = Instant::now();
            self.written = 0;
        }
        self.frames_left -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a parser that has read the preface.
    fn behind_preface(most: u32) -> H2FrameParser {
        let mut frames = H2FrameParser::new(most);
        assert!(frames.parse_frames(PREFACE));
        frames
    }

    fn frame(kind: u8, stream: u8, length: usize) -> Vec<u8> {
        let length = u32::try_from(length).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, 0, 0, 0, 0, stream];
        frame.resize(9 + u32::from_be_bytes(length) as usize, kind);
        frame
    }

    #[tokio::test(start_paused = true)]
    async fn frames_are_parsed_at_any_split() {
        let mut bytes = PREFACE.to_vec();
        let request = [(1, 1, 70_000), (0, 1, 300), (0, 1, 3), (1, 3, 0)];
        let counted = [(4, 0, 6), (6, 0, 8), (9, 3, 3), (2, 0, 5), (1, 3, 0), (1, 1, 0)];
        for (kind, stream, length) in request.into_iter().chain(counted) {
            bytes.extend(frame(kind, stream, length));
        }
        for cut in [1, 2, 7, 9, 10, 1000, bytes.len()] {
            let mut frames = H2FrameParser::new(7);
            assert!(bytes.chunks(cut).all(|part| frames.parse_frames(part)), "{cut}");
            assert_eq!(
                frames.frames_left, 1,
                "all but what begins requests or brings parts, in pieces of {cut}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn split_head_is_open_until_its_last_byte() {
        let flagged = |kind: u8, flags: u8| {
            let mut bytes = frame(kind, 1, 100);
            bytes[4] = flags;
            bytes
        };
        let mut frames = behind_preface(100);
        let mut is_in_head = |bytes: &[u8]| {
            assert!(frames.parse_frames(bytes));
            frames.is_in_head()
        };
        assert!(!is_in_head(&flagged(HEADERS, END_HEADERS)), "of one frame");
        assert!(is_in_head(&flagged(HEADERS, 0)[..9]));
        assert!(is_in_head(&[0; 100]) && is_in_head(&flagged(CONTINUATION, 0)));
        let last = flagged(CONTINUATION, END_HEADERS);
        assert!(is_in_head(&last[..108]));
        assert!(!is_in_head(&last[108..]));
    }

    #[tokio::test(start_paused = true)]
    async fn frames_are_limited_in_burst_and_rate() {
        let ping = frame(6, 0, 8);
        let mut frames = behind_preface(100);
        for _ in 0..100 {
            assert!(frames.parse_frames(&ping));
        }
        assert!(!frames.parse_frames(&ping), "the 101st in no time");

        let mut frames = behind_preface(100);
        // 100 frames per second for ten minutes; the idle minute before allows a burst of 100 and no more.
        tokio::time::advance(Duration::from_secs(60)).await;
        for _ in 0..60_000 {
            assert!(frames.parse_frames(&ping));
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        // 200 frames per second: only the unused burst allows more than 100 of them.
        let mut more = 0;
        while frames.parse_frames(&ping) {
            more += 1;
            tokio::time::advance(Duration::from_millis(5)).await;
        }
        assert!((100..=400).contains(&more), "{more}");

        // Two frames for every 4 KiB read are no flood, however fast.
        let mut frames = behind_preface(100);
        let window = frame(8, 0, 4);
        for _ in 0..10_000 {
            frames.wrote(4 << 10);
            assert!(frames.parse_frames(&window) && frames.parse_frames(&window));
        }
    }
}
