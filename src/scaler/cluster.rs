//! The keeper: knows which pods of a target take requests, sooner than the cluster does. It scales nothing.
//!
//! One task a route. Each pod has a [`pod::Pod`] within it, that follows what the cluster says of it and what it answers
//! itself; [`activation`] says when a cold start begins, and when it has failed.

mod activation;
mod gateway;
mod pod;
mod scrape;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{
    FutureExt, StreamExt,
    future::{BoxFuture, join_all},
    stream::FuturesUnordered,
};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use super::{
    Stops,
    sight::advice,
    url::{address, refuse},
    wake::{Wake, vacant},
};
use crate::{
    admission::Gate,
    domain::{ClusterTarget, Period, Readiness, Role, Roles},
    probe::{Answer, Speaks, probe_pod, resolve},
    state::{
        Discovered, DiscoveredEndpoint, Discovery, Endpoint, FrontKind, PodStart, Protocol, Status,
        TargetState,
    },
};
use pod::{Pod, Word};

/// How many probes of a target may run at once.
const PROBES: usize = 32;

/// Asks a server whether it is ready.
type Prober = Arc<dyn Fn(&Endpoint, &Readiness) -> BoxFuture<'static, Answer> + Send + Sync>;

/// Looks a host up: what a probe of it would see if that fails.
type Resolver = Arc<dyn Fn(&str, Period) -> BoxFuture<'static, Option<Answer>> + Send + Sync>;

/// What pods, gateway and activation of one target share.
struct Keeper {
    gate: Arc<Gate>,
    discovered: watch::Receiver<Arc<Discovered>>,
    /// Behind a gateway the pods are no endpoints of the target: they stand here.
    behind: Option<TargetState>,
    /// The groups of pods that the target needs, by name.
    groups: Vec<Arc<str>>,
    tally: watch::Sender<Tally>,
    prober: Prober,
    resolver: Resolver,
    probes: Semaphore,
    /// What a probe saw last, and where.
    seen: Mutex<Option<(Box<str>, Answer)>>,
    /// The answer of a pod that the cluster's word was preferred to last.
    overruled: Mutex<Option<Answer>>,
}

/// How many there are of what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Endpoints of the target that take requests, as far as those who look after them know.
    open: u32,
    /// Endpoints that failed a request and may well answer the next one.
    doubtful: u32,
    /// Pods that take requests.
    pods: u32,
    /// Pods of each group that answer, whether or not requests go to them.
    groups: [u32; Roles::MAX_GROUPS],
    /// Whether the cluster has been heard.
    is_heard: bool,
}

/// A pod that is kept.
struct Kept {
    endpoint: Arc<Endpoint>,
    word: watch::Sender<Word>,
}

/// A server at the same address that speaks otherwise, or is for something else, is another endpoint.
type Key = (Arc<str>, Protocol, Role);

/// The pods that are kept, and what runs for each; it ends with the pod's key.
struct Pods {
    kept: HashMap<Key, Kept>,
    running: FuturesUnordered<BoxFuture<'static, Key>>,
    /// Whether what is found ready now was so before we came.
    is_first: bool,
}

/// Looks after the pods of `target` until it is told to end.
pub(super) async fn run(
    gate: Arc<Gate>,
    target: &ClusterTarget,
    discovery: Arc<dyn Discovery>,
    stops: Stops,
) {
    let discovered = discovery.watch(target);
    let prober: Prober = Arc::new(|endpoint, readiness| {
        let (address, readiness) = (endpoint.address().to_owned(), readiness.clone());
        let speaks = speaks(endpoint.protocol());
        async move { probe_pod(&address, speaks, &readiness).await }.boxed()
    });
    let resolver: Resolver = Arc::new(|address, limit| {
        let address = address.to_owned();
        async move { resolve(&address, limit).await.err() }.boxed()
    });
    keep(gate, target, discovered, (prober, resolver), stops).await;
}

/// In which words a server is asked.
const fn speaks(protocol: Protocol) -> Speaks {
    match protocol {
        Protocol::Http1 => Speaks::Http1,
        Protocol::H2c => Speaks::Http2,
    }
}

