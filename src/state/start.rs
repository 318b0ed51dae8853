//! What is seen of a pod on its way into being, for the record of a cold start.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use crate::domain::{Part, Phase};

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
}

// === impl Seen ===

impl Seen {
    /// Seen now, and nobody says when it happened.
    pub fn now() -> Self {
        Self { at: Instant::now(), stamp: None }
    }
}
