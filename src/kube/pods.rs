//! Pods by their labels: one watch for all who ask for the same ones.

use std::{
    collections::HashMap,
    ops::{Deref, DerefMut},
    sync::{Arc, Weak},
};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, PodStatus};
use kube::{api::ObjectMeta, runtime::watcher};
use parking_lot::Mutex;

use super::{Cluster, Watched};

/// The watches of pods that somebody needs.
pub struct Pods {
    cluster: Cluster,
    shared: Mutex<HashMap<Selection, Weak<Watched<Pod>>>>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Selection {
    namespace: String,
    labels: String,
}

/// Some pods, as they are known now. The watch ends with the last of those who asked for them.
#[derive(Clone)]
pub struct PodsOf {
    pods: Watched<Pod>,
    _shared: Arc<Watched<Pod>>,
}

// === impl Pods ===

impl Pods {
    /// None are watched yet.
    pub fn new(cluster: Cluster) -> Arc<Self> {
        Arc::new(Self { cluster, shared: Mutex::default() })
    }

    /// Follows the pods of a namespace that `labels` selects (`a=b,c in (d, e)`), trimmed to what tells whether they
    /// serve and why not: names, labels, owners and times of the metadata; ports of the containers, the node; of the
    /// status the phase, conditions, addresses and states of the containers.
    pub fn watch(&self, namespace: &str, labels: &str) -> PodsOf {
        let selection = Selection { namespace: namespace.into(), labels: labels.into() };
        let mut all = self.shared.lock();
        if let Some(shared) = all.get(&selection).and_then(Weak::upgrade) {
            return PodsOf { pods: Watched::clone(&shared), _shared: shared };
        }
        all.retain(|_, shared| shared.strong_count() > 0);
        let config = watcher::Config::default().labels(labels);
        let pods = self.cluster.watch_in(vec![self.cluster.api(namespace)], config, trim);
        let shared = Arc::new(pods.clone());
        all.insert(selection, Arc::downgrade(&shared));
        PodsOf { pods, _shared: shared }
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
        owner_references: meta.owner_references,
        creation_timestamp: meta.creation_timestamp,
        deletion_timestamp: meta.deletion_timestamp,
        ..ObjectMeta::default()
    };
    let container = |container: Container| Container {
        name: container.name,
        ports: container.ports,
        restart_policy: container.restart_policy,
        ..Container::default()
    };
    pod.spec = pod.spec.take().map(|spec| PodSpec {
        node_name: spec.node_name,
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

// === impl PodsOf ===

impl Deref for PodsOf {
    type Target = Watched<Pod>;

    fn deref(&self) -> &Watched<Pod> {
        &self.pods
    }
}

impl DerefMut for PodsOf {
    fn deref_mut(&mut self) -> &mut Watched<Pod> {
        &mut self.pods
    }
}
