//! Nodes, while somebody waits for one: when a new one came, and when it was ready.

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
    watch::{Pauses, chain, is_taken_up_again},
};

/// The one watch of nodes, as long as somebody wants it.
pub(super) struct Nodes {
    cluster: Cluster,
    shared: Mutex<Weak<Watching>>,
    /// Whether it has been said that there is no right to it.
    is_denied: Arc<AtomicBool>,
}

/// The nodes as they come. The watch ends with the last of those who wait.
#[derive(Clone)]
pub(super) struct NewNodes {
    watching: Arc<Watching>,
    changes: watch::Receiver<u64>,
}

struct Watching {
    nodes: Arc<Mutex<HashMap<String, NodeSeen>>>,
    changes: watch::Receiver<u64>,
    _ends: DropGuard,
}

/// A node, as we saw it come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeSeen {
    /// Whether it was there when we first looked.
    was_there: bool,
    created: Option<Timestamp>,
    /// When we saw that it is there.
    pub(super) came: Instant,
    /// When we saw that it is ready.
    pub(super) ready: Option<Instant>,
}

// === impl Nodes ===

impl Nodes {
    pub(super) fn new(cluster: Cluster) -> Self {
        Self { cluster, shared: Mutex::default(), is_denied: Arc::default() }
    }

    /// Watches nodes. Nobody does while no pod waits for one: clusters have many, and they are large.
    pub(super) fn watch(&self) -> NewNodes {
        let mut shared = self.shared.lock();
        if let Some(watching) = shared.upgrade() {
            return NewNodes { changes: watching.changes.clone(), watching };
        }
        let (changed, changes) = watch::channel(0);
        let ending = CancellationToken::new();
        let nodes = Arc::<Mutex<HashMap<String, NodeSeen>>>::default();
        let following = follow(self.cluster.clone(), nodes.clone(), changed, self.is_denied.clone());
        let ended = ending.clone();
        self.cluster.spawn(async move {
            tokio::select! {
                biased; // nobody waits any more
                () = ended.cancelled() => {}
                () = following => {}
            }
        });
        let watching = Arc::new(Watching { nodes, changes: changes.clone(), _ends: ending.drop_guard() });
        *shared = Arc::downgrade(&watching);
        NewNodes { watching, changes }
    }
}

/// Notes nodes as they come and go, until there is no right to see them.
async fn follow(
    cluster: Cluster,
    nodes: Arc<Mutex<HashMap<String, NodeSeen>>>,
    changed: watch::Sender<u64>,
    is_denied: Arc<AtomicBool>,
) {
    let api = Api::<Node>::all(cluster.client().clone());
    // What was there is told from memory: there may be thousands.
    let config = Config::default().any_semantic();
    let mut events = std::pin::pin!(watcher(api, config).backoff(Pauses::new()));
    let (mut is_first, mut failing) = (true, false);
    while let Some(event) = events.next().await {
        let at = Instant::now();
        match event {
            Ok(Event::Init) => continue,
            Ok(Event::InitDone) => is_first = false,
            Ok(Event::InitApply(node) | Event::Apply(node)) => {
                failing = false;
                let mut nodes = nodes.lock();
                let seen = nodes.entry(node.name_any()).or_insert_with(|| NodeSeen::new(&node, is_first, at));
                seen.look(&node, at);
            }
            Ok(Event::Delete(node)) => drop(nodes.lock().remove(&node.name_any())),
            Err(Error::InitialListFailed(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                if !is_denied.swap(true, Ordering::Relaxed) {
                    tracing::info!(
                        reason = status.message,
                        "cold starts do not tell of new nodes; to have that, grant `get`, `list` and `watch` on nodes"
                    );
                }
                return;
            }
            Err(error) if is_taken_up_again(&error) => continue,
            // It is tried again with a growing pause; said once, until it goes well.
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(error = chain(&error), "nodes are not heard of");
                }
                continue;
            }
        }
        changed.send_modify(|changes| *changes += 1);
    }
}

// === impl NewNodes ===

impl NewNodes {
    /// The node of this name, if it is known.
    pub(super) fn get(&self, name: &str) -> Option<NodeSeen> {
        self.watching.nodes.lock().get(name).copied()
    }

    /// Waits until something has changed since the last call, for ever if we may not know. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

// === impl NodeSeen ===

impl NodeSeen {
    fn new(node: &Node, was_there: bool, at: Instant) -> Self {
        let created = node.metadata.creation_timestamp.as_ref().map(|time| time.0);
        Self { was_there, created, came: at, ready: None }
    }

    fn look(&mut self, node: &Node, at: Instant) {
        let mut conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let is_ready = conditions.any(|it| it.type_ == "Ready" && it.status == "True");
        if is_ready {
            self.ready.get_or_insert(at);
        }
    }

    /// Whether it was made after a pod that was created then: it was not there when we looked, or says so itself, by the
    /// same clock.
    pub(super) fn is_newer_than(&self, pod: Option<Timestamp>) -> bool {
        !self.was_there || self.created.zip(pod).is_some_and(|(node, pod)| node > pod)
    }
}
