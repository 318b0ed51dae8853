//! Watches nodes while a pod waits for one, to record the creation and readiness of new nodes.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, ResourceExt as _,
    runtime::{
        WatchStreamExt,
        watcher::{Config, Error, Event, watcher},
    },
};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::kube::{
    Cluster,
    error_chain::error_chain,
    watch::{WatchBackoff, is_resumed},
};

/// The node watch shared by all targets; active only while a pod waits for a node.
pub(super) struct Nodes {
    cluster: Cluster,
    shared: Mutex<Weak<ActiveWatch>>,
    /// Set once missing permission has been logged.
    is_denied: Arc<AtomicBool>,
}

/// A reference to the active node watch. The watch ends with the last clone.
#[derive(Clone)]
pub(super) struct NewNodes {
    watching: Arc<ActiveWatch>,
    changes: watch::Receiver<u64>,
}

struct ActiveWatch {
    nodes: Arc<Mutex<HashMap<String, NodeObservation>>>,
    changes: watch::Receiver<u64>,
    _cancel: DropGuard,
}

/// Observed lifecycle of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeObservation {
    /// True if the node existed when the watch began.
    pre_existing: bool,
    created: Option<Timestamp>,
    /// First observation.
    pub(super) first_seen: Instant,
    /// First observation as ready.
    pub(super) ready: Option<Instant>,
}

// === impl Nodes ===

impl Nodes {
    pub(super) fn new(cluster: Cluster) -> Self {
        Self { cluster, shared: Mutex::default(), is_denied: Arc::default() }
    }

    /// Joins the active watch, or begins one. Nodes are numerous and large, so none runs while no pod waits.
    pub(super) fn watch(&self) -> NewNodes {
        let mut shared = self.shared.lock();
        if let Some(watching) = shared.upgrade() {
            return NewNodes { changes: watching.changes.clone(), watching };
        }
        let (changed, changes) = watch::channel(0);
        let ending = CancellationToken::new();
        let nodes = Arc::<Mutex<HashMap<String, NodeObservation>>>::default();
        let following = follow(self.cluster.clone(), nodes.clone(), changed, self.is_denied.clone());
        let ended = ending.clone();
        self.cluster.spawn(async move {
            tokio::select! {
                biased; // stop first: no pod waits for a node any more
                () = ended.cancelled() => {}
                () = following => {}
            }
        });
        let watching =
            Arc::new(ActiveWatch { nodes, changes: changes.clone(), _cancel: ending.drop_guard() });
        *shared = Arc::downgrade(&watching);
        NewNodes { watching, changes }
    }
}

/// Records nodes until the API server denies permission.
async fn follow(
    cluster: Cluster,
    nodes: Arc<Mutex<HashMap<String, NodeObservation>>>,
    changed: watch::Sender<u64>,
    is_denied: Arc<AtomicBool>,
) {
    let api = Api::<Node>::all(cluster.client().clone());
    // Clusters may have thousands of nodes, so the initial list may come from the API server's cache.
    let config = Config::default().any_semantic();
    let mut events = std::pin::pin!(watcher(api, config).backoff(WatchBackoff::new()));
    let (mut is_first, mut failing) = (true, false);
    while let Some(event) = events.next().await {
        let at = Instant::now();
        match event {
            Ok(Event::Init) => continue,
            Ok(Event::InitDone) => is_first = false,
            Ok(Event::InitApply(node) | Event::Apply(node)) => {
                failing = false;
                let mut nodes = nodes.lock();
                let seen =
                    nodes.entry(node.name_any()).or_insert_with(|| NodeObservation::new(&node, is_first, at));
                seen.observe(&node, at);
            }
            Ok(Event::Delete(node)) => drop(nodes.lock().remove(&node.name_any())),
            Err(Error::InitialListFailed(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                if !is_denied.swap(true, Ordering::Relaxed) {
                    tracing::info!(
                        reason = status.message,
                        "cold starts are recorded without new nodes; grant `get`, `list` and `watch` on nodes to include them"
                    );
                }
                return;
            }
            Err(error) if is_resumed(&error) => continue,
            // The watcher retries with backoff; log only the first failure.
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(error = error_chain(&error), "node watch failed; retrying");
                }
                continue;
            }
        }
        changed.send_modify(|changes| *changes += 1);
    }
}

// === impl NewNodes ===

impl NewNodes {
    /// Returns the node `name`, if known.
    pub(super) fn get(&self, name: &str) -> Option<NodeObservation> {
        self.watching.nodes.lock().get(name).copied()
    }

    /// Waits for a change since the last call, or forever without permission. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

// === impl NodeObservation ===

impl NodeObservation {
    fn new(node: &Node, pre_existing: bool, at: Instant) -> Self {
        let created = node.metadata.creation_timestamp.as_ref().map(|time| time.0);
        Self { pre_existing, created, first_seen: at, ready: None }
    }

    fn observe(&mut self, node: &Node, at: Instant) {
        let mut conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let is_ready = conditions.any(|it| it.type_ == "Ready" && it.status == "True");
        if is_ready {
            self.ready.get_or_insert(at);
        }
    }

    /// Returns whether the node is newer than a pod created at `pod`: it appeared during the watch, or its
    /// `creationTimestamp` is later by the same clock.
    pub(super) fn is_newer_than(&self, pod: Option<Timestamp>) -> bool {
        !self.pre_existing || self.created.zip(pod).is_some_and(|(node, pod)| node > pod)
    }
}
