//! What is known of a cold start while it runs: by our own doing, and by the word of others.

use std::{sync::Arc, time::SystemTime};

use tokio::time::Instant;

use super::super::{ColdStartKind, Phase, timeline::Known};
use crate::state::{PartSeen, PodStart, Seen};

/// Which phases a target has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// Somebody else brings it up, out of our sight.
    #[default]
    Url,
    /// A process of ours.
    Process,
    /// Pods.
    Cluster,
}

pub(super) struct Active {
    pub(super) id: u64,
    pub(super) began: Instant,
    pub(super) wall: SystemTime,
    pub(super) ends: Vec<(Phase, Instant)>,
    pub(super) parts: Vec<PartSeen>,
    /// Where the first endpoint that was ready is.
    pub(super) first: Option<Arc<str>>,
    pub(super) hindrance: Option<Arc<str>>,
    pub(super) request_id: Option<Arc<str>>,
    pub(super) trace_id: Option<Arc<str>>,
    pub(super) is_traced: bool,
}

#[derive(Default)]
pub(super) struct Observed {
    pub(super) scope: Scope,
    pub(super) kind: ColdStartKind,
    pub(super) seen: Vec<(Phase, Seen)>,
    pub(super) pods: Vec<PodStart>,
}

// === impl Active ===

impl Active {
    pub(super) fn mark(&mut self, phase: Phase) {
        if self.ends.last().is_none_or(|(last, _)| *last < phase) {
            self.ends.push((phase, Instant::now()));
        }
    }

    /// Whether an answer has begun, of which only the first token may come yet.
    pub(super) fn is_answered(&self) -> bool {
        self.ends.last().is_some_and(|(last, _)| *last >= Phase::FirstByte)
    }

    /// Whether the load is over, by our own probe or by the word of the cluster.
    pub(super) fn is_loaded(&self, observed: &Observed) -> bool {
        let of_pod = || observed.pod(self).into_iter().flat_map(|pod| &pod.moments);
        self.ends.iter().any(|(phase, _)| *phase == Phase::Load)
            || of_pod().any(|(phase, seen)| *phase == Phase::Load && seen.at >= self.began)
    }

    pub(super) fn known<'a>(&'a self, observed: &'a Observed, pod: Option<&'a PodStart>) -> Known<'a> {
        let of_pod = pod.into_iter().flat_map(|pod| &pod.moments);
        let seen = of_pod.chain(&observed.seen).map(|(phase, seen)| (*phase, seen)).collect();
        let parts = self.parts.iter().chain(pod.into_iter().flat_map(|pod| &pod.parts)).collect();
        Known { began: self.began, wall: self.wall, ours: &self.ends, seen, parts, running: None }
    }

    /// The phase that runs, and since when.
    pub(super) fn running(&self, observed: &Observed) -> (Phase, Instant) {
        let pod = observed.pod(self);
        let of_pod = pod.into_iter().flat_map(|pod| &pod.moments);
        let seen = of_pod.chain(&observed.seen).map(|(phase, seen)| (*phase, seen.at));
        let over = seen.filter(|(_, at)| *at >= self.began).chain(self.ends.iter().copied());
        let (last, since) =
            over.max_by_key(|(phase, _)| *phase).map_or((None, self.began), |(last, at)| (Some(last), at));
        let is_pulling = pod.is_some_and(|pod| pod.is_pulling);
        let mut to_come = Phase::ALL.into_iter().filter(|phase| last.is_none_or(|last| *phase > last));
        let next = to_come.find(|phase| observed.has(*phase) && (*phase != Phase::Pull || is_pulling));
        (next.unwrap_or(Phase::FirstToken), since)
    }
}

// === impl Observed ===

impl Observed {
    /// Whether there is such a phase. What sleeps runs already.
    pub(super) fn has(&self, phase: Phase) -> bool {
        self.scope.has(phase) && (self.kind == ColdStartKind::ColdStart || phase != Phase::Start)
    }

    /// The pod that is told of: that of the endpoint which was ready first, or else the one that has come furthest.
    pub(super) fn pod(&self, active: &Active) -> Option<&PodStart> {
        if let Some(first) = &active.first {
            // A pod may have several ports.
            let ip = |address: &str| address.rsplit_once(':').map(|(ip, _)| ip.to_owned());
            let is_first = |pod: &&PodStart| pod.address.as_deref().and_then(ip) == ip(first);
            return self.pods.iter().find(is_first);
        }
        let furthest = |pod: &&PodStart| {
            let of_this = pod.moments.iter().filter(|(_, seen)| seen.at >= active.began);
            of_this.map(|(phase, _)| *phase).max()
        };
        self.pods.iter().filter(|pod| furthest(pod).is_some()).max_by_key(furthest)
    }
}

// === impl Scope ===

impl Scope {
    /// Whether a target of this kind has such a phase.
    fn has(self, phase: Phase) -> bool {
        match phase {
            Phase::Scale | Phase::Create | Phase::Schedule | Phase::Pull | Phase::Propagate => {
                self == Self::Cluster
            }
            Phase::Start => self != Self::Url,
            _ => true,
        }
    }
}
