//! Watches both kinds of route objects, validates them, resolves conflicts, and publishes the served routes.

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
    Cluster, InterceptorRoute, ModelRoute, SCAN_PAUSE_FACTOR, Watched,
    conflicts::{Resolution, RouteCandidate, RouteKind, RouteObject, resolve_conflicts},
    interceptor_route::PROBE_ANNOTATION,
    report::Verdict,
};
use crate::{
    config::{Config, check_cluster_route},
    domain::Route,
};
use others::{ReferencedObjects, changed};

/// Served routes of the cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterRoutes {
    /// Valid routes with unique names, including those of the configuration file; in order of precedence.
    pub routes: Arc<Vec<Arc<Route>>>,
    /// Verdict per object.
    pub verdicts: Arc<BTreeMap<RouteObject, Verdict>>,
    /// True if all objects have been listed once.
    pub is_settled: bool,
}

/// Current route objects.
#[derive(Clone)]
pub struct RouteObjects {
    pub(super) model_routes: Option<Watched<DeserializeGuard<ModelRoute>>>,
    pub(super) interceptor_routes: Option<Watched<DeserializeGuard<InterceptorRoute>>>,
}

/// Quiet period that ends a batch of changes: objects tend to change in bursts.
const QUIET_PERIOD: Duration = Duration::from_millis(50);
/// Maximum duration of a batch, and of the wait for referenced objects.
const MAX_BATCH_DURATION: Duration = Duration::from_millis(500);
/// Time after which an incomplete initial list is logged.
const SLOW_LIST_WARNING: Duration = Duration::from_secs(10);

struct RouteWatcher {
    cluster: Cluster,
    config: Config,
    objects: RouteObjects,
    file: watch::Receiver<Arc<Vec<Route>>>,
    references: ReferencedObjects,
    /// Parsed ModelRoutes with the object they came from; parsed again only after a change.
    read: HashMap<RouteObject, (Arc<DeserializeGuard<ModelRoute>>, RouteCandidate)>,
    /// Input of the last resolution, which is repeated only after a change.
    last_input: Option<(Arc<Vec<Route>>, Vec<RouteCandidate>)>,
    published: watch::Sender<Arc<ClusterRoutes>>,
}

// === impl Cluster ===

impl Cluster {
    /// Watches the routes of the cluster. `config` provides limits, allowed hosts and permissions; the routes in `file`
    /// take precedence.
    pub fn routes(
        &self,
        config: Config,
        file: watch::Receiver<Arc<Vec<Route>>>,
    ) -> (RouteObjects, watch::Receiver<Arc<ClusterRoutes>>) {
        let kubernetes = config.kubernetes.clone().unwrap_or_default();
        let (published, routes) = watch::channel(Arc::default());
        let objects = RouteObjects {
            model_routes: kubernetes
                .model_routes
                .then(|| self.watch_in(self.apis(), watcher::Config::default(), trim)),
            interceptor_routes: kubernetes
                .interceptor_routes
                .then(|| self.watch_in(self.apis(), watcher::Config::default(), trim)),
        };
        let watcher = RouteWatcher {
            cluster: self.clone(),
            config,
            objects: objects.clone(),
            file,
            references: ReferencedObjects::default(),
            read: HashMap::new(),
            last_input: None,
            published,
        };
        self.spawn(watcher.run());
        (objects, routes)
    }
}

/// Drops all annotations not read here; the last applied configuration is as large as the object.
fn trim<K: Resource>(object: &mut K) {
    if let Some(annotations) = &mut object.meta_mut().annotations {
        annotations.retain(|name, _| name == PROBE_ANNOTATION);
    }
}

// === impl RouteWatcher ===

impl RouteWatcher {
    async fn run(mut self) {
        self.await_initial_lists().await;
        loop {
            let began = Instant::now();
            let file = self.file.borrow_and_update().clone();
            let candidates = self.candidates();
            if self.references.watch(&self.cluster) {
                self.await_references().await;
                continue;
            }
            self.publish(&file, candidates);
            let rest = began.elapsed() * SCAN_PAUSE_FACTOR;
            self.changed().await;
            self.await_quiet_period(rest).await;
        }
    }

    /// Waits for the initial lists. Before that, a younger route could be served in place of an older one that is not
    /// listed yet.
    async fn await_initial_lists(&mut self) {
        let mut is_logged = false;
        let warn_at = Instant::now() + SLOW_LIST_WARNING;
        while !self.objects.is_settled() {
            tokio::select! {
                biased; // changes first: the lists may be complete
                () = self.changed() => {}
                () = sleep_until(warn_at), if !is_logged => {
                    is_logged = true;
                    let why = self.objects.failure();
                    let why = why.as_deref().unwrap_or("the API server has not answered");
                    tracing::warn!(why, "cluster routes are not yet known; /readyz fails until they are");
                }
            }
        }
    }

