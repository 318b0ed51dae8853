//! State of one starting pod.

use std::sync::Arc;

use futures_util::{StreamExt, stream::BoxStream};
use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    load::LoadLog,
    logs::ContainerRef,
    nodes::NewNodes,
    read::{self, KubeletEvents},
    sources::{PodUpdate, StartSources},
};
use crate::{
    domain::{Part, Phase},
    state::{Observation, PartObservation, PodStart},
};

/// A starting pod, with the data gathered from all sources.
pub(super) struct StartingPod {
    pub(super) pod: Arc<Pod>,
    /// Name of the serving container.
    serving: Option<String>,
    /// Address of the pod's endpoint, once discovered.
    pub(super) address: Option<Arc<str>>,
    phases: Vec<(Phase, Observation)>,
    kubelet: KubeletEvents,
    parts: Vec<PartObservation>,
    /// True if the pod was ever unschedulable.
    was_unschedulable: bool,
    /// Restart count of the container run whose log is read.
    logged_run: Option<i32>,
    load: LoadLog,
    /// Ends the event stream when dropped.
    event_guard: Option<DropGuard>,
    /// Ends the log stream when dropped.
    log_guard: Option<DropGuard>,
    pub(super) start: Arc<PodStart>,
}

// === impl StartingPod ===

impl StartingPod {
    pub(super) fn new(pod: Arc<Pod>, ports: &[u16]) -> Self {
        let serving = read::serving_container(&pod, ports).map(str::to_owned);
        let meta = &pod.metadata;
        let name = [&meta.namespace, &meta.name].map(|part| part.as_deref().unwrap_or_default()).join("/");
        Self {
            serving,
            address: None,
            phases: Vec::new(),
            kubelet: KubeletEvents::default(),
            parts: Vec::new(),
            was_unschedulable: false,
            logged_run: None,
            load: LoadLog::default(),
            event_guard: None,
            log_guard: None,
            start: Arc::new(PodStart { name: name.into(), ..PodStart::default() }),
            pod,
        }
    }

    pub(super) fn phase_end(&self, phase: Phase) -> Option<Instant> {
        self.phases.iter().find(|(known, _)| *known == phase).map(|(_, seen)| seen.at)
    }

    /// Applies the current status of the pod.
    pub(super) fn observe(&mut self, at: Instant) {
        for (phase, seen) in read::phases(&self.pod, self.serving.as_deref(), at) {
            self.record_phase(phase, seen);
        }
        self.was_unschedulable |= read::waits_for_a_node(&self.pod);
    }

    /// Records the end of a phase. The first report wins; a later one may add a missing timestamp.
    fn record_phase(&mut self, phase: Phase, seen: Observation) {
        match self.phases.iter_mut().find(|(known, _)| *known == phase) {
            Some((_, known)) => known.stamp = known.stamp.take().or(seen.stamp),
            None => self.phases.push((phase, seen)),
        }
    }

    /// Returns whether node updates are still relevant. Node and pod updates are not ordered, so this lasts until the
    /// container starts.
    pub(super) fn awaits_node(&self) -> bool {
        self.was_unschedulable && self.phase_end(Phase::Start).is_none()
    }

    pub(super) fn observe_node(&mut self, nodes: Option<&NewNodes>) {
        if !self.awaits_node() {
            return;
        }
        let created = self.pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let node = read::node(&self.pod).and_then(|node| nodes?.get(node));
        let Some(node) = node.filter(|node| node.is_newer_than(created)) else { return };
        upsert(
            &mut self.parts,
            PartObservation { part: Part::NodeCreate, start: None, end: node.first_seen },
        );
        if let Some(ready) = node.ready {
            upsert(&mut self.parts, PartObservation { part: Part::NodeReady, start: None, end: ready });
        }
    }

    /// Returns the streams to begin now, and ends those no longer needed.
    pub(super) fn follow(
        &mut self,
        uid: &str,
        sources: &StartSources,
    ) -> Vec<BoxStream<'static, (Arc<str>, PodUpdate)>> {
        let mut streams = Vec::new();
        if self.phase_end(Phase::Load).is_some() {
            (self.event_guard, self.log_guard) = (None, None);
            return streams;
        }
        let uid: Arc<str> = uid.into();
        let meta = &self.pod.metadata;
        let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) else { return streams };
        let until = |guard: &mut Option<DropGuard>| {
            let token = CancellationToken::new();
            *guard = Some(token.clone().drop_guard());
            token.cancelled_owned()
        };
        if self.event_guard.is_none() {
            let of = uid.clone();
            let events = sources.events.watch(namespace, name, &uid);
            let events = events.map(move |event| (of.clone(), PodUpdate::Event(Box::new(event))));
            streams.push(events.take_until(until(&mut self.event_guard)).boxed());
        }
        let run = self.serving.as_deref().and_then(|serving| read::run_of(&self.pod, serving));
        if let (Some(run), Some(container)) = (run, &self.serving)
            && self.logged_run != Some(run)
        {
            self.logged_run = Some(run);
            let (namespace, pod, container) = (namespace.clone(), name.clone(), container.clone());
            if let Some(lines) = sources.logs.follow(ContainerRef { namespace, pod, container }) {
                self.load.begin_run();
                let lines = ReceiverStream::new(lines).map(move |line| (uid.clone(), PodUpdate::Line(line)));
                streams.push(lines.take_until(until(&mut self.log_guard)).boxed());
            }
        }
        streams
    }

    /// Applies an update. Returns whether the published state changed.
    pub(super) fn apply(&mut self, update: PodUpdate) -> bool {
        match update {
            PodUpdate::Event(event) => {
                self.kubelet.event(&event, &self.pod, self.serving.as_deref(), Instant::now());
                if let Some(started) = &self.kubelet.started {
                    self.record_phase(Phase::Start, started.clone());
                }
            }
            PodUpdate::Line(line) => self.load.line(line),
        }
        self.publish()
    }

    /// Refreshes the published state. Returns whether it changed.
    pub(super) fn publish(&mut self) -> bool {
        let mut phases = self.phases.clone();
        self.load.adjust_container_start(&mut phases);
        phases.extend(self.kubelet.pulled.clone().map(|seen| (Phase::Pull, seen)));
        let start = PodStart {
            name: self.start.name.clone(),
            address: self.address.clone(),
            node: read::node(&self.pod).map(Into::into),
            // The status shows a pending image even if Events are unavailable or late.
            is_pulling: self.kubelet.is_pulling() || read::waits_for_an_image(&self.pod),
            moments: phases,
            parts: self.parts.iter().cloned().chain(self.load.parts()).collect(),
            tail: self.load.tail.clone(),
            warning: self
                .kubelet
                .warning(self.phase_end(Phase::Start).is_some(), self.phase_end(Phase::Load).is_some()),
        };
        let changed = *self.start != start;
        if changed {
            self.start = Arc::new(start);
        }
        changed
    }
}

/// Inserts a part, or replaces the one of the same kind.
fn upsert(parts: &mut Vec<PartObservation>, part: PartObservation) {
    match parts.iter_mut().find(|known| known.part == part.part) {
        Some(known) => *known = part,
        None => parts.push(part),
    }
}
