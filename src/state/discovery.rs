//! Pods of a target as the cluster reports them.

use std::{fmt, sync::Arc};

use tokio::sync::watch;

use super::PodStart;
use crate::domain::{ClusterTarget, ObstacleKind, Role};

/// Finds the pods of targets.
pub trait Discovery: Send + Sync {
    /// Watches the pods of a target. Until the first report, and without a cluster, [`Discovered::is_synced`] is false.
    fn watch(&self, target: &ClusterTarget) -> watch::Receiver<Arc<Discovered>>;
}

/// Pods of a target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Discovered {
    /// False until the cluster has reported: an empty list of endpoints means nothing before.
    pub is_synced: bool,
    /// Pods that are or may become ready, unique and sorted by address.
    pub endpoints: Vec<DiscoveredEndpoint>,
    /// The most recent addresses of pods that ended or were deleted while terminating. Requests in flight there get no
    /// response.
    pub dead: Vec<Arc<str>>,
    /// Reason for missing endpoints, such as a Service that does not exist.
    pub problem: Option<DiscoveryProblem>,
    /// Object that selects the pods, once known.
    pub selection: Option<Arc<Selection>>,
    /// Startup of pods that were not ready when first seen, by name.
    pub starts: Vec<Arc<PodStart>>,
}

/// Reason why a target has no pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryProblem {
    /// The obstacle, if it lasts until an operator acts.
    pub kind: Option<ObstacleKind>,
    /// A sentence that names the object.
    pub text: Arc<str>,
}

/// Object that selects the pods and their port, described for error messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Kind and name of the object.
    pub name: Arc<str>,
    /// Label selector, if there is one.
    pub selector: Option<Arc<str>>,
    /// Number of selected pods that have not ended.
    pub pods: usize,
    /// Ports of the object and those that its pods expose.
    pub ports: Arc<str>,
    /// True if every pod has a readiness probe; without one, Kubernetes reports a pod as ready once its containers run.
    pub is_probed: bool,
}

/// A pod of a target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiscoveredEndpoint {
    /// `ip:port`.
    pub address: Arc<str>,
    /// Protocol of the port.
    pub protocol: Protocol,
    /// True if Kubernetes reports the pod as ready.
    pub ready: bool,
    /// True if the pod is terminating: it finishes requests in flight and gets no new ones.
    pub terminating: bool,
    /// True if a readiness gate is unmet; a successful probe does not make the pod ready then.
    pub gated: bool,
    /// Role of the pod.
    pub role: Role,
}

/// Protocol of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 without TLS, with prior knowledge: `appProtocol: kubernetes.io/h2c`.
    H2c,
}

// === impl DiscoveryProblem ===

impl DiscoveryProblem {
    /// Creates a problem that lasts until an operator acts.
    pub fn lasting(kind: ObstacleKind, text: impl Into<Arc<str>>) -> Self {
        Self { kind: Some(kind), text: text.into() }
    }

    /// Creates a problem that may resolve itself.
    pub fn passing(text: impl Into<Arc<str>>) -> Self {
        Self { kind: None, text: text.into() }
    }
}

impl fmt::Display for DiscoveryProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Discovery without a cluster: never reports any pods.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDiscovery;

impl Discovery for NoDiscovery {
    fn watch(&self, _: &ClusterTarget) -> watch::Receiver<Arc<Discovered>> {
        watch::Sender::default().subscribe()
    }
}