async fn keep(
    gate: Arc<Gate>,
    target: &ClusterTarget,
    discovered: watch::Receiver<Arc<Discovered>>,
    (prober, resolver): (Prober, Resolver),
    stops: Stops,
) {
    let max = gate.policy().concurrency.max;
    let gateway = match target.gateway.as_deref().map(|url| address(url).ok_or(url)).transpose() {
        Ok(address) => address.map(|address| Endpoint::fronting(FrontKind::Gateway, address, max)),
        Err(url) => {
            // A valid route has no such gateway.
            let reason = format!("the target's gateway, `{url}`, is not http://host:port");
            let mut wake = Wake::new(gate);
            return tokio::select! {
                biased; // the end first: there is nothing else to wait for
                () = stops.retire.cancelled() => {}
                () = refuse(&mut wake, &reason) => {}
            };
        }
    };
    let keeper = Arc::new(Keeper {
        gate: gate.clone(),
        discovered: discovered.clone(),
        behind: gateway.is_some().then(TargetState::default),
        groups: target.roles.groups.keys().map(|name| name.as_str().into()).collect(),
        tally: watch::Sender::default(),
        prober,
        resolver,
        probes: Semaphore::new(PROBES),
        seen: Mutex::default(),
        overruled: Mutex::default(),
    });
    let mut pods = Pods { kept: HashMap::new(), running: FuturesUnordered::new(), is_first: true };
    if let Some(gateway) = &gateway {
        gate.target().add(gateway);
    }
    tokio::select! {
        // The end first: nothing is woken any more.
        biased;
        () = stops.retire.cancelled() => {}
        () = pods.follow(&keeper, discovered) => {}
        () = gateway::run(&keeper, gateway.as_deref()) => {}
        () = activation::run(&keeper) => {}
        () = scrape::run(&keeper) => {}
    }
    gate.demand().set_server_queue(0);
    if gate.target().is_up() {
        // Who was to be served by an activation has been, or is gone.
        gate.cold_starts().abandoned();
    }
    let Pods { kept, running, .. } = pods;
    // Those who look after endpoints go first: they would be woken in our place.
    drop(running);
    let endpoints: Vec<_> = kept.into_values().map(|kept| kept.endpoint).chain(gateway).collect();
    endpoints.iter().for_each(|endpoint| endpoint.retire());
    // Said before the wait: another target may have taken over when that ends.
    gate.target().set_status(Status::Idle);
    let left = async {
        for endpoint in &endpoints {
            vacant(endpoint).await;
            gate.target().remove(endpoint);
        }
    };
    tokio::select! {
        // Told to stop now, what is in flight is not waited for.
        biased;
        () = stops.stop.cancelled() => {}
        () = left => {}
    }
}

// === impl Pods ===

impl Pods {
    /// Keeps what is discovered. Never ends.
    async fn follow(&mut self, keeper: &Arc<Keeper>, mut discovered: watch::Receiver<Arc<Discovered>>) {
        let mut is_over = false;
        loop {
            let now = discovered.borrow_and_update().clone();
            self.apply(keeper, &now);
            loop {
                tokio::select! {
                    // News first: a pod that has gone and is back is not to be forgotten.
                    biased;
                    changed = discovered.changed(), if !is_over => {
                        is_over = changed.is_err();
                        break;
                    }
                    Some(key) = self.running.next() => self.ended(keeper, key),
                    else => std::future::pending().await,
                }
            }
        }
    }

    fn apply(&mut self, keeper: &Arc<Keeper>, discovered: &Discovered) {
        // Before a pod opens by the cluster's word, so that it is known whose word it was.
        let starts = discovered.starts.iter().map(|start| PodStart::clone(start));
        keeper.gate.cold_starts().observe_pods(starts);
        for endpoint in &discovered.endpoints {
            let key = key_of(endpoint);
            let word = Word::from(endpoint);
            match self.kept.get(&key) {
                Some(kept) => say(kept, word),
                None if word == Word::Terminating => {}
                None => self.add(keeper, key, word),
            }
        }
        if discovered.is_synced {
            let there: HashSet<_> = discovered.endpoints.iter().map(key_of).collect();
            let gone = self.kept.iter().filter(|(key, _)| !there.contains(key));
            gone.for_each(|((address, ..), kept)| {
                say(kept, if discovered.dead.contains(address) { Word::Dead } else { Word::Gone });
            });
            self.is_first = false;
            keeper.count(|tally| tally.is_heard = true);
        }
    }

    fn add(&mut self, keeper: &Arc<Keeper>, key: Key, word: Word) {
        let max = keeper.gate.policy().concurrency.max;
        let endpoint = Endpoint::speaking(key.1, &*key.0, max);
        let role = key.2;
        if !role.helps {
            keeper.pods().add(&endpoint);
        }
        let (word, words) = watch::channel(word);
        self.kept.insert(key.clone(), Kept { endpoint: endpoint.clone(), word });
        let is_warm = self.is_first && *words.borrow() == Word::Ready;
        let pod = Pod::new(keeper.clone(), endpoint, role, words, is_warm);
        self.running.push(
            async move {
                pod.run().await;
                key
            }
            .boxed(),
        );
    }

    /// A pod has gone, and nothing is in flight on it.
    fn ended(&mut self, keeper: &Arc<Keeper>, key: Key) {
        let Some(kept) = self.kept.remove(&key) else { return };
        keeper.pods().remove(&kept.endpoint);
        let word = *kept.word.borrow();
        if !matches!(word, Word::Gone | Word::Dead) {
            // It came back in the very moment.
            self.add(keeper, key, word);
        }
    }
}

