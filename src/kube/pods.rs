//! Shared pod watches: routes with equal namespace and selector share one watch.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, PodStatus, Probe};
use kube::api::ObjectMeta;

use super::{
    Cluster,
    informer::{Informers, ObjectSelector, Subset},
};

/// Active pod watches, keyed by namespace and selector.
pub struct PodWatches(Informers<Pod>);

/// Current pods matching one selector. The watch ends with the last clone.
#[derive(Clone)]
pub struct PodsOf(Subset<Pod>);

// === impl PodWatches ===

impl PodWatches {
    /// Starts without a watch.
    pub fn new(cluster: Cluster) -> Arc<Self> {
        Arc::new(Self(Informers::new(cluster, trim)))
    }

    /// Watches the pods of a namespace that match the selector `labels` (`a=b,c in (d, e)`). Keeps only the fields
    /// used for readiness and failure reasons.
    pub fn watch(&self, namespace: &str, labels: &str) -> PodsOf {
        PodsOf(self.0.watch(namespace, ObjectSelector::of(labels)))
    }
}

/// Drops most of a pod: volumes, environments and probes make up most of its size.
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
        // Only the presence of a probe matters: without one, `Ready` means little.
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

/// Annotations listing the active ports of a pod, in order of precedence.
pub(super) const ACTIVE_PORTS: [&str; 2] =
    ["llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports"];

/// Returns the pod's IP addresses, the primary one first.
pub(super) fn addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> {
    let status = pod.status.as_ref();
    let primary = status.and_then(|status| status.pod_ip.as_deref());
    let all = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
    primary.into_iter().chain(all.iter().map(|ip| &*ip.ip)).filter_map(|ip| ip.parse().ok())
}

fn active_ports(mut annotations: BTreeMap<String, String>) -> Option<BTreeMap<String, String>> {
    annotations.retain(|name, _| ACTIVE_PORTS.contains(&&**name));
    Some(annotations).filter(|annotations| !annotations.is_empty())
}

// === impl PodsOf ===

impl PodsOf {
    /// Returns the current pods.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.0.all()
    }

    /// Waits for a change since the last call. Cancel-safe.
    pub async fn changed(&mut self) {
        self.0.changed().await;
    }

    /// Returns whether the initial list has completed.
    pub fn is_synced(&self) -> bool {
        self.0.is_synced()
    }
}
