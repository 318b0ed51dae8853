//! Phases of a cold start, and parts within some of them.

use serde::{Deserialize, Serialize};
use strum::{IntoStaticStr, VariantArray};

/// A phase of a cold start. Phases follow each other without gap or overlap, so they sum to the total. A phase that
/// cannot be observed is absent; its time belongs to the next observed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[derive(IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Phase {
    /// From the first request until the scaler or launcher has received the demand.
    Signal,
    /// Until the workload's desired replicas are above zero; only in a cluster.
    Scale,
    /// Until the pod exists.
    Create,
    /// Until the pod has a node, which may have to be created.
    Schedule,
    /// Until the images are on the node; absent if they already were.
    Pull,
    /// Until the container (without a cluster: the process) runs.
    Start,
    /// Until the readiness probe succeeds.
    Load,
    /// Until the proxy may dispatch: it has observed the readiness, and a gateway in between accepts requests.
    Propagate,
    /// Until the first held request is sent.
    Dispatch,
    /// Until the first byte of its response.
    FirstByte,
    /// Until the first token of that response, if it is streamed.
    FirstToken,
}

/// A part of a phase. Parts do not overlap and need not fill their phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[derive(IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Part {
    /// Creation of a node for the pod, in [`Phase::Schedule`].
    NodeCreate,
    /// Time until that node is ready, in [`Phase::Schedule`].
    NodeReady,
    /// Startup of the model server before it loads the model, in [`Phase::Load`] as are all below.
    EngineStart,
    /// Download of the weights.
    WeightsDownload,
    /// Loading of the weights.
    Weights,
    /// Compilation of the model.
    Compile,
    /// Profiling, KV cache allocation, graph capture and the first forward pass.
    Warmup,
    /// Startup of the HTTP server once the engine is ready.
    ServerStart,
}

// === impl Phase ===

impl Phase {
    /// All phases, in order.
    pub const ALL: [Self; Self::VARIANTS.len()] = *Self::VARIANTS.first_chunk().unwrap();

    /// Returns the name used in metrics, records and heartbeats.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Returns whether the phase precedes the first dispatch.
    pub fn is_activation(self) -> bool {
        self <= Self::Propagate
    }
}

// === impl Part ===

impl Part {
    /// All parts, in order.
    pub const ALL: [Self; Self::VARIANTS.len()] = *Self::VARIANTS.first_chunk().unwrap();

    /// Returns the name used in records.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Returns the phase that contains the part.
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
