//! Observations of a starting pod, for the record of a cold start.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::domain::{ObstacleKind, Part, Phase, mask_secrets};

/// Observation of an event elsewhere, with the time it happened if that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Time of the observation, never before the event.
    pub at: Instant,
    /// Time of the event by another clock.
    pub stamp: Option<Stamp>,
}

/// A moment by another clock, at the precision it was recorded with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Recorded time, not after the moment.
    pub time: SystemTime,
    /// Precision: the moment is before `time + resolution`. One second for timestamps in Kubernetes objects.
    pub resolution: Duration,
    /// The clock: `control-plane` or the name of a node. Stamps of the same clock determine its offset from ours.
    pub clock: Arc<str>,
}

/// Part of a phase, by our clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartObservation {
    /// Name of the part.
    pub part: Part,
    /// Start; `None` if the part started with its phase or at the end of the part before it.
    pub start: Option<Instant>,
    /// Time at which the part ended.
    pub end: Instant,
}

/// Startup of one pod. The pod that is ready first determines the record of a cold start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodStart {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// `ip:port` of its endpoint, once assigned.
    pub address: Option<Arc<str>>,
    /// Node, once scheduled.
    pub node: Option<Arc<str>>,
    /// True while an image is pulled.
    pub is_pulling: bool,
    /// Ends of phases, each phase once, in any order.
    pub moments: Vec<(Phase, Observation)>,
    /// Known parts of phases, each once.
    pub parts: Vec<PartObservation>,
    /// Last lines of output, if its log is read.
    pub tail: Option<OutputTail>,
    /// Problem currently reported by its node.
    pub warning: Option<PodWarning>,
}

/// Problem of a pod reported by its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodWarning {
    /// Kind of obstacle.
    pub kind: ObstacleKind,
    /// A sentence that names the pod, in the kubelet's words.
    pub message: Arc<str>,
    /// Time from which it counts as an obstacle: every pod has some of these briefly.
    pub from: Instant,
}

/// Last lines of output. Clones share them, and equality is identity.
#[derive(Clone, Debug, Default)]
pub struct OutputTail(Arc<Mutex<VecDeque<String>>>);

// === impl PodStart ===

impl PodStart {
    /// Returns the observed end of a phase.
    pub fn seen(&self, phase: Phase) -> Option<&Observation> {
        self.moments.iter().find(|(over, _)| *over == phase).map(|(_, seen)| seen)
    }
}

// === impl OutputTail ===

impl OutputTail {
    /// Maximum number of lines.
    pub const MAX_TAIL_LINES: usize = 50;

    /// Appends a line, with secrets masked.
    pub fn push(&self, line: String) {
        let line = mask_secrets(&line).into_owned();
        let mut lines = self.0.lock();
        if lines.len() == Self::MAX_TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// Returns the lines.
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().iter().cloned().collect()
    }
}

impl PartialEq for OutputTail {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for OutputTail {}

// === impl Observation ===

impl Observation {
    /// Creates an observation of now, without a timestamp of the event.
    pub fn now() -> Self {
        Self { at: Instant::now(), stamp: None }
    }
}
