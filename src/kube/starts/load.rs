//! Startup progress parsed from the log of a container.

use std::time::Duration;

use tokio::time::Instant;

use super::logs::PodLogLine;
use crate::{
    coldstart::VllmLog,
    domain::Phase,
    state::{Observation, OutputTail, PartObservation},
};

/// Parsed log of the container's latest run.
#[derive(Default)]
pub(super) struct LoadLog {
    log: VllmLog,
    parts: Vec<PartObservation>,
    /// Time of the first line, and the correction to subtract from it and the parts.
    first_line: Option<Instant>,
    correction: Duration,
    /// Earliest line over all runs.
    earliest_line: Option<Instant>,
    /// Last lines of the log; `None` until a log is read.
    pub(super) tail: Option<OutputTail>,
}

// === impl LoadLog ===

impl LoadLog {
    /// Begins a new run and drops the progress of the previous one.
    pub(super) fn begin_run(&mut self) {
        *self =
            Self { earliest_line: self.earliest_line, tail: Some(OutputTail::default()), ..Self::default() };
    }

    pub(super) fn line(&mut self, line: PodLogLine) {
        self.correction = line.correction;
        let first_line = earlier(*self.first_line.get_or_insert(line.at), line.correction);
        self.earliest_line = Some(self.earliest_line.map_or(first_line, |earliest| earliest.min(first_line)));
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

    /// Returns the completed parts with corrected times.
    pub(super) fn parts(&self) -> impl Iterator<Item = PartObservation> {
        self.parts.iter().map(|part| PartObservation {
            part: part.part,
            start: part.start.map(|start| earlier(start, self.correction)),
            end: earlier(part.end, self.correction),
        })
    }

    /// Moves the container start to the first log line if that is earlier: the kubelet may report the start up to a
    /// second late.
    pub(super) fn adjust_container_start(&self, moments: &mut [(Phase, Observation)]) {
        let start = moments.iter_mut().find(|(phase, _)| *phase == Phase::Start);
        if let Some(((_, seen), earliest_line)) = start.zip(self.earliest_line) {
            seen.at = seen.at.min(earliest_line);
        }
    }
}

fn earlier(at: Instant, by: Duration) -> Instant {
    at.checked_sub(by).unwrap_or(at)
}
