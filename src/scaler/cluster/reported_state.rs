//! The cluster's report of a pod.

use crate::state::DiscoveredEndpoint;

/// The state of a pod as reported by the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReportedState {
    /// The pod's own probes succeed.
    Ready,
    NotReady,
    /// A readiness gate of the pod is not met, so it takes no requests even if it answers probes.
    Gated,
    /// The pod gets no new requests.
    Terminating,
    /// The pod has left the target but may live, as after a change of its labels.
    Gone,
    /// The pod has ended, or its object was deleted: requests in flight get no answer.
    Dead,
}

// === impl ReportedState ===

impl From<&DiscoveredEndpoint> for ReportedState {
    fn from(endpoint: &DiscoveredEndpoint) -> Self {
        match endpoint {
            DiscoveredEndpoint { terminating: true, .. } => Self::Terminating,
            DiscoveredEndpoint { ready: true, .. } => Self::Ready,
            DiscoveredEndpoint { gated: true, .. } => Self::Gated,
            DiscoveredEndpoint { .. } => Self::NotReady,
        }
    }
}
