//! Position in a stream of server-sent events, needed to insert another event.

/// Tracks a stream of server-sent events, split at any byte.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenEvent {
    line: LineKind,
    /// The current event has a line that is not a comment.
    open: bool,
    /// The last byte was a carriage return; a following line feed belongs to it.
    after_return: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LineKind {
    #[default]
    Ended,
    Comment,
    Field,
}

// === impl OpenEvent ===

impl OpenEvent {
    /// Consumes the next part; inspects every byte.
    pub fn pass(&mut self, part: &[u8]) {
        for byte in part {
            let after_return = std::mem::replace(&mut self.after_return, *byte == b'\r');
            match (byte, self.line) {
                (b'\n', _) if after_return => {}
                (b'\n' | b'\r', LineKind::Ended) => self.open = false,
                (b'\n' | b'\r', _) => self.line = LineKind::Ended,
                (b':', LineKind::Ended) => self.line = LineKind::Comment,
                (_, LineKind::Ended) => (self.line, self.open) = (LineKind::Field, true),
                _ => {}
            }
        }
    }

    /// Returns whether an event may be inserted: none is open, and no line end is incomplete.
    pub const fn is_between(&self) -> bool {
        !self.open && !self.after_return && matches!(self.line, LineKind::Ended)
    }

    /// Returns the bytes that end the open event, and no more: openai-go takes a superfluous empty line for an empty
    /// event.
    pub const fn end(&self) -> &'static [u8] {
        match (self.line, self.open) {
            (LineKind::Ended, false) => b"",
            // The first line feed completes the CRLF, and the second one ends the event.
            (LineKind::Ended, true) if self.after_return => b"\n\n",
            (LineKind::Ended, true) | (_, false) => b"\n",
            (_, true) => b"\n\n",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn insertion_waits_for_the_end_of_an_event() {
        for (stream, is_between) in [
            ("", true),
            ("data: x", false),
            ("data: x\n", false),
            ("data: x\n\n", true),
            ("data: x\r\n\r", false),
            ("data: x\r\n\r\n", true),
            ("data: x\n\n: be", false),
            ("data: x\n\n: beat\n", true),
            ("data: x\n: beat\n", false),
            ("data: x\n\nid", false),
        ] {
            let mut event = OpenEvent::default();
            event.pass(stream.as_bytes());
            assert_eq!(event.is_between(), is_between, "{stream:?}");
        }
    }

    #[test]
    fn open_event_is_ended_exactly_once() {
        for (stream, end) in [
            ("", ""),
            ("data: x", "\n\n"),
            ("data: x\n", "\n"),
            ("data: x\r", "\n\n"),
            ("data: x\r\n", "\n"),
            ("data: x\n\n", ""),
            ("data: x\r\r", ""),
            ("data: x\r\n\r\n", ""),
            ("data: x\n\n: beat", "\n"),
            ("data: x\n\n: beat\n", ""),
            ("data: x\n: beat\n", "\n"),
            ("data: x\n: beat", "\n\n"),
        ] {
            for cut in 0..=stream.len() {
                let mut event = OpenEvent::default();
                event.pass(&stream.as_bytes()[..cut]);
                event.pass(&stream.as_bytes()[cut..]);
                assert_eq!(event.end(), end.as_bytes(), "{stream:?} in two parts, the second from {cut}");
            }
        }
    }
}
