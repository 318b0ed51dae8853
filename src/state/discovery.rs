//! What the cluster says of a target's pods, for who looks after its endpoints.

use std::{fmt, sync::Arc};

use tokio::sync::watch;

use super::PodStart;
use crate::domain::{ClusterTarget, ObstacleKind, Role};

/// Finds the pods of targets.
pub trait Discovery: Send + Sync {
    /// Follows the pods of a target. Before anything is known, and where nothing can be, [`Discovered::is_synced`] is
    /// false.
    fn watch(&self, target: &ClusterTarget) -> watch::Receiver<Arc<Discovered>>;
}

/// The pods of a target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Discovered {
    /// Whether the cluster has been heard: without that, no endpoints means nothing.
    pub is_synced: bool,
    /// The pods that could take requests now or later, each address once, sorted by address.
    pub endpoints: Vec<DiscoveredEndpoint>,
    /// Addresses of pods that have ended, or whose objects have while they were terminating, the last ones. Nothing that is
    /// in flight there will be answered.
    pub dead: Vec<Arc<str>>,
    /// Why there are none although there could be some, such as a Service that does not exist.
    pub problem: Option<Problem>,
    /// What selects the pods, once that is known.
    pub selection: Option<Arc<Selection>>,
    /// How those of them came into being that were not up when they were first heard of, by name.
    pub starts: Vec<Arc<PodStart>>,
}

/// Why a target has no pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What stands in the way, if it is known to last until somebody changes it.
    pub kind: Option<ObstacleKind>,
    /// A sentence that names the object.
    pub text: Arc<str>,
}

/// What says which pods a target has and where they listen, in words for reasons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Kind and name.
    pub name: Arc<str>,
    /// The labels that it selects pods by, if it does.
    pub selector: Option<Arc<str>>,
    /// How many pods it selects, without those that are over.
    pub pods: usize,
    /// What it says of ports, and which ones its pods expose.
    pub ports: Arc<str>,
    /// Whether each of the pods has a readiness probe, so that ready means more than started.
    pub is_probed: bool,
}

/// A pod of a target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiscoveredEndpoint {
    /// `ip:port`, to connect to.
    pub address: Arc<str>,
    /// How it wants to be spoken to.
    pub protocol: Protocol,
    /// Whether its own probes say that it takes requests.
    pub ready: bool,
    /// Whether it is about to go: what is in flight finishes, nothing new is sent.
    pub terminating: bool,
    /// Whether a readiness gate that it declares is not met: until then its own answer does not make it ready.
    pub gated: bool,
    /// What it is for.
    pub role: Role,
}

/// How an endpoint wants to be spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 without TLS, with prior knowledge: `appProtocol: kubernetes.io/h2c`.
    H2c,
}

// === impl Problem ===

impl Problem {
    /// One that stays until somebody changes something.
    pub fn lasting(kind: ObstacleKind, text: impl Into<Arc<str>>) -> Self {
        Self { kind: Some(kind), text: text.into() }
    }

    /// One that may be over soon.
    pub fn passing(text: impl Into<Arc<str>>) -> Self {
        Self { kind: None, text: text.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Where there is no cluster.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDiscovery;

impl Discovery for NoDiscovery {
    fn watch(&self, _: &ClusterTarget) -> watch::Receiver<Arc<Discovered>> {
        watch::Sender::default().subscribe()
    }
}