    /// Waits for the objects that routes refer to, at most [`MAX_BATCH_DURATION`]: without them the routes would be
    /// served incompletely.
    async fn await_references(&mut self) {
        let end = Instant::now() + MAX_BATCH_DURATION;
        while !self.references.is_settled() {
            tokio::select! {
                biased; // changes first: the lists may be complete
                () = self.references.changed() => {}
                () = sleep_until(end) => return,
            }
        }
    }

    async fn changed(&mut self) {
        tokio::select! {
            biased; // order does not matter: the caller re-reads everything
            () = self.objects.changed() => {}
            Ok(()) = self.file.changed() => {}
            () = self.references.changed() => {}
        }
    }

    /// Waits for the end of a burst of changes, at most [`MAX_BATCH_DURATION`], and at least `rest`.
    async fn await_quiet_period(&mut self, rest: Duration) {
        let begin = Instant::now();
        let end = begin + MAX_BATCH_DURATION;
        sleep_until(begin + rest).await;
        loop {
            tokio::select! {
                biased; // the limit first: changes may never cease
                () = sleep_until(end) => return,
                () = self.changed() => {}
                () = sleep(QUIET_PERIOD) => return,
            }
        }
    }

    fn publish(&mut self, file: &Arc<Vec<Route>>, candidates: Vec<RouteCandidate>) {
        // Most changes concern the status, which does not affect the result.
        if self
            .last_input
            .as_ref()
            .is_some_and(|(before, last_input)| Arc::ptr_eq(before, file) && *last_input == candidates)
        {
            return;
        }
        self.last_input = Some((file.clone(), candidates.clone()));
        let Resolution { routes, verdicts } = resolve_conflicts(file, candidates);
        self.published.send_if_modified(|before| {
            for (object, verdict) in &verdicts {
                if !verdict.is_accepted() && before.verdicts.get(object) != Some(verdict) {
                    tracing::warn!(%object, reason = verdict.reason(), "not served: {}", verdict.message());
                }
            }
            // Keeps the previous allocation if equal, so that subscribers can compare pointers.
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

    fn candidates(&mut self) -> Vec<RouteCandidate> {
        let mut before = std::mem::take(&mut self.read);
        let mut candidates = Vec::new();
        for object in self.objects.model_routes.iter().flat_map(Watched::all) {
            let key = self::object(RouteKind::ModelRoute, object.meta());
            let candidate = match before.remove(&key) {
                Some((known, candidate)) if Arc::ptr_eq(&known, &object) => candidate,
                known => {
                    let now = self.read(&object);
                    // Keeps the previous allocation if equal.
                    known.map(|(_, before)| before).filter(|before| *before == now).unwrap_or(now)
                }
            };
            candidates.push(candidate.clone());
            self.read.insert(key, (object, candidate));
        }
        let converted = self.objects.interceptor_routes.iter().flat_map(Watched::all).map(|object| {
            let route = object.0.as_ref().map_err(|error| malformed(&error.error)).and_then(|object| {
                let read = object.to_route(&self.references)?;
                Ok((read.route, read.remarks))
            });
            candidate(RouteKind::InterceptorRoute, object.meta(), self.check(route))
        });
        candidates.extend(converted);
        // Stores have no order; sort so that equal inputs compare equal.
        candidates.sort_unstable_by(|one, other| one.object.cmp(&other.object));
        candidates
    }

    fn read(&self, object: &DeserializeGuard<ModelRoute>) -> RouteCandidate {
        let route = object.0.as_ref().map_err(|error| malformed(&error.error)).and_then(|object| {
            let namespace = object.namespace().unwrap_or_default();
            Ok((object.spec.to_route(&namespace, &object.name_any())?, Vec::new()))
        });
        candidate(RouteKind::ModelRoute, object.meta(), self.check(route))
    }

    /// Validates a route with the rules of the configuration file and those for cluster objects.
    fn check(&self, route: Result<(Route, Vec<String>), String>) -> Result<(Route, Vec<String>), String> {
        let (route, mut remarks) = route?;
        remarks.extend(check_cluster_route(&route, &self.config).map_err(|problems| problems.join("; "))?);
        Ok((route, remarks))
    }
}

fn candidate(
    kind: RouteKind,
    meta: &ObjectMeta,
    route: Result<(Route, Vec<String>), String>,
) -> RouteCandidate {
    RouteCandidate {
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

/// Describes a parse error, with a likely cause.
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
    /// Returns whether all objects of the installed kinds have been listed once.
    fn is_settled(&self) -> bool {
        self.model_routes.as_ref().is_none_or(Watched::is_settled)
            && self.interceptor_routes.as_ref().is_none_or(Watched::is_settled)
    }

    /// Waits for a change since the last call. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        tokio::select! {
            biased; // order does not matter: the caller re-reads everything
            () = changed(&mut self.model_routes) => {}
            () = changed(&mut self.interceptor_routes) => {}
        }
    }

    fn failure(&self) -> Option<Arc<str>> {
        let model_routes = self.model_routes.as_ref().and_then(Watched::failure);
        model_routes.or_else(|| self.interceptor_routes.as_ref().and_then(Watched::failure))
    }
}

// === impl ClusterRoutes ===

impl ClusterRoutes {
    /// Counts objects by kind and verdict.
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
