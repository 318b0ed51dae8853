//! Sources of information about starting pods.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Event;

use super::{
    events::PodEvents,
    logs::{PodLogLine, PodLogs},
    nodes::Nodes,
};
use crate::kube::Cluster;

/// Sources of information about starting pods besides the pods themselves.
pub(in crate::kube) struct StartSources {
    pub(super) events: PodEvents,
    pub(super) nodes: Nodes,
    pub(super) logs: PodLogs,
}

/// An update about a pod from a source other than the pod watch.
pub(super) enum PodUpdate {
    Event(Box<Event>),
    Line(PodLogLine),
}

// === impl StartSources ===

impl StartSources {
    pub(in crate::kube) fn new(cluster: &Cluster) -> Arc<Self> {
        Arc::new(Self {
            events: PodEvents::new(cluster.clone()),
            nodes: Nodes::new(cluster.clone()),
            logs: PodLogs::new(cluster.clone()),
        })
    }
}
