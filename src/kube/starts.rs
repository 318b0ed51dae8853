//! How the pods of a target come into being, as the cluster says it: for the record of a cold start.
//!
//! Moments are when we saw them, with what the cluster says of when they were. Pods come from the watch that endpoints
//! are found with; Events, nodes and logs are followed only while a pod starts.

mod events;
mod load;
mod logs;
mod nodes;
mod read;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures_util::{StreamExt, stream::BoxStream, stream::SelectAll};
use k8s_openapi::api::core::v1::{Event, Pod};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Cluster;
use crate::{
    domain::{Part, Phase},
    state::{DiscoveredEndpoint, PartSeen, PodStart, Seen},
};
use events::PodEvents;
use load::Load;
use logs::{Line, PodLogs, Source};
use nodes::{NewNodes, Nodes};
use read::Told;
pub(super) use read::{CONTROL_PLANE, stamp};

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

/// A pod that starts.
struct Starting {
    pod: Arc<Pod>,
    /// The container that serves.
    serving: Option<String>,
    /// As which endpoint it is found.
    address: Option<Arc<str>>,
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
    start: Arc<PodStart>,
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
        let there: HashSet<_> = pods.iter().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        self.pods.retain(|uid, _| there.contains(&**uid));
        for pod in pods {
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

// === impl Starting ===

impl Starting {
    fn new(pod: Arc<Pod>, ports: &[u16]) -> Self {
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

    fn seen_at(&self, phase: Phase) -> Option<Instant> {
        self.seen.iter().find(|(seen, _)| *seen == phase).map(|(_, seen)| seen.at)
    }

    /// What the pod says now.
    fn look(&mut self, at: Instant) {
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
    fn waits(&self) -> bool {
        self.waited && self.seen_at(Phase::Start).is_none()
    }

    fn look_at_nodes(&mut self, nodes: Option<&NewNodes>) {
        if !self.waits() {
            return;
        }
        let created = self.pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let node = read::node(&self.pod).and_then(|node| nodes?.get(node));
        let Some(node) = node.filter(|node| node.is_newer_than(created)) else { return };
        self.part(PartSeen { part: Part::NodeCreate, start: None, end: node.came });
        if let Some(ready) = node.ready {
            self.part(PartSeen { part: Part::NodeReady, start: None, end: ready });
        }
    }

    fn part(&mut self, part: PartSeen) {
        match self.parts.iter_mut().find(|known| known.part == part.part) {
            Some(known) => *known = part,
            None => self.parts.push(part),
        }
    }

    /// Begins to follow what is to be followed now, and ends what is not.
    fn follow(&mut self, uid: &str, sources: &Sources) -> Vec<BoxStream<'static, (Arc<str>, News)>> {
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
    fn hear(&mut self, news: News) -> bool {
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
    fn tell(&mut self) -> bool {
        let mut moments = self.seen.clone();
        self.load.cap(&mut moments);
        moments.extend(self.told.pulled.clone().map(|seen| (Phase::Pull, seen)));
        let start = PodStart {
            name: self.start.name.clone(),
            address: self.address.clone(),
            node: read::node(&self.pod).map(Into::into),
            is_pulling: self.told.is_pulling(),
            moments,
            parts: self.parts.iter().cloned().chain(self.load.parts()).collect(),
            tail: self.load.tail.clone(),
        };
        let changed = *self.start != start;
        if changed {
            self.start = Arc::new(start);
        }
        changed
    }
}

#[cfg(test)]
mod tests;
