//! The phases of a cold start, and the parts that some of them have.

use serde::{Deserialize, Serialize};

/// A stretch of a cold start. Phases follow each other without gap or overlap, so they sum to the total. One that cannot
/// be known is absent, and its time is in the next one that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// From the first request until whoever starts the target knows.
    Signal,
    /// Until a workload in a cluster is told to have replicas.
    Scale,
    /// Until the pod exists.
    Create,
    /// Until it has a node, which may have to be made first.
    Schedule,
    /// Until its images are on the node. Absent where they were.
    Pull,
    /// Until its container runs; without a cluster: until the process does.
    Start,
    /// Until it answers its readiness probe.
    Load,
    /// Until we may send to it: until its readiness is known, and a gateway before it is open.
    Propagate,
    /// Until the first held request is sent.
    Dispatch,
    /// Until its answer begins.
    FirstByte,
    /// Until the first token of that answer, if it is streamed.
    FirstToken,
}

/// Something that happens within a phase. Parts do not overlap, and need not fill their phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// A new node is made for the pod. Of [`Phase::Schedule`].
    NodeCreate,
    /// It becomes ready. Of [`Phase::Schedule`].
    NodeReady,
    /// The model server's own start, until it begins with the model. Of [`Phase::Load`], as those below.
    EngineStart,
    /// Weights are fetched from elsewhere.
    WeightsDownload,
    /// Weights are read.
    Weights,
    /// The model is compiled.
    Compile,
    /// Profiling, the KV cache, graphs, the first pass.
    Warmup,
    /// The server's own start, once the engine is up.
    ServerStart,
}

// === impl Phase ===

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 11] = [
        Self::Signal,
        Self::Scale,
        Self::Create,
        Self::Schedule,
        Self::Pull,
        Self::Start,
        Self::Load,
        Self::Propagate,
        Self::Dispatch,
        Self::FirstByte,
        Self::FirstToken,
    ];

    /// Its name in metrics, records and heartbeats.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Signal => "signal",
            Self::Scale => "scale",
            Self::Create => "create",
            Self::Schedule => "schedule",
            Self::Pull => "pull",
            Self::Start => "start",
            Self::Load => "load",
            Self::Propagate => "propagate",
            Self::Dispatch => "dispatch",
            Self::FirstByte => "first_byte",
            Self::FirstToken => "first_token",
        }
    }

    /// Whether it comes before the target may be sent to.
    pub fn is_activation(self) -> bool {
        self <= Self::Propagate
    }
}

// === impl Part ===

impl Part {
    /// Every part, in order.
    pub const ALL: [Self; 8] = [
        Self::NodeCreate,
        Self::NodeReady,
        Self::EngineStart,
        Self::WeightsDownload,
        Self::Weights,
        Self::Compile,
        Self::Warmup,
        Self::ServerStart,
    ];

    /// Its name in records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NodeCreate => "node_create",
            Self::NodeReady => "node_ready",
            Self::EngineStart => "engine_start",
            Self::WeightsDownload => "weights_download",
            Self::Weights => "weights",
            Self::Compile => "compile",
            Self::Warmup => "warmup",
            Self::ServerStart => "server_start",
        }
    }

    /// The phase that it is a part of.
    pub const fn phase(self) -> Phase {
        match self {
            Self::NodeCreate | Self::NodeReady => Phase::Schedule,
            Self::EngineStart
            | Self::WeightsDownload
            | Self::Weights
            | Self::Compile
            | Self::Warmup
            | Self::ServerStart => Phase::Load,
        }
    }
}
