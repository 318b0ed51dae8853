//! The routes of the running proxy: a gate and a scaler each, kept, changed, added and retired by reloads.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinHandle, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::Account;
use crate::{
    admission::{Directory, Gate},
    coldstart::ColdStarts,
    domain::{Route, RouteKey, ScaleBy, Target},
    proxy::{RouteTable, Shared},
    scaler,
};

/// The routes and what runs for them.
pub(super) struct Routes {
    shared: Arc<Shared>,
    cold_starts: Arc<ColdStarts>,
    options: scaler::Options,
    /// The routes as they are, for who follows them.
    all: watch::Sender<Arc<Vec<Route>>>,
    directory: Arc<Directory>,
    /// Whether a scaler tells who starts targets.
    has_scaler: bool,
    live: HashMap<RouteKey, LiveRoute>,
    /// Gates of routes that a reload removed, until they are done; then only their account is kept.
    retired: Vec<Arc<Gate>>,
    past: Account,
    retiring: TaskTracker,
    /// Ends the waiting for requests of removed routes.
    stopping: CancellationToken,
}

struct LiveRoute {
    gate: Arc<Gate>,
    target: watch::Sender<Target>,
    stops: scaler::Stops,
    scaler: JoinHandle<()>,
}

/// How often a removed route is looked at for requests that it still has.
const LOOK: Duration = Duration::from_millis(200);

impl Routes {
    pub(super) fn new(
        shared: Arc<Shared>,
        cold_starts: Arc<ColdStarts>,
        options: scaler::Options,
        all: watch::Sender<Arc<Vec<Route>>>,
        directory: Arc<Directory>,
        has_scaler: bool,
    ) -> Self {
        Self {
            shared,
            cold_starts,
            options,
            all,
            directory,
            has_scaler,
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

    /// Makes these the routes. Who is held or in flight stays so: a route that stays keeps its queue, also
    /// under a new target; one that goes is retired when its last request has ended.
    pub(super) fn apply(&mut self, routes: &[Route]) {
        self.settle_retired();
        let mut former = std::mem::take(&mut self.live);
        for route in routes {
            let live = match former.remove(&route.name) {
                Some(live) => {
                    live.gate.set_policy(route.policy());
                    live.target.send_if_modified(|target| {
                        let changed = *target != route.target;
                        if changed {
                            target.clone_from(&route.target);
                        }
                        changed
                    });
                    live
                }
                None => {
                    let gate = Gate::new(route.name.clone(), route.policy(), self.cold_starts.clone());
                    self.start(gate, route.target.clone())
                }
            };
            live.gate.cold_starts().await_push(self.has_scaler && is_scaled_by_keda(route));
            self.live.insert(route.name.clone(), live);
        }
        self.directory.publish(self.live.values().map(|live| live.gate.clone()));
        let table =
            RouteTable::new(routes.iter().map(|route| (route.clone(), self.live[&route.name].gate.clone())));
        self.shared.table.store(Arc::new(table));
        self.all.send_replace(Arc::new(routes.to_vec()));
        for live in former.into_values() {
            tracing::info!(route = %live.gate.key(), "route removed");
            self.retired.push(live.gate.clone());
            let stopping = self.stopping.clone();
            self.retiring.spawn(async move {
                while live.gate.requests() > 0 && !stopping.is_cancelled() {
                    sleep(LOOK).await;
                }
                live.end(stopping.is_cancelled()).await;
            });
        }
    }

    fn start(&self, gate: Arc<Gate>, target: Target) -> LiveRoute {
        let (target, targets) = watch::channel(target);
        let stops = scaler::Stops::default();
        let scaling = scaler::supervise(gate.clone(), targets, self.options.clone(), stops.clone());
        LiveRoute { gate, target, stops, scaler: tokio::spawn(scaling) }
    }

    /// Removed routes that have no request any more leave only their account.
    fn settle_retired(&mut self) {
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

    /// Nothing new is held where nothing is up.
    pub(super) fn drain(&self) {
        self.gates().for_each(|gate| gate.drain());
    }

    /// The held requests have waited long enough.
    pub(super) fn evict(&self) {
        let evicted: usize = self.gates().map(|gate| gate.evict()).sum();
        if evicted > 0 {
            tracing::info!(evicted, "held requests were told that we are draining");
        }
    }

    /// Stops what runs for the routes.
    pub(super) async fn stop(&mut self) {
        self.stopping.cancel();
        // All at once: each may take its stop timeout.
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

/// Whether it is KEDA that starts the target, once it is told.
fn is_scaled_by_keda(route: &Route) -> bool {
    route.scale_by == ScaleBy::Keda && !matches!(route.target, Target::Process(_))
}

impl LiveRoute {
    /// Stops what runs for the route: what is in flight on it has ended, or ends `now`.
    async fn end(self, now: bool) {
        if now {
            self.stops.stop();
        }
        self.stops.retire();
        let _ = self.scaler.await;
    }
}