fn key_of(endpoint: &DiscoveredEndpoint) -> Key {
    (endpoint.address.clone(), endpoint.protocol, endpoint.role)
}

fn say(kept: &Kept, word: Word) {
    kept.word.send_if_modified(|known| std::mem::replace(known, word) != word);
}

// === impl Keeper ===

impl Keeper {
    /// Where the pods stand.
    fn pods(&self) -> &TargetState {
        self.behind.as_ref().unwrap_or_else(|| self.gate.target())
    }

    /// The names of the groups that have no pod that answers: until each has one, none takes requests.
    fn missing(&self, tally: &Tally) -> impl Iterator<Item = &Arc<str>> {
        self.groups.iter().zip(tally.groups).filter(|(_, count)| *count == 0).map(|(name, _)| name)
    }

    /// Waits until the groups are complete, or until they are not. Cancel-safe.
    async fn completeness(&self, is_complete: bool) {
        let mut tally = self.tally.subscribe();
        let so = tally.wait_for(|tally| self.missing(tally).next().is_none() == is_complete);
        if so.await.is_err() {
            std::future::pending().await
        }
    }

    /// An endpoint of the target takes requests, `limit` at first. The first one ends the activation.
    fn open(&self, wake: &Wake, endpoint: &Endpoint, limit: Option<u32>) {
        let cold_starts = self.gate.cold_starts();
        if !self.gate.target().is_up() {
            // Behind a gateway it is the pod that opened first that is told of.
            cold_starts.ready(self.behind.is_none().then(|| endpoint.address()));
        }
        wake.open(endpoint, limit);
        if self.gate.requests() == 0 {
            cold_starts.abandoned();
        }
    }

    /// Asks a server whether it is ready, when it is its turn.
    async fn ask(&self, endpoint: &Endpoint) -> Answer {
        // It is never closed; and without a permit there would only be more probes at once.
        let _turn = self.probes.acquire().await;
        let readiness = self.gate.policy().readiness.clone();
        let answer = (self.prober)(endpoint, &readiness).await;
        self.gate.target().set_refusing(endpoint.address(), answer == Answer::Refused);
        *self.seen.lock() = Some((endpoint.address().into(), answer.clone()));
        answer
    }

    /// Looks the host of an endpoint up: what a probe of it would see if that fails.
    async fn resolve(&self, endpoint: &Endpoint) -> Option<Answer> {
        let limit = self.gate.policy().readiness.timeout;
        (self.resolver)(endpoint.address(), limit).await
    }

    /// The same of an endpoint that is open; where servers are not to be asked, being so is its answer.
    async fn ask_if_allowed(&self, endpoint: &Endpoint) -> Answer {
        if self.gate.policy().readiness.probe { self.ask(endpoint).await } else { Answer::Ready }
    }

    /// Asks all pods that take requests: the answer of one that gives no sign of life, if there is one.
    async fn ask_pods(&self) -> Answer {
        let pods = self.pods().endpoints().clone();
        let open = pods.iter().filter(|pod| pod.is_ready());
        let answers = join_all(open.map(|pod| self.ask_if_allowed(pod))).await;
        answers.into_iter().find(|answer| !answer.is_alive()).unwrap_or(Answer::Ready)
    }

    /// A pod is used by the cluster's word, although our own probe sees this. Logs that, once for each answer.
    fn overruled(&self, endpoint: &Endpoint, answer: &Answer) {
        if self.overruled.lock().replace(answer.clone()).as_ref() == Some(answer) {
            return;
        }
        let (route, address, path) =
            (self.gate.key(), endpoint.address(), &self.gate.policy().readiness.path);
        let advice = if answer.is_rejection() { advice(answer) } else { "" };
        tracing::warn!(
            %route, address, path, %answer,
            "the cluster says that the pod is ready, and our own probe does not: it is used. {advice}"
        );
    }

    /// How often a server is asked.
    fn interval(&self) -> Duration {
        self.gate.policy().readiness.interval.get().max(Duration::from_millis(1))
    }

    fn count(&self, change: impl FnOnce(&mut Tally)) {
        self.tally.send_if_modified(|tally| {
            let before = *tally;
            change(tally);
            *tally != before
        });
    }
}

// === impl Word ===

impl From<&DiscoveredEndpoint> for Word {
    fn from(endpoint: &DiscoveredEndpoint) -> Self {
        match endpoint {
            DiscoveredEndpoint { terminating: true, .. } => Self::Terminating,
            DiscoveredEndpoint { ready: true, .. } => Self::Ready,
            DiscoveredEndpoint { gated: true, .. } => Self::Gated,
            DiscoveredEndpoint { .. } => Self::NotReady,
        }
    }
}

#[cfg(test)]
mod tests;
