//! The running cold start: phases ended by this proxy, and observations of the cluster.

use std::{sync::Arc, time::SystemTime};

use tokio::time::Instant;

use crate::{
    coldstart::{ColdStart, ColdStartKind, Phase, timeline::Timeline},
    state::{Observation, PartObservation, PodStart},
};

/// The kind of a target, which determines its phases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetKind {
    /// A server that is started elsewhere.
    #[default]
    Url,
    /// A process that this proxy starts.
    Process,
    /// Pods.
    Cluster,
}

pub(super) struct ActiveColdStart {
    pub(super) id: u64,
    pub(super) began: Instant,
    pub(super) wall: SystemTime,
    /// Ends of phases by this proxy's own action, in order.
    pub(super) ends: Vec<(Phase, Instant)>,
    pub(super) parts: Vec<PartObservation>,
    /// Address of the first ready endpoint.
    pub(super) first_address: Option<Arc<str>>,
    pub(super) obstacle: Option<Arc<str>>,
    pub(super) request_id: Option<Arc<str>>,
    pub(super) trace_id: Option<Arc<str>>,
    pub(super) is_traced: bool,
}

/// A cold start that has ended.
pub(super) struct EndedColdStart {
    pub(super) began: Instant,
    pub(super) record: ColdStart,
}

/// Reports from outside this proxy. They outlive a cold start, since some arrive before the cold start to which they
/// belong.
#[derive(Default)]
pub(super) struct Observations {
    pub(super) target: TargetKind,
    pub(super) kind: ColdStartKind,
    pub(super) ends: Vec<(Phase, Observation)>,
    pub(super) pods: Vec<PodStart>,
}

// === impl ActiveColdStart ===

impl ActiveColdStart {
    pub(super) fn new(id: u64, began: Instant, wall: SystemTime) -> Self {
        Self {
            id,
            began,
            wall,
            ends: Vec::with_capacity(Phase::ALL.len()),
            parts: Vec::new(),
            first_address: None,
            obstacle: None,
            request_id: None,
            trace_id: None,
            is_traced: false,
        }
    }

    pub(super) fn mark(&mut self, phase: Phase) {
        if self.ends.last().is_none_or(|(last, _)| *last < phase) {
            self.ends.push((phase, Instant::now()));
        }
    }

    /// Returns true once an answer has begun; at most its first token is missing.
    pub(super) fn is_answered(&self) -> bool {
        self.ends.last().is_some_and(|(last, _)| *last >= Phase::FirstByte)
    }

    /// Returns true once the load has ended, by our own probe or as observed in the cluster.
    pub(super) fn is_loaded(&self, observations: &Observations) -> bool {
        let of_pod = || observations.pod(self).into_iter().flat_map(|pod| &pod.moments);
        self.ends.iter().any(|(phase, _)| *phase == Phase::Load)
            || of_pod().any(|(phase, seen)| *phase == Phase::Load && seen.at >= self.began)
    }

    pub(super) fn timeline<'a>(
        &'a self,
        observations: &'a Observations,
        pod: Option<&'a PodStart>,
    ) -> Timeline<'a> {
        let of_pod = pod.into_iter().flat_map(|pod| &pod.moments);
        let observed = of_pod.chain(&observations.ends).map(|(phase, seen)| (*phase, seen)).collect();
        let parts = self.parts.iter().chain(pod.into_iter().flat_map(|pod| &pod.parts)).collect();
        Timeline { began: self.began, wall: self.wall, own_marks: &self.ends, observed, parts, running: None }
    }

    /// Returns the running phase, and its start.
    pub(super) fn running(&self, observations: &Observations) -> (Phase, Instant) {
        let pod = observations.pod(self);
        let of_pod = pod.into_iter().flat_map(|pod| &pod.moments);
        let seen = of_pod.chain(&observations.ends).map(|(phase, seen)| (*phase, seen.at));
        let ended = seen.filter(|(_, at)| *at >= self.began).chain(self.ends.iter().copied());
        let (last, since) =
            ended.max_by_key(|(phase, _)| *phase).map_or((None, self.began), |(last, at)| (Some(last), at));
        let is_pulling = pod.is_some_and(|pod| pod.is_pulling);
        let mut later = Phase::ALL.into_iter().filter(|phase| last.is_none_or(|last| *phase > last));
        let next = later.find(|phase| observations.has(*phase) && (*phase != Phase::Pull || is_pulling));
        (next.unwrap_or(Phase::FirstToken), since)
    }
}

// === impl Observations ===

impl Observations {
    /// Returns true if the cold start has this phase. A sleeping process is not started.
    fn has(&self, phase: Phase) -> bool {
        self.target.has(phase) && (self.kind == ColdStartKind::ColdStart || phase != Phase::Start)
    }

    /// Returns the pod that the record names: that of the first ready endpoint, else the pod that has advanced
    /// furthest.
    pub(super) fn pod(&self, active: &ActiveColdStart) -> Option<&PodStart> {
        if let Some(first) = &active.first_address {
            // Addresses are compared without the port, since a pod may have several.
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

// === impl TargetKind ===

impl TargetKind {
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
