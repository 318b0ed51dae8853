//! What the cluster says of a target's pods, for who looks after its endpoints.

use std::sync::Arc;

use tokio::sync::watch;

use super::PodStart;
use crate::domain::{ClusterTarget, Role};

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
    /// Why there are none although there could be some, such as a Service that does not exist.
    pub problem: Option<Arc<str>>,
    /// How those of them came into being that were not up when they were first heard of, by name.
    pub starts: Vec<Arc<PodStart>>,
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

/// Where there is no cluster.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDiscovery;

impl Discovery for NoDiscovery {
    fn watch(&self, _: &ClusterTarget) -> watch::Receiver<Arc<Discovered>> {
        watch::Sender::default().subscribe()
    }
}
