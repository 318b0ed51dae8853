//! Wiring of the cluster: its routes into the running proxy, and their state back into the status of objects.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use super::{cold_start_report, obstacles::Notifier};
use crate::{
    admin::ClusterCounts,
    admission::Gate,
    coldstart::ColdStarts,
    config::Config,
    domain::{Route, RouteKey, ScaleBy},
    kube::{
        Cluster, ClusterRoutes, LastColdStart, Liveness, RouteReport, RouteReports, RouteState, StatusCounts,
    },
    proxy::Shared,
    state::Status,
};

/// A watched cluster.
pub(super) struct ClusterWatch {
    cluster: Cluster,
    /// Routes of the file, which take precedence over those of the cluster.
    file: watch::Sender<Arc<Vec<Route>>>,
    routes: watch::Receiver<Arc<ClusterRoutes>>,
    /// Routes returned last by [`Self::changed`].
    returned: Option<Arc<Vec<Arc<Route>>>>,
    writes: Arc<StatusCounts>,
}

/// State of the cluster watches for the admin listener.
pub(super) struct ClusterMetrics {
    liveness: Arc<Liveness>,
    routes: watch::Receiver<Arc<ClusterRoutes>>,
    writes: Arc<StatusCounts>,
}

/// Interval between updates of the status of routes.
const ROUTE_REPORT_INTERVAL: Duration = Duration::from_secs(1);

// === impl ClusterWatch ===

impl ClusterWatch {
    /// Watches the cluster, if one is configured.
    pub(super) fn start(
        cluster: Option<Cluster>,
        notifier: Option<Notifier>,
        config: &Config,
        shared: &Arc<Shared>,
        cold_starts: &Arc<ColdStarts>,
    ) -> Option<Self> {
        let cluster = cluster?;
        let (file, of_file) = watch::channel(Arc::new(config.routes.clone()));
        let (objects, routes) = cluster.routes(Config { routes: Vec::new(), ..config.clone() }, of_file);
        let (reports, of_gates) = watch::channel(Arc::default());
        let writes = cluster.write_status(objects, routes.clone(), of_gates);
        cluster.spawn(report(shared.clone(), cold_starts.clone(), notifier, reports));
        Some(Self { cluster, file, routes, returned: None, writes })
    }

    /// Waits until the routes of the cluster differ from those returned last. Without a cluster, waits forever.
    /// Cancel-safe.
    pub(super) async fn changed(watching: &mut Option<Self>) -> Arc<Vec<Arc<Route>>> {
        let Some(watching) = watching else { return std::future::pending().await };
        loop {
            let now = watching.routes.borrow_and_update().clone();
            let known = watching.returned.as_ref().is_some_and(|returned| Arc::ptr_eq(returned, &now.routes));
            if now.is_settled && !known {
                watching.returned = Some(now.routes.clone());
                return now.routes.clone();
            }
            if watching.routes.changed().await.is_err() {
                // The cluster is shut down.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Replaces the routes of the file.
    pub(super) fn set_file(&self, routes: &[Route]) {
        self.file.send_if_modified(|before| {
            let changed = **before != routes;
            if changed {
                *before = Arc::new(routes.to_vec());
            }
            changed
        });
    }

    /// Returns the state for the admin listener.
    pub(super) fn view(&self) -> ClusterMetrics {
        ClusterMetrics {
            liveness: self.cluster.liveness().clone(),
            routes: self.routes.clone(),
            writes: self.writes.clone(),
        }
    }

    /// Ends all watches.
    pub(super) async fn stop(self) {
        self.cluster.stop().await;
    }
}

// === impl ClusterMetrics ===

impl ClusterMetrics {
    pub(super) fn counts(&self) -> ClusterCounts {
        let of_kinds = self.routes.borrow().counts();
        let routes = of_kinds.into_iter().map(|((kind, reason), number)| (kind.name(), reason, number));
        let mut routes: Vec<_> = routes.collect();
        routes.sort_unstable();
        let StatusCounts { written, conflicts, denied, failed } = &*self.writes;
        let writes = [("written", written), ("conflict", conflicts), ("denied", denied), ("failed", failed)];
        let status_writes = writes.map(|(name, count)| (name, count.load(Ordering::Relaxed))).into();
        ClusterCounts { routes, status_writes, watches: self.liveness.counts() }
    }
}

/// Merges the routes of the file and of the cluster. Just after a reload, a cluster route may have a name that the file
/// has taken over; it is dropped.
pub(super) fn merged(file: &[Route], found: &[Arc<Route>]) -> Vec<Arc<Route>> {
    let names: HashSet<_> = file.iter().map(|route| &route.name).collect();
    let found = found.iter().filter(|route| !names.contains(&route.name));
    file.iter().cloned().map(Arc::new).chain(found.cloned()).collect()
}

/// Publishes the state of the cluster's routes at regular intervals.
async fn report(
    shared: Arc<Shared>,
    cold_starts: Arc<ColdStarts>,
    notifier: Option<Notifier>,
    reports: watch::Sender<Arc<RouteReports>>,
) {
    let mut ticks = interval(ROUTE_REPORT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let table = shared.table.load_full();
        let last = last_cold_starts(&cold_starts);
        let gates = table.gates().iter().filter(|gate| gate.key().as_str().contains('/'));
        let now = gates.map(|gate| {
            let scaled_object = notifier.as_ref().and_then(|notifier| notifier.scaled_object(gate.key()));
            let report = RouteReport { scaled_object, ..of_gate(gate, last.get(gate.key())) };
            (gate.key().clone(), report)
        });
        let now: RouteReports = now.collect();
        reports.send_if_modified(|before| {
            let changed = **before != now;
            if changed {
                *before = Arc::new(now);
            }
            changed
        });
    }
}

/// Returns the last completed cold start of each route among those in memory.
fn last_cold_starts(cold_starts: &ColdStarts) -> HashMap<RouteKey, LastColdStart> {
    let mut last = HashMap::new();
    for cold_start in cold_starts.recent(None, ColdStarts::MAX_RECORDS) {
        last.entry(cold_start.route.clone()).or_insert_with(|| cold_start_report::status(&cold_start));
    }
    last
}

fn of_gate(gate: &Gate, last: Option<&LastColdStart>) -> RouteReport {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let endpoints = gate.target().endpoints();
    let held = gate.counts_everywhere().held;
    let (state, failure) = match gate.target().status() {
        // Another replica starts the target.
        Status::Idle if held > 0 => (RouteState::Starting, None),
        // Only processes sleep, and cluster routes have none.
        Status::Idle | Status::Sleeping => (RouteState::Idle, None),
        Status::Starting => (RouteState::Starting, None),
        Status::Ready => (RouteState::Ready, None),
        Status::Stopping => (RouteState::Stopping, None),
        Status::Failed(reason) => (RouteState::Failed, Some(reason)),
    };
    RouteReport {
        state,
        failure,
        obstacle: gate.target().obstacle().map(|obstacle| (obstacle.kind, obstacle.message.full().clone())),
        ready: count(endpoints.iter().filter(|endpoint| endpoint.is_ready()).count()),
        endpoints: count(endpoints.len()),
        held,
        scaled_object: None,
        scales_itself: gate.policy().scale_by == ScaleBy::Kubernetes,
        last_cold_start: last.cloned(),
    }
}
