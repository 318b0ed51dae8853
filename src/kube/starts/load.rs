//! What the log of a container tells of its load, and of when it ran at the latest.

use std::time::Duration;

use tokio::time::Instant;

use super::logs::Line;
use crate::{
    coldstart::VllmLog,
    domain::Phase,
    state::{PartSeen, Seen, Tail},
};

/// The logs of a container, one for each run of it; what is told is of the last.
#[derive(Default)]
pub(super) struct Load {
    log: VllmLog,
    parts: Vec<PartSeen>,
    /// When its first line was written, and by how much that and the parts were too late, as far as is known now.
    first: Option<Instant>,
    late: Duration,
    /// The first line of all.
    ran: Option<Instant>,
    /// The last lines, once one is read.
    pub(super) tail: Option<Tail>,
}

// === impl Load ===

impl Load {
    /// Another run: what the one before it was at is of no use to this one.
    pub(super) fn begin(&mut self) {
        *self = Self { ran: self.ran, tail: Some(Tail::default()), ..Self::default() };
    }

    pub(super) fn line(&mut self, line: Line) {
        self.late = line.late;
        let first = earlier(*self.first.get_or_insert(line.at), line.late);
        self.ran = Some(self.ran.map_or(first, |ran| ran.min(first)));
        for part in self.log.line(&line.text, line.at) {
            match self.parts.iter_mut().find(|known| known.part == part.part) {
                Some(known) => *known = part,
                None => self.parts.push(part),
            }
        }
        if let Some(tail) = &self.tail {
            tail.push(line.text);
        }
    }

    /// What it had done, and when.
    pub(super) fn parts(&self) -> impl Iterator<Item = PartSeen> {
        self.parts.iter().map(|part| PartSeen {
            part: part.part,
            start: part.start.map(|start| earlier(start, self.late)),
            end: earlier(part.end, self.late),
        })
    }

    /// A container that has printed something ran by then. Its node may be silent about it for a second.
    pub(super) fn cap(&self, moments: &mut [(Phase, Seen)]) {
        let start = moments.iter_mut().find(|(phase, _)| *phase == Phase::Start);
        if let Some(((_, seen), ran)) = start.zip(self.ran) {
            seen.at = seen.at.min(ran);
        }
    }
}

fn earlier(at: Instant, by: Duration) -> Instant {
    at.checked_sub(by).unwrap_or(at)
}
