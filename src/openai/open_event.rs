//! Where a stream of server-sent events stands, so that one more event may be put behind whatever there was.

/// Follows a stream of server-sent events in whatever parts it comes.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenEvent {
    line: Line,
    /// The event that is not over has a line that is no comment.
    open: bool,
    /// The last byte was a carriage return: a line feed right after it belongs to it.
    after_return: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Line {
    #[default]
    Ended,
    Comment,
    Field,
}

// === impl OpenEvent ===

impl OpenEvent {
    /// The next part. Costs a look at each byte.
    pub fn pass(&mut self, part: &[u8]) {
        for byte in part {
            let after_return = std::mem::replace(&mut self.after_return, *byte == b'\r');
            match (byte, self.line) {
                (b'\n', _) if after_return => {}
                (b'\n' | b'\r', Line::Ended) => self.open = false,
                (b'\n' | b'\r', _) => self.line = Line::Ended,
                (b':', Line::Ended) => self.line = Line::Comment,
                (_, Line::Ended) => (self.line, self.open) = (Line::Field, true),
                _ => {}
            }
        }
    }

    /// Whether something may be put in here: no event has begun, nor is half a line end still to come.
    pub const fn is_between(&self) -> bool {
        !self.open && !self.after_return && matches!(self.line, Line::Ended)
    }

    /// What ends the event that has begun, and nothing else: an empty line too many is an empty event to openai-go.
    pub const fn end(&self) -> &'static [u8] {
        match (self.line, self.open) {
            (Line::Ended, false) => b"",
            // The first one would be taken for the second half of a line end.
            (Line::Ended, true) if self.after_return => b"\n\n",
            (Line::Ended, true) | (_, false) => b"\n",
            (_, true) => b"\n\n",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_goes_into_an_event_or_a_line_end() {
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
    fn what_has_begun_is_ended_and_nothing_is_ended_twice() {
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
