//! Routes of the running proxy, each with a gate and a scaler, and their changes on reload.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{runtime::Handle, sync::watch, task::JoinHandle, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::Account;
use crate::{
    admission::{Directory, Gate},
    coldstart::ColdStarts,
    domain::{Route, RouteKey, ScaleBy, Target},
    proxy::{RouteTable, Shared},
    scaler,
};

/// All routes with their gates and scalers.
pub(super) struct Routes {
    shared: Arc<Shared>,
    cold_starts: Arc<ColdStarts>,
    options: scaler::Options,
    /// The current routes, for subscribers.
    all: watch::Sender<Arc<Vec<Arc<Route>>>>,
    directory: Arc<Directory>,
    /// True if demand is reported to an external scaler.
    has_scaler: bool,
    /// Runtime for long computations.
    background: Option<Handle>,
    live: HashMap<RouteKey, LiveRoute>,
    /// Gates of removed routes with unfinished requests; afterwards only their account is kept.
    retired: Vec<Arc<Gate>>,
    past: Account,
    retiring: TaskTracker,
    /// Stops waiting for requests of removed routes.
    stopping: CancellationToken,
}

struct LiveRoute {
    /// The route as last applied.
    route: Arc<Route>,
    gate: Arc<Gate>,
    target: watch::Sender<Target>,
    shutdown: scaler::Shutdown,
    scaler: JoinHandle<()>,
}

/// Interval at which a removed route is checked for unfinished requests.
const DRAIN_POLL_INTERVAL: Duration = Duration::from_millis(200);

impl Routes {
    pub(super) fn new(
        shared: Arc<Shared>,
        cold_starts: Arc<ColdStarts>,
        options: scaler::Options,
        all: watch::Sender<Arc<Vec<Arc<Route>>>>,
        directory: Arc<Directory>,
        has_scaler: bool,
        background: Option<Handle>,
    ) -> Self {
        Self {
            shared,
            cold_starts,
            options,
            all,
            directory,
            has_scaler,
            background,
            live: HashMap::new(),
            retired: Vec::new(),
            past: Account::empty(),
            retiring: TaskTracker::new(),
            stopping: CancellationToken::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.live.len()
    }

    /// Replaces the routes. Held and in-flight requests are unaffected: a remaining route keeps its queue even with a
    /// new target, and a removed one is retired after its last request. An unchanged route costs a pointer comparison.
    pub(super) async fn apply(&mut self, routes: &[Arc<Route>]) {
        self.release_retired_gates();
        let mut is_new = false;
        for route in routes {
            match self.live.get_mut(&route.name) {
                Some(live) if Arc::ptr_eq(&live.route, route) => {}
                Some(live) => live.apply_route_change(route, self.has_scaler),
                None => {
                    let gate = Gate::new(route.name.clone(), route.policy(), self.cold_starts.clone());
                    gate.cold_starts().expect_push(self.has_scaler && is_scaled_by_keda(route));
                    self.live.insert(route.name.clone(), self.start(gate, route.clone()));
                    is_new = true;
                }
            }
        }
        let mut gone = Vec::new();
        if self.live.len() > routes.len() {
            let names: HashSet<_> = routes.iter().map(|route| &route.name).collect();
            gone.extend(self.live.extract_if(|name, _| !names.contains(name)).map(|(_, live)| live));
        }
        if is_new || !gone.is_empty() {
            self.directory.publish(self.live.values().map(|live| live.gate.clone()));
        }
        let is_same = {
            let before = self.all.borrow();
            before.len() == routes.len()
                && before.iter().zip(routes).all(|(one, other)| match_same(one, other))
        };
        if !is_same {
            self.publish_route_table(routes).await;
        }
        self.all.send_replace(Arc::new(routes.to_vec()));
        for live in gone {
            tracing::info!(route = %live.gate.key(), "route removed");
            self.retired.push(live.gate.clone());
            let stopping = self.stopping.clone();
            self.retiring.spawn(async move {
                while live.gate.requests() > 0 && !stopping.is_cancelled() {
                    sleep(DRAIN_POLL_INTERVAL).await;
                }
                live.end(stopping.is_cancelled()).await;
            });
        }
    }

    /// Publishes the route table. Building and dropping one takes long with thousands of routes, so both run in the
    /// background if a cluster is watched, and never on a worker thread.
    async fn publish_route_table(&self, routes: &[Arc<Route>]) {
        let gate = |route: &Arc<Route>| self.live[&route.name].gate.clone();
        let pairs: Vec<_> = routes.iter().map(|route| (route.clone(), gate(route))).collect();
        let making = async move { Arc::new(RouteTable::new(pairs)) };
        let table = match &self.background {
            Some(background) => match background.spawn(making).await {
                Ok(table) => table,
                Err(error) => {
                    return tracing::error!(%error, "cannot build the route table; keeping the old one");
                }
            },
            None => making.await,
        };
        let former = self.shared.table.swap(table);
        let stopping = self.stopping.clone();
        let dropping = async move {
            // Lookups in progress still hold the former table.
            while Arc::strong_count(&former) > 1 && !stopping.is_cancelled() {
                sleep(DRAIN_POLL_INTERVAL).await;
            }
        };
        match &self.background {
            Some(background) => self.retiring.spawn_on(dropping, background),
            None => self.retiring.spawn(dropping),
        };
    }

    fn start(&self, gate: Arc<Gate>, route: Arc<Route>) -> LiveRoute {
        let (target, targets) = watch::channel(route.target.clone());
        let shutdown = scaler::Shutdown::default();
        let scaling = scaler::supervise(gate.clone(), targets, self.options.clone(), shutdown.clone());
        LiveRoute { route, gate, target, shutdown, scaler: tokio::spawn(scaling) }
    }

    /// Drops the gates of removed routes without unfinished requests, and keeps only their account.
    fn release_retired_gates(&mut self) {
        let past = &mut self.past;
        self.retired.retain(|gate| {
            let going = gate.requests() > 0 || gate.counters().admitted() != gate.counters().ended_in_all();
            if !going {
                past.add(gate);
            }
            going
        });
    }

    fn gates(&self) -> impl Iterator<Item = &Arc<Gate>> {
        self.live.values().map(|live| &live.gate).chain(&self.retired)
    }

    /// Rejects requests that would have to be held.
    pub(super) fn drain(&self) {
        self.gates().for_each(|gate| gate.drain());
    }

    /// Rejects the held requests.
    pub(super) fn evict(&self) {
        let evicted: usize = self.gates().map(|gate| gate.evict()).sum();
        if evicted > 0 {
            tracing::info!(evicted, "rejected the held requests: the proxy is draining");
        }
    }

    /// Stops the scalers of all routes.
    pub(super) async fn stop(&mut self) {
        self.stopping.cancel();
        // The scalers stop concurrently, since each may take its stop timeout.
        let ends = self.live.drain().map(|(_, live)| {
            self.retired.push(live.gate.clone());
            self.retiring.spawn(live.end(true))
        });
        drop(ends.collect::<Vec<_>>());
        self.retiring.close();
        self.retiring.wait().await;
    }

    pub(super) fn account(&self) -> Account {
        let mut account = self.past.clone();
        self.gates().for_each(|gate| account.add(gate));
        account
    }
}

/// Returns whether both routes match the same requests.
fn match_same(one: &Arc<Route>, other: &Arc<Route>) -> bool {
    Arc::ptr_eq(one, other)
        || (one.name == other.name && one.matcher == other.matcher && one.intercept == other.intercept)
}

/// Returns whether KEDA starts the target.
fn is_scaled_by_keda(route: &Route) -> bool {
    route.scale_by == ScaleBy::Keda && !matches!(route.target, Target::Process(_))
}

impl LiveRoute {
    /// Applies a changed route.
    fn apply_route_change(&mut self, route: &Arc<Route>, has_scaler: bool) {
        let policy = route.policy();
        if policy != self.route.policy() {
            self.gate.set_policy(policy);
        }
        self.target.send_if_modified(|target| {
            let changed = *target != route.target;
            if changed {
                target.clone_from(&route.target);
                self.gate.target().models().forget();
            }
            changed
        });
        self.gate.cold_starts().expect_push(has_scaler && is_scaled_by_keda(route));
        self.route = route.clone();
    }

