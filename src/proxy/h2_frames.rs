//! What an HTTP/2 client sends besides requests: counted as it comes in, and bounded.
//!
//! The library answers each PING and SETTINGS before it reads on, and keeps nothing of a PRIORITY, a WINDOW_UPDATE or a
//! frame that it does not know. So such a flood takes no memory; what it takes is time, for as long as it goes on.

use std::time::Duration;

use tokio::time::Instant;

/// Reads the heads of the frames that a client sends (RFC 9113, section 4.1), and counts those that are no part of a
/// request.
#[derive(Debug)]
pub(super) struct Frames {
    /// The head of the next frame, as far as it has come.
    head: [u8; 9],
    have: usize,
    /// How much is still to come of the frame before it, or of the preface.
    skip: usize,
    /// So many a second, and as many at once.
    most: u32,
    left: u32,
    since: Instant,
    /// What was written since then.
    written: usize,
}

/// For so many bytes that a client is sent it may send one frame more: it opens its windows again, and the more often,
/// the faster it reads.
const BYTES: usize = 1 << 10;

/// A frame that begins a request, brings a part of one, or ends one.
const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;

const SECOND: Duration = Duration::from_secs(1);

impl Frames {
    /// Behind a preface of so many bytes.
    pub(super) fn new(preface: usize, most: u32) -> Self {
        Self { head: [0; 9], have: 0, skip: preface, most, left: most, since: Instant::now(), written: 0 }
    }

    /// So much was written.
    pub(super) const fn wrote(&mut self, bytes: usize) {
        self.written = self.written.saturating_add(bytes);
    }

    /// Some more has come. False if there were too many of what is no part of a request.
    #[must_use]
    pub(super) fn came(&mut self, mut bytes: &[u8]) -> bool {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let taken = (self.head.len() - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have < self.head.len() {
                return true;
            }
            self.have = 0;
            let [high, middle, low, kind, ..] = self.head;
            self.skip = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
            if !matches!(kind, DATA | HEADERS | CONTINUATION) && !self.count() {
                return false;
            }
        }
    }

    /// The clock is looked at only when what was left is used up.
    fn count(&mut self) -> bool {
        if self.left == 0 {
            let passed = self.since.elapsed().min(SECOND);
            let earned = u128::from(self.most) * passed.as_millis() / SECOND.as_millis();
            let answered = u32::try_from(self.written / BYTES).unwrap_or(self.most).min(self.most);
            self.left = u32::try_from(earned).unwrap_or(self.most).saturating_add(answered);
            if self.left == 0 {
                return false;
            }
            self.since = Instant::now();
            self.written = 0;
        }
        self.left -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, length: usize) -> Vec<u8> {
        let length = u32::try_from(length).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, 0, 0, 0, 0, 0];
        frame.resize(9 + u32::from_be_bytes(length) as usize, kind);
        frame
    }

    #[tokio::test(start_paused = true)]
    async fn frames_are_told_apart_however_they_are_cut() {
        let mut bytes = vec![b'x'; 24];
        for (kind, length) in [(4, 6), (1, 70_000), (0, 300), (6, 8), (9, 3), (2, 5), (1, 0)] {
            bytes.extend(frame(kind, length));
        }
        for cut in [1, 2, 7, 9, 10, 1000, bytes.len()] {
            let mut frames = Frames::new(24, 4);
            assert!(bytes.chunks(cut).all(|part| frames.came(part)), "{cut}");
            assert_eq!(frames.left, 1, "SETTINGS, PING and PRIORITY, in pieces of {cut}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_at_once_and_so_many_a_second() {
        let ping = frame(6, 8);
        let mut frames = Frames::new(0, 100);
        for _ in 0..100 {
            assert!(frames.came(&ping));
        }
        assert!(!frames.came(&ping), "the 101st in no time");

        let mut frames = Frames::new(0, 100);
        // 100 a second for ten minutes, with all of a minute's silence worth no more than one second.
        tokio::time::advance(Duration::from_secs(60)).await;
        for _ in 0..60_000 {
            assert!(frames.came(&ping));
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        // 200 a second: what was saved up at the start is all that there is beyond 100 of them.
        let mut more = 0;
        while frames.came(&ping) {
            more += 1;
            tokio::time::advance(Duration::from_millis(5)).await;
        }
        assert!((100..=400).contains(&more), "{more}");

        // Twice for every 4 KiB that are read is no flood, however fast that goes.
        let mut frames = Frames::new(0, 100);
        let window = frame(8, 4);
        for _ in 0..10_000 {
            frames.wrote(4 << 10);
            assert!(frames.came(&window) && frames.came(&window));
        }
    }
}
