//! What is seen of a pod on its way into being, for the record of a cold start.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::domain::{ObstacleKind, Part, Phase, mask_secrets};

/// Something that happened elsewhere: it had happened when we saw it, and perhaps somebody else says when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When we saw it, which is never before it happened.
    pub at: Instant,
    /// When it happened, by another clock.
    pub stamp: Option<Stamp>,
}

/// A moment by a clock that is not ours, as precise as it was written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// What was written, which is not after the moment.
    pub time: SystemTime,
    /// The moment was before `time` and this. A second, for what Kubernetes writes into objects.
    pub resolution: Duration,
    /// Whose clock it is: moments of the same one say how far it is from ours. `control-plane`, or the name of a node.
    pub clock: Arc<str>,
}

/// A part of a phase, on our clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartSeen {
    /// Which.
    pub part: Part,
    /// When it began; `None`: with its phase, or when the part before it ended.
    pub start: Option<Instant>,
    /// When it ended.
    pub end: Instant,
}

/// What is known of the way of one pod into being. The pod that is ready first is the one that a cold start tells of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodStart {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// `ip:port`, as that of its endpoint, once it has one.
    pub address: Option<Arc<str>>,
    /// Where it runs, once that is decided.
    pub node: Option<Arc<str>>,
    /// Whether an image is being fetched for it now.
    pub is_pulling: bool,
    /// Which phases are over, each once, in any order.
    pub moments: Vec<(Phase, Seen)>,
    /// What is known of the inside of phases, each part once.
    pub parts: Vec<PartSeen>,
    /// What it printed last, where its log is read.
    pub tail: Option<Tail>,
    /// What its node says stands in its way now.
    pub warning: Option<PodWarning>,
}

/// What the node of a pod says stands in its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodWarning {
    /// What it is.
    pub kind: ObstacleKind,
    /// A sentence that names the pod, in the kubelet's own words.
    pub message: Arc<str>,
    /// From when on it is more than what happens on the way of any pod.
    pub from: Instant,
}

/// The last lines that somebody printed, as they come. Two are equal if they are the same one.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Mutex<VecDeque<String>>>);

// === impl PodStart ===

impl PodStart {
    /// When a phase was seen to be over, if it is.
    pub fn seen(&self, phase: Phase) -> Option<&Seen> {
        self.moments.iter().find(|(over, _)| *over == phase).map(|(_, seen)| seen)
    }
}

// === impl Tail ===

impl Tail {
    /// How many lines are kept.
    pub const KEPT: usize = 50;

    /// Another line, without secrets.
    pub fn push(&self, line: String) {
        let line = mask_secrets(&line).into_owned();
        let mut lines = self.0.lock();
        if lines.len() == Self::KEPT {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// The last lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().iter().cloned().collect()
    }
}

impl PartialEq for Tail {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Tail {}

// === impl Seen ===

impl Seen {
    /// Seen now, and nobody says when it happened.
    pub fn now() -> Self {
        Self { at: Instant::now(), stamp: None }
    }
}