    /// Stops the scaler once the route's requests have ended, or immediately with `now`.
    async fn end(self, now: bool) {
        if now {
            self.shutdown.kill();
        }
        self.shutdown.drain();
        let _ = self.scaler.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;

    fn route(name: &str, more: serde_json::Value) -> Arc<Route> {
        let mut route = serde_json::json!({
            "name": name, "match": { "models": [name] }, "target": { "url": "http://127.0.0.1:1" },
        });
        for (key, value) in more.as_object().unwrap() {
            route[key] = value.clone();
        }
        Arc::new(serde_json::from_value(route).unwrap())
    }

    fn routes(background: Option<Handle>) -> Routes {
        let cold_starts = ColdStarts::new(|_| {});
        let shared = Shared::new(Limits::default());
        let options = scaler::Options::default();
        Routes::new(shared, cold_starts, options, watch::Sender::default(), Arc::default(), false, background)
    }

    #[tokio::test]
    async fn policy_change_reaches_only_its_gate() {
        let mut routes = routes(None);
        let none = || serde_json::json!({});
        let (one, two) = (route("one", none()), route("two", none()));
        routes.apply(&[one.clone(), two]).await;
        let table = routes.shared.table.load_full();
        let of_one = routes.live[&one.name].gate.demand().changes();
        let directory = routes.directory.changes();

        let two = route("two", serde_json::json!({ "hold": { "maxRequests": 7 } }));
        routes.apply(&[one.clone(), two.clone()]).await;
        assert_eq!(routes.live[&two.name].gate.policy().hold.max_requests, 7);
        assert!(Arc::ptr_eq(&table, &routes.shared.table.load_full()));
        assert!(!of_one.has_changed().unwrap() && !directory.has_changed().unwrap());
        assert_eq!(routes.all.borrow().len(), 2);

        // An equal route in another allocation is no change either.
        let again = route("one", none());
        routes.apply(&[again, two]).await;
        assert!(Arc::ptr_eq(&table, &routes.shared.table.load_full()));
        routes.stop().await;
    }

    #[tokio::test]
    async fn table_follows_changes_of_matches() {
        let mut routes = routes(Some(Handle::current()));
        let none = || serde_json::json!({});
        let (one, two) = (route("one", none()), route("two", none()));
        routes.apply(std::slice::from_ref(&one)).await;
        let former = Arc::downgrade(&routes.shared.table.load_full());
        let kept = routes.live[&one.name].gate.clone();

        let wider = route("one", serde_json::json!({ "match": { "models": ["one", "uno"] } }));
        routes.apply(&[two.clone(), wider]).await;
        let models = |routes: &Routes| routes.shared.table.load().models().to_vec();
        assert_eq!(models(&routes), ["one", "two", "uno"].map(Box::from));
        assert!(Arc::ptr_eq(&kept, &routes.live[&one.name].gate));
        assert_eq!(routes.directory.gates().len(), 2);

        routes.apply(std::slice::from_ref(&two)).await;
        assert_eq!(models(&routes), ["two"].map(Box::from));
        assert!(routes.directory.get("one").is_none());
        // `stop` returns once the former tables are dropped.
        routes.stop().await;
        assert!(former.upgrade().is_none());
    }
}
