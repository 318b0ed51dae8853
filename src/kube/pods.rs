//! Pods by their labels: one watch for all who ask for the same ones.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, PodStatus, Probe};
use kube::api::ObjectMeta;

use super::{
    Cluster,
    parts::{Part, Parts, Select},
};

/// The watches of pods that somebody needs.
pub struct Pods(Parts<Pod>);

/// Some pods, as they are known now. Their watch ends with the last of those who asked for them.
#[derive(Clone)]
pub struct PodsOf(Part<Pod>);

// === impl Pods ===

impl Pods {
    /// None are watched yet.
    pub fn new(cluster: Cluster) -> Arc<Self> {
        Arc::new(Self(Parts::new(cluster, trim)))
    }

    /// Follows the pods of a namespace that `labels` selects (`a=b,c in (d, e)`), trimmed to what tells whether they
    /// serve and why not: names, labels, owners and times of the metadata, and which ports are active; ports of the
    /// containers, readiness gates, the node; of the status the phase, conditions, addresses and states of the containers.
    pub fn watch(&self, namespace: &str, labels: &str) -> PodsOf {
        PodsOf(self.0.watch(namespace, Select::of(labels)))
    }
}

/// What is left is a small part of a pod: volumes, environments and probes are most of it.
fn trim(pod: &mut Pod) {
    let meta = std::mem::take(&mut pod.metadata);
    pod.metadata = ObjectMeta {
        name: meta.name,
        namespace: meta.namespace,
        uid: meta.uid,
        resource_version: meta.resource_version,
        labels: meta.labels,
        annotations: meta.annotations.and_then(active_ports),
        owner_references: meta.owner_references,
        creation_timestamp: meta.creation_timestamp,
        deletion_timestamp: meta.deletion_timestamp,
        ..ObjectMeta::default()
    };
    let container = |container: Container| Container {
        name: container.name,
        ports: container.ports,
        // That there is one tells what ready means.
        readiness_probe: container.readiness_probe.map(|_| Probe::default()),
        restart_policy: container.restart_policy,
        ..Container::default()
    };
    pod.spec = pod.spec.take().map(|spec| PodSpec {
        node_name: spec.node_name,
        readiness_gates: spec.readiness_gates,
        containers: spec.containers.into_iter().map(container).collect(),
        init_containers: spec.init_containers.map(|all| all.into_iter().map(container).collect()),
        ..PodSpec::default()
    });
    pod.status = pod.status.take().map(|status| PodStatus {
        phase: status.phase,
        reason: status.reason,
        message: status.message,
        conditions: status.conditions,
        pod_ip: status.pod_ip,
        pod_ips: status.pod_ips,
        container_statuses: status.container_statuses,
        init_container_statuses: status.init_container_statuses,
        ..PodStatus::default()
    });
}

/// The annotations that say which ports of a pod are active, the newer one first.
pub(super) const ACTIVE_PORTS: [&str; 2] =
    ["llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports"];

fn active_ports(mut annotations: BTreeMap<String, String>) -> Option<BTreeMap<String, String>> {
    annotations.retain(|name, _| ACTIVE_PORTS.contains(&&**name));
    Some(annotations).filter(|annotations| !annotations.is_empty())
}

// === impl PodsOf ===

impl PodsOf {
    /// The pods that are known now.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.0.all()
    }

    /// Waits until something has changed since the last call. Cancel-safe.
    pub async fn changed(&mut self) {
        self.0.changed().await;
    }

    /// Whether all that there are have been listed once.
    pub fn is_synced(&self) -> bool {
        self.0.is_synced()
    }
}
