//! Tracks the startup of the pods of a target for the cold-start record.
//!
//! Each phase has the instant at which this process observed it, and the timestamp that the cluster reports, if any.
//! Pods come from endpoint discovery; Events, nodes and logs are read only while a pod starts.

mod events;
mod load;
mod logs;
mod nodes;
mod read;
mod sources;
mod starting;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures_util::{
    StreamExt,
    stream::{BoxStream, SelectAll},
};
use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;

use super::pod_reasons::is_over;
use crate::{
    domain::Phase,
    state::{DiscoveredEndpoint, PodStart},
};
use nodes::NewNodes;
pub(super) use read::{CONTROL_PLANE, stamp};
use sources::PodUpdate;
pub(super) use sources::StartSources;
use starting::StartingPod;

/// Starting and recently started pods of a target.
pub(super) struct StartingPods {
    sources: Arc<StartSources>,
    /// By uid. `None` for pods that were ready before discovery began, or beyond [`MAX_TRACKED_PODS`].
    pods: HashMap<String, Option<StartingPod>>,
    updates: SelectAll<BoxStream<'static, (Arc<str>, PodUpdate)>>,
    /// Present while a pod waits for a node.
    nodes: Option<NewNodes>,
    /// True if the pods that existed before discovery began are known.
    is_synced: bool,
}

/// Maximum number of pods tracked per target. A cold start depends on the first pod that is ready.
const MAX_TRACKED_PODS: usize = 64;

// === impl StartingPods ===

impl StartingPods {
    /// Starts without pods.
    pub(super) fn new(sources: Arc<StartSources>) -> Self {
        Self { sources, pods: HashMap::new(), updates: SelectAll::new(), nodes: None, is_synced: false }
    }

    /// Applies the current pods and endpoints. `is_synced` means that `pods` is complete, so that any further pod is
    /// new. `ports` returns the serving ports of a pod.
    pub(super) fn update(
        &mut self,
        pods: &[Arc<Pod>],
        found: &[DiscoveredEndpoint],
        is_synced: bool,
        ports: impl Fn(&Pod) -> Vec<u16>,
    ) {
        let at = Instant::now();
        // Failed and terminating pods no longer start; their replacements are tracked instead.
        let pods = || pods.iter().filter(|pod| !is_over(pod));
        let there: HashSet<_> = pods().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        self.pods.retain(|uid, _| there.contains(&**uid));
        for pod in pods() {
            let Some(uid) = &pod.metadata.uid else { continue };
            if !self.pods.contains_key(uid) {
                let was_up = !self.is_synced && read::is_ready(pod);
                let starts = !was_up && self.make_room();
                self.pods.insert(uid.clone(), starts.then(|| StartingPod::new(pod.clone(), &ports(pod))));
            }
            let Some(Some(starting)) = self.pods.get_mut(uid) else { continue };
            starting.pod = pod.clone();
            starting.observe(at);
            if starting.awaits_node() {
                self.nodes.get_or_insert_with(|| self.sources.nodes.watch());
            }
            self.updates.extend(starting.follow(uid, &self.sources));
            starting.observe_node(self.nodes.as_ref());
            if starting.address.is_none() {
                starting.address = read::address(pod, &ports(pod), found);
            }
            starting.publish();
        }
        self.is_synced |= is_synced;
        if !self.pods.values().flatten().any(StartingPod::awaits_node) {
            self.nodes = None;
        }
    }

    /// Returns whether another pod can be tracked, after evicting the pod that has been ready longest if the limit is
    /// reached.
    fn make_room(&mut self) -> bool {
        let ready = |starting: &StartingPod| starting.phase_end(Phase::Load);
        if self.pods.values().flatten().count() < MAX_TRACKED_PODS {
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

    /// Returns the tracked pods, sorted by name.
    pub(super) fn all(&self) -> Vec<Arc<PodStart>> {
        let mut all: Vec<_> = self.pods.values().flatten().map(|starting| starting.start.clone()).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all
    }

    /// Waits for a change to [`Self::all`] other than by [`Self::update`]. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        loop {
            let changed = tokio::select! {
                biased; // node changes are rare, so they do not starve log lines
                () = changed(&mut self.nodes) => {
                    let nodes = self.nodes.as_ref();
                    let waiting = self.pods.values_mut().flatten();
                    waiting.fold(false, |changed, starting| {
                        starting.observe_node(nodes);
                        starting.publish() || changed
                    })
                }
                Some((uid, update)) = self.updates.next() => match self.pods.get_mut(&*uid) {
                    Some(Some(starting)) => starting.apply(update),
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
