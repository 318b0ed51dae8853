//! One pod that starts: what has been seen of it so far.

use std::sync::Arc;

use futures_util::{StreamExt, stream::BoxStream};
use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{News, Sources, load::Load, logs::Source, nodes::NewNodes, read, read::Told};
use crate::{
    domain::{Part, Phase},
    state::{PartSeen, PodStart, Seen},
};

/// A pod that starts.
pub(super) struct Starting {
    pub(super) pod: Arc<Pod>,
    /// The container that serves.
    serving: Option<String>,
    /// As which endpoint it is found.
    pub(super) address: Option<Arc<str>>,
    seen: Vec<(Phase, Seen)>,
    told: Told,
    parts: Vec<PartSeen>,
    /// Whether no node took it at first.
    waited: bool,
    /// Which run of the container has its log read, by how often it has run before.
    logged: Option<i32>,
    load: Load,
    /// Ends its Events and its log.
    following: Option<DropGuard>,
    reading: Option<DropGuard>,
    pub(super) start: Arc<PodStart>,
}

// === impl Starting ===

impl Starting {
    pub(super) fn new(pod: Arc<Pod>, ports: &[u16]) -> Self {
        let serving = read::serving(&pod, ports).map(str::to_owned);
        let meta = &pod.metadata;
        let name = [&meta.namespace, &meta.name].map(|part| part.as_deref().unwrap_or_default()).join("/");
        Self {
            serving,
            address: None,
            seen: Vec::new(),
            told: Told::default(),
            parts: Vec::new(),
            waited: false,
            logged: None,
            load: Load::default(),
            following: None,
            reading: None,
            start: Arc::new(PodStart { name: name.into(), ..PodStart::default() }),
            pod,
        }
    }

    pub(super) fn seen_at(&self, phase: Phase) -> Option<Instant> {
        self.seen.iter().find(|(seen, _)| *seen == phase).map(|(_, seen)| seen.at)
    }

    /// What the pod says now.
    pub(super) fn look(&mut self, at: Instant) {
        for (phase, seen) in read::moments(&self.pod, self.serving.as_deref(), at) {
            self.saw(phase, seen);
        }
        self.waited |= read::waits_for_a_node(&self.pod);
    }

    /// A phase is over, as somebody says. The first word counts; one that came without a time may have it added.
    fn saw(&mut self, phase: Phase, seen: Seen) {
        match self.seen.iter_mut().find(|(known, _)| *known == phase) {
            Some((_, known)) => known.stamp = known.stamp.take().or(seen.stamp),
            None => self.seen.push((phase, seen)),
        }
    }

    /// Whether it matters which nodes come. Nodes and pods are not told of in one order, so this goes on a little.
    pub(super) fn waits(&self) -> bool {
        self.waited && self.seen_at(Phase::Start).is_none()
    }

    pub(super) fn look_at_nodes(&mut self, nodes: Option<&NewNodes>) {
        if !self.waits() {
            return;
        }
        let created = self.pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let node = read::node(&self.pod).and_then(|node| nodes?.get(node));
        let Some(node) = node.filter(|node| node.is_newer_than(created)) else { return };
        put(&mut self.parts, PartSeen { part: Part::NodeCreate, start: None, end: node.came });
        if let Some(ready) = node.ready {
            put(&mut self.parts, PartSeen { part: Part::NodeReady, start: None, end: ready });
        }
    }

    /// Begins to follow what is to be followed now, and ends what is not.
    pub(super) fn follow(
        &mut self,
        uid: &str,
        sources: &Sources,
    ) -> Vec<BoxStream<'static, (Arc<str>, News)>> {
        let mut streams = Vec::new();
        if self.seen_at(Phase::Load).is_some() {
            (self.following, self.reading) = (None, None);
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
        if self.following.is_none() {
            let of = uid.clone();
            let events = sources.events.of(namespace, name, &uid);
            let events = events.map(move |event| (of.clone(), News::Event(Box::new(event))));
            streams.push(events.take_until(until(&mut self.following)).boxed());
        }
        let run = self.serving.as_deref().and_then(|serving| read::run_of(&self.pod, serving));
        if let (Some(run), Some(container)) = (run, &self.serving)
            && self.logged != Some(run)
        {
            self.logged = Some(run);
            let (namespace, pod, container) = (namespace.clone(), name.clone(), container.clone());
            if let Some(lines) = sources.logs.follow(Source { namespace, pod, container }) {
                self.load.begin();
                let lines = ReceiverStream::new(lines).map(move |line| (uid.clone(), News::Line(line)));
                streams.push(lines.take_until(until(&mut self.reading)).boxed());
            }
        }
        streams
    }

    /// Says whether there is something to tell.
    pub(super) fn hear(&mut self, news: News) -> bool {
        match news {
            News::Event(event) => {
                self.told.event(&event, &self.pod, self.serving.as_deref(), Instant::now());
                if let Some(started) = &self.told.started {
                    self.saw(Phase::Start, started.clone());
                }
            }
            News::Line(line) => self.load.line(line),
        }
        self.tell()
    }

    /// Publishes what is known, if that has changed.
    pub(super) fn tell(&mut self) -> bool {
        let mut moments = self.seen.clone();
        self.load.cap(&mut moments);
        moments.extend(self.told.pulled.clone().map(|seen| (Phase::Pull, seen)));
        let start = PodStart {
            name: self.start.name.clone(),
            address: self.address.clone(),
            node: read::node(&self.pod).map(Into::into),
            // Its status says that it waits for an image, also where Events may not be read or come late.
            is_pulling: self.told.is_pulling() || read::waits_for_an_image(&self.pod),
            moments,
            parts: self.parts.iter().cloned().chain(self.load.parts()).collect(),
            tail: self.load.tail.clone(),
            warning: self
                .told
                .warning(self.seen_at(Phase::Start).is_some(), self.seen_at(Phase::Load).is_some()),
        };
        let changed = *self.start != start;
        if changed {
            self.start = Arc::new(start);
        }
        changed
    }
}

/// Of each part there is one.
fn put(parts: &mut Vec<PartSeen>, part: PartSeen) {
    match parts.iter_mut().find(|known| known.part == part.part) {
        Some(known) => *known = part,
        None => parts.push(part),
    }
}
