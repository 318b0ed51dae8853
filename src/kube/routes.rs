//! Routes of the cluster: both kinds watched, checked, set against each other, and published.

mod others;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use kube::{Resource, ResourceExt, api::ObjectMeta, core::DeserializeGuard, runtime::watcher};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

use super::{
    Cluster, InterceptorRoute, ModelRoute, REST, Watched,
    conflicts::{Candidate, RouteKind, RouteObject, Settled, settle},
    interceptor_route::PROBE,
    report::Verdict,
};
use crate::{
    config::{Config, check_cluster_route},
    domain::Route,
};
use others::Others;

/// The routes of the cluster as they are served.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterRoutes {
    /// Valid, none with the name of another or of a route of the file; the one that goes first of two that match the
    /// same stands first.
    pub routes: Arc<Vec<Arc<Route>>>,
    /// What is to be said of each object.
    pub verdicts: Arc<BTreeMap<RouteObject, Verdict>>,
    /// Whether all that there are have been seen once.
    pub is_settled: bool,
}

/// The objects that are routes, as they are known now.
#[derive(Clone)]
pub struct RouteObjects {
    pub(super) ours: Option<Watched<DeserializeGuard<ModelRoute>>>,
    pub(super) theirs: Option<Watched<DeserializeGuard<InterceptorRoute>>>,
}

/// How long nothing must change before what has changed is looked at: objects come in bunches.
const QUIET: Duration = Duration::from_millis(50);
/// How long changes are gathered at most.
const LONGEST: Duration = Duration::from_millis(500);
/// How long it may take until all routes have been seen, before that is worth a warning.
const PATIENCE: Duration = Duration::from_secs(10);

struct Watcher {
    cluster: Cluster,
    config: Config,
    objects: RouteObjects,
    file: watch::Receiver<Arc<Vec<Route>>>,
    others: Others,
    /// What was read of each object of our own, and from what: it is read again when it has changed.
    read: HashMap<RouteObject, (Arc<DeserializeGuard<ModelRoute>>, Candidate)>,
    /// What was decided on last, to be decided on again only if it has changed.
    decided: Option<(Arc<Vec<Route>>, Vec<Candidate>)>,
    published: watch::Sender<Arc<ClusterRoutes>>,
}

// === impl Cluster ===

impl Cluster {
    /// Watches the routes of the cluster. `config` has the limits, addresses and rights of this proxy, `file` the routes
    /// of the file, which go before those of the cluster.
    pub fn routes(
        &self,
        config: Config,
        file: watch::Receiver<Arc<Vec<Route>>>,
    ) -> (RouteObjects, watch::Receiver<Arc<ClusterRoutes>>) {
        let kubernetes = config.kubernetes.clone().unwrap_or_default();
        let (published, routes) = watch::channel(Arc::default());
        let objects = RouteObjects {
            ours: kubernetes
                .model_routes
                .then(|| self.watch_in(self.apis(), watcher::Config::default(), trim)),
            theirs: kubernetes
                .interceptor_routes
                .then(|| self.watch_in(self.apis(), watcher::Config::default(), trim)),
        };
        let watcher = Watcher {
            cluster: self.clone(),
            config,
            objects: objects.clone(),
            file,
            others: Others::default(),
            read: HashMap::new(),
            decided: None,
            published,
        };
        self.spawn(watcher.run());
        (objects, routes)
    }
}

/// What `kubectl apply` notes of an object is as large as the object.
fn trim<K: Resource>(object: &mut K) {
    if let Some(annotations) = &mut object.meta_mut().annotations {
        annotations.retain(|name, _| name == PROBE);
    }
}

// === impl Watcher ===

impl Watcher {
    async fn run(mut self) {
        self.settle_in().await;
        loop {
            let began = Instant::now();
            let file = self.file.borrow_and_update().clone();
            let candidates = self.candidates();
            if self.others.watch(&self.cluster) {
                self.await_others().await;
                continue;
            }
            self.publish(&file, candidates);
            let rest = began.elapsed() * REST;
            self.changed().await;
            self.gather(rest).await;
        }
    }

    /// Waits until all routes have been seen once: before that, a younger route could be served in place of an older
    /// one that is only seen later.
    async fn settle_in(&mut self) {
        let mut told = false;
        let patience = Instant::now() + PATIENCE;
        while !self.objects.is_settled() {
            tokio::select! {
                biased; // what has come may be all
                () = self.changed() => {}
                () = sleep_until(patience), if !told => {
                    told = true;
                    let why = self.objects.failure();
                    let why = why.as_deref().unwrap_or("the API server has not answered");
                    tracing::warn!(why, "the routes of the cluster are not known yet: /readyz says no until they are");
                }
            }
        }
    }

    /// Waits until what objects speak of has been seen once, for [`LONGEST`]: without it they would be served in part.
    async fn await_others(&mut self) {
        let end = Instant::now() + LONGEST;
        while !self.others.is_settled() {
            tokio::select! {
                biased; // what has come may be all
                () = self.others.changed() => {}
                () = sleep_until(end) => return,
            }
        }
    }

    async fn changed(&mut self) {
        tokio::select! {
            biased; // any of them will do
            () = self.objects.changed() => {}
            Ok(()) = self.file.changed() => {}
            () = self.others.changed() => {}
        }
    }

    /// Waits until the changes are over, or for [`LONGEST`]; for `rest` in any case.
    async fn gather(&mut self, rest: Duration) {
        let begin = Instant::now();
        let end = begin + LONGEST;
        sleep_until(begin + rest).await;
        loop {
            tokio::select! {
                biased; // the end first: changes may never cease
                () = sleep_until(end) => return,
                () = self.changed() => {}
                () = sleep(QUIET) => return,
            }
        }
    }

