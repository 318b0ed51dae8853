//! How the pods of a target come into being, as the cluster says it: for the record of a cold start.
//!
//! Moments are when we saw them, with what the cluster says of when they were. Pods come from the watch that endpoints
//! are found with; Events, nodes and logs are followed only while a pod starts.

mod events;
mod load;
mod logs;
mod nodes;
mod read;
mod starting;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures_util::{
    StreamExt,
    stream::{BoxStream, SelectAll},
};
use k8s_openapi::api::core::v1::{Event, Pod};
use tokio::time::Instant;

use super::{Cluster, pod_reasons::is_over};
use crate::{
    domain::Phase,
    state::{DiscoveredEndpoint, PodStart},
};
use events::PodEvents;
use logs::{Line, PodLogs};
use nodes::{NewNodes, Nodes};
pub(super) use read::{CONTROL_PLANE, stamp};
use starting::Starting;

/// Where else something is said of pods that start.
pub(super) struct Sources {
    events: PodEvents,
    nodes: Nodes,
    logs: PodLogs,
}

/// The pods of a target that start, or have not long since.
pub(super) struct Starts {
    sources: Arc<Sources>,
    /// By their uid; nothing of those that were up when we came, or that there is no room for.
    pods: HashMap<String, Option<Starting>>,
    news: SelectAll<BoxStream<'static, (Arc<str>, News)>>,
    /// As long as one of them waits for a node.
    nodes: Option<NewNodes>,
    /// Whether all that there was when we came is known.
    is_synced: bool,
}

/// What is heard of a pod, besides the pod itself.
enum News {
    Event(Box<Event>),
    Line(Line),
}

/// How many pods of a target are told of at most. A cold start is about the one that is ready first.
const MOST: usize = 64;

// === impl Sources ===

impl Sources {
    pub(super) fn new(cluster: &Cluster) -> Arc<Self> {
        Arc::new(Self {
            events: PodEvents::new(cluster.clone()),
            nodes: Nodes::new(cluster.clone()),
            logs: PodLogs::new(cluster.clone()),
        })
    }
}

// === impl Starts ===

impl Starts {
    /// Nothing is known yet.
    pub(super) fn new(sources: Arc<Sources>) -> Self {
        Self { sources, pods: HashMap::new(), news: SelectAll::new(), nodes: None, is_synced: false }
    }

    /// These are the pods now, and the endpoints that were found. `is_synced`: all of them, so that another one is new.
    /// `ports`: where a pod serves.
    pub(super) fn update(
        &mut self,
        pods: &[Arc<Pod>],
        found: &[DiscoveredEndpoint],
        is_synced: bool,
        ports: impl Fn(&Pod) -> Vec<u16>,
    ) {
        let at = Instant::now();
        // What has failed or is being deleted starts no more: the phase is that of the pods that come in its place.
        let pods = || pods.iter().filter(|pod| !is_over(pod));
        let there: HashSet<_> = pods().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        self.pods.retain(|uid, _| there.contains(&**uid));
        for pod in pods() {
            let Some(uid) = &pod.metadata.uid else { continue };
            if !self.pods.contains_key(uid) {
                let was_up = !self.is_synced && read::is_ready(pod);
                let starts = !was_up && self.has_room();
                self.pods.insert(uid.clone(), starts.then(|| Starting::new(pod.clone(), &ports(pod))));
            }
            let Some(Some(starting)) = self.pods.get_mut(uid) else { continue };
            starting.pod = pod.clone();
            starting.look(at);
            if starting.waits() {
                self.nodes.get_or_insert_with(|| self.sources.nodes.watch());
            }
            self.news.extend(starting.follow(uid, &self.sources));
            starting.look_at_nodes(self.nodes.as_ref());
            if starting.address.is_none() {
                starting.address = read::address(pod, &ports(pod), found);
            }
            starting.tell();
        }
        self.is_synced |= is_synced;
        if !self.pods.values().flatten().any(Starting::waits) {
            self.nodes = None;
        }
    }

    /// Whether another one may be told of: if need be, instead of the one that has been ready for longest.
    fn has_room(&mut self) -> bool {
        let ready = |starting: &Starting| starting.seen_at(Phase::Load);
        if self.pods.values().flatten().count() < MOST {
            return true;
        }
        let known = self.pods.values_mut().filter(|known| known.as_ref().and_then(ready).is_some());
        match known.min_by_key(|known| known.as_ref().and_then(ready)) {
            Some(oldest) => {
                *oldest = None;
                true
            }
            None => false,
        }
    }

    /// What is known of them, by name.
    pub(super) fn all(&self) -> Vec<Arc<PodStart>> {
        let mut all: Vec<_> = self.pods.values().flatten().map(|starting| starting.start.clone()).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all
    }

    /// Waits until [`Self::all`] says something else, other than by [`Self::update`]. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        loop {
            let changed = tokio::select! {
                biased; // nodes are few
                () = changed(&mut self.nodes) => {
                    let nodes = self.nodes.as_ref();
                    let waiting = self.pods.values_mut().flatten();
                    waiting.fold(false, |changed, starting| {
                        starting.look_at_nodes(nodes);
                        starting.tell() || changed
                    })
                }
                Some((uid, news)) = self.news.next() => match self.pods.get_mut(&*uid) {
                    Some(Some(starting)) => starting.hear(news),
                    _ => false,
                },
            };
            if changed {
                return;
            }
        }
    }
}

async fn changed(nodes: &mut Option<NewNodes>) {
    match nodes {
        Some(nodes) => nodes.changed().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