    fn publish(&mut self, file: &Arc<Vec<Route>>, candidates: Vec<Candidate>) {
        // Most changes are of the status, which decides nothing.
        if self
            .decided
            .as_ref()
            .is_some_and(|(before, decided)| Arc::ptr_eq(before, file) && *decided == candidates)
        {
            return;
        }
        self.decided = Some((file.clone(), candidates.clone()));
        let Settled { routes, verdicts } = settle(file, candidates);
        self.published.send_if_modified(|before| {
            for (object, verdict) in &verdicts {
                if !verdict.is_accepted() && before.verdicts.get(object) != Some(verdict) {
                    tracing::warn!(%object, reason = verdict.reason(), "not served: {}", verdict.message());
                }
            }
            // What has not changed stays the same, also in memory.
            let keep = |before: &Arc<Vec<Arc<Route>>>| (**before == routes).then(|| before.clone());
            let now = ClusterRoutes {
                routes: keep(&before.routes).unwrap_or_else(|| Arc::new(routes)),
                verdicts: Arc::new(verdicts),
                is_settled: true,
            };
            let changed = **before != now;
            if changed {
                *before = Arc::new(now);
            }
            changed
        });
    }

    fn candidates(&mut self) -> Vec<Candidate> {
        let mut before = std::mem::take(&mut self.read);
        let mut ours = Vec::new();
        for object in self.objects.ours.iter().flat_map(Watched::all) {
            let key = self::object(RouteKind::ModelRoute, object.meta());
            let candidate = match before.remove(&key) {
                Some((known, candidate)) if Arc::ptr_eq(&known, &object) => candidate,
                known => {
                    let now = self.read(&object);
                    // What has not changed stays the same, also in memory.
                    known.map(|(_, before)| before).filter(|before| *before == now).unwrap_or(now)
                }
            };
            ours.push(candidate.clone());
            self.read.insert(key, (object, candidate));
        }
        let theirs = self.objects.theirs.iter().flat_map(Watched::all).map(|object| {
            let route = object.0.as_ref().map_err(|error| malformed(&error.error)).and_then(|object| {
                let read = object.to_route(&self.others)?;
                Ok((read.route, read.remarks))
            });
            candidate(RouteKind::InterceptorRoute, object.meta(), self.check(route))
        });
        ours.extend(theirs);
        // The order of a store is none, and another one decides nothing.
        ours.sort_unstable_by(|one, other| one.object.cmp(&other.object));
        ours
    }

    fn read(&self, object: &DeserializeGuard<ModelRoute>) -> Candidate {
        let route = object.0.as_ref().map_err(|error| malformed(&error.error)).and_then(|object| {
            let namespace = object.namespace().unwrap_or_default();
            Ok((object.spec.to_route(&namespace, &object.name_any())?, Vec::new()))
        });
        candidate(RouteKind::ModelRoute, object.meta(), self.check(route))
    }

    /// The same rules as for a route of the file, and those for routes of others.
    fn check(&self, route: Result<(Route, Vec<String>), String>) -> Result<(Route, Vec<String>), String> {
        let (route, mut remarks) = route?;
        remarks.extend(check_cluster_route(&route, &self.config).map_err(|problems| problems.join("; "))?);
        Ok((route, remarks))
    }
}

fn candidate(kind: RouteKind, meta: &ObjectMeta, route: Result<(Route, Vec<String>), String>) -> Candidate {
    Candidate {
        object: object(kind, meta),
        created: meta.creation_timestamp.as_ref().map(|time| time.0.as_second()),
        route: route.map(|(route, remarks)| (Arc::new(route), remarks)),
    }
}

pub(super) fn object(kind: RouteKind, meta: &ObjectMeta) -> RouteObject {
    RouteObject {
        kind,
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    }
}

/// Why an object cannot be read, and how that may come.
fn malformed(error: &str) -> String {
    let hint = if error.to_ascii_lowercase().contains("unknown field") {
        "; the definition in the cluster may be newer than this proxy: upgrade the proxy, or leave the field out"
    } else {
        "; see `kubectl explain`, or apply the definition that `anteroom crds` prints: it refuses such objects"
    };
    format!("it cannot be read: {error}{hint}")
}

// === impl RouteObjects ===

impl RouteObjects {
    /// Whether all that there are have been seen once, as far as the cluster has such kinds.
    fn is_settled(&self) -> bool {
        self.ours.as_ref().is_none_or(Watched::is_settled)
            && self.theirs.as_ref().is_none_or(Watched::is_settled)
    }

    /// Waits until something has changed since the last call. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        tokio::select! {
            biased; // any of them will do
            () = changed(&mut self.ours) => {}
            () = changed(&mut self.theirs) => {}
        }
    }

    fn failure(&self) -> Option<Arc<str>> {
        let ours = self.ours.as_ref().and_then(Watched::failure);
        ours.or_else(|| self.theirs.as_ref().and_then(Watched::failure))
    }
}

async fn changed<K>(watched: &mut Option<Watched<K>>)
where
    K: kube::runtime::reflector::Lookup<DynamicType: Default + Eq + std::hash::Hash + Clone>
        + Clone
        + 'static,
{
    match watched {
        Some(watched) => watched.changed().await,
        None => std::future::pending().await,
    }
}

// === impl ClusterRoutes ===

impl ClusterRoutes {
    /// How many objects of each kind have each verdict, in one word.
    pub fn counts(&self) -> HashMap<(RouteKind, &'static str), usize> {
        let mut counts = HashMap::new();
        for (object, verdict) in self.verdicts.iter() {
            *counts.entry((object.kind, verdict.reason())).or_default() += 1;
        }
        counts
    }
}

#[cfg(test)]
mod tests;
