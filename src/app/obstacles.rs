//! Wiring of obstacles: from the cluster to gates, Events and the log.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{cold_start_report, pushes::receivers};
use crate::{
    admission::Gate,
    coldstart::{ColdStart, ColdStartOutcome},
    domain::{ObstacleKind, Phase, Route, RouteKey},
    kube::{
        AllFacts, Cluster, DirectScale, EventNotice, EventSubject, Events, Facts, KubeProblem, Liveness,
        PodWatches, ProxyView, ScaledObjects, session,
    },
    proxy::Shared,
    scaler,
    state::Obstacle,
};

/// Sources of obstacles in the cluster, and the notifier.
pub(super) struct ObstacleSources {
    cluster: Cluster,
    scaled_objects: watch::Receiver<ScaledObjects>,
    notifier: Notifier,
}

/// Reports events of routes to the cluster.
#[derive(Clone)]
pub(super) struct Notifier {
    liveness: Arc<Liveness>,
    facts: watch::Receiver<Arc<AllFacts>>,
    events: Events,
}

/// Observations of one route that persist between updates.
#[derive(Default)]
struct RouteHistory {
    /// Start of the current period in which KEDA has had no stream.
    no_stream_since: Option<Instant>,
    /// Start of the current period in which KEDA has dropped pushes.
    pushes_dropped_since: Option<Instant>,
    /// Obstacle reported last.
    reported: Option<Arc<Obstacle>>,
    /// Last possibly transient obstacle, and its first observation.
    unsettled_obstacle: Option<(ObstacleKind, Instant)>,
}

/// Interval between checks. The checks poll, since not every change of endpoints, streams and pauses sends a
/// notification.
const OBSTACLE_INTERVAL: Duration = Duration::from_secs(1);

/// Delay before a missing ScaledObject is logged: route and ScaledObject may be created in any order. Held requests
/// are affected immediately.
const SCALED_OBJECT_GRACE: Duration = Duration::from_secs(5);

/// Minimum duration of obstacles that also occur briefly while objects are created.
const SETTLE_PERIOD: Duration = Duration::from_secs(5);

// === impl RouteHistory ===

impl RouteHistory {
    /// Returns the obstacle unless it may be transient.
    fn filter_transient(&mut self, trouble: Option<KubeProblem>) -> Option<KubeProblem> {
        use ObstacleKind::{NoPodsSelected, NoService, NotReady, Volume};
        let kind = trouble.as_ref().map(|trouble| trouble.kind);
        let Some(kind) = kind.filter(|kind| matches!(kind, NoPodsSelected | NoService | NotReady | Volume))
        else {
            self.unsettled_obstacle = None;
            return trouble;
        };
        let known = self.unsettled_obstacle.filter(|(known, _)| *known == kind);
        let (_, since) = *self.unsettled_obstacle.insert(known.unwrap_or_else(|| (kind, Instant::now())));
        trouble.filter(|_| since.elapsed() >= SETTLE_PERIOD)
    }
}

// === impl ObstacleSources ===

impl ObstacleSources {
    /// Watches the cluster for these routes, and installs scaling without KEDA in `options`.
    pub(super) fn new(
        cluster: &Cluster,
        pods: Arc<PodWatches>,
        routes: watch::Receiver<Arc<Vec<Arc<Route>>>>,
        options: &mut scaler::Options,
    ) -> Self {
        let scaled_objects = cluster.scaled_objects();
        let direct = DirectScale::new(cluster.clone(), scaled_objects.clone());
        let discovery = options.discovery.clone();
        let facts = cluster.facts(routes, scaled_objects.clone(), direct.refusals(), pods, discovery);
        options.scale = Arc::new(direct);
        let notifier = Notifier { liveness: cluster.liveness().clone(), facts, events: cluster.events() };
        Self { cluster: cluster.clone(), scaled_objects, notifier }
    }

    pub(super) const fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// Updates gates and ends expired sessions until the cluster is shut down.
    pub(super) fn start(self, shared: Arc<Shared>) {
        let ending =
            session::enforce(self.cluster.clone(), self.scaled_objects, self.notifier.events.clone());
        self.cluster.spawn(ending);
        let gates = move || shared.table.load().gates().to_vec();
        self.cluster.spawn(update_gates(gates, self.notifier));
    }
}

async fn update_gates(gates: impl Fn() -> Vec<Arc<Gate>>, notifier: Notifier) {
    let mut facts = notifier.facts.clone();
    let mut ticks = interval(OBSTACLE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut histories = HashMap::<RouteKey, RouteHistory>::new();
    loop {
        let known = facts.borrow_and_update().clone();
        let gates = gates();
        let keys: HashSet<_> = gates.iter().map(|gate| gate.key()).collect();
        histories.retain(|route, _| keys.contains(route));
        for gate in &gates {
            if let Some(facts) = known.get(gate.key()) {
                update_gate(gate, facts, histories.entry(gate.key().clone()).or_default(), &notifier);
            }
        }
        tokio::select! {
            biased; // the order is irrelevant
            Ok(()) = facts.changed() => {}
            _ = ticks.tick() => {}
        }
    }
}

/// Updates the obstacle of one target, and records when its replicas were raised.
fn update_gate(gate: &Gate, facts: &Facts, history: &mut RouteHistory, notifier: &Notifier) {
    if let Some(raised) = facts.raised() {
        gate.cold_starts().observe(Phase::Scale, raised.clone());
    }
    let target = gate.target();
    let no_stream_for = if gate.counts_everywhere().streams > 0 {
        history.no_stream_since = None;
        None
    } else {
        Some(history.no_stream_since.get_or_insert_with(Instant::now).elapsed())
    };
    gate.demand().set_receivers(receivers(facts));
    let dropped_for = if facts.drops_pushes().is_none() {
        history.pushes_dropped_since = None;
        None
    } else {
        Some(history.pushes_dropped_since.get_or_insert_with(Instant::now).elapsed())
    };
    let trouble = if target.is_up() {
        None
    } else {
        let namespace = gate.key().namespaced().map(|(namespace, _)| namespace);
        let seen = ProxyView {
            pods: target.endpoints().iter().any(|endpoint| endpoint.servers() > 0),
            no_stream_for,
            dropped_for,
            api_server: notifier.liveness.describe_loss(namespace),
            refusing: target.refusing_for(SETTLE_PERIOD),
        };
        history.filter_transient(facts.obstacle(gate.key(), &seen))
    };
    target.set_obstacle(trouble.map(|trouble| Obstacle::new(trouble.kind, trouble.message)));
    // Held requests get no notification when endpoints disappear, so a pause is checked again here.
    gate.fail_held_if_paused();
    let obstacle = target.obstacle();
    let is_young = obstacle.as_ref().is_some_and(|obstacle| {
        obstacle.kind == ObstacleKind::NoScaledObject && obstacle.since.elapsed() < SCALED_OBJECT_GRACE
    });
    let is_known = match (&history.reported, &obstacle) {
        (Some(reported), Some(now)) => reported.is_same(now),
        (reported, now) => reported.is_none() && now.is_none(),
    };
    if is_known || is_young {
        return;
    }
    let route = gate.key();
    match &obstacle {
        Some(obstacle) => {
            let kind = obstacle.kind.name();
            match obstacle.kind {
                // Logged by the prober. A server that does not answer yet warrants no Event.
                ObstacleKind::NotAnswering => {}
                ObstacleKind::NameUnresolved | ObstacleKind::ProbeRejected => {
                    notifier.obstacle(route, obstacle)
                }
                // A pause is usually intended.
                ObstacleKind::AutoscalingPaused => {
                    tracing::info!(%route, kind, reason = %obstacle.message, "the target cannot start");
                    notifier.obstacle(route, obstacle);
                }
                _ => {
                    tracing::warn!(%route, kind, reason = %obstacle.message, "the target cannot start");
                    notifier.obstacle(route, obstacle);
                }
            }
        }
        None => tracing::info!(%route, "the target is no longer blocked"),
    }
    history.reported = obstacle;
}

// === impl Notifier ===

impl Notifier {
    /// Returns the ScaledObject that names a route.
    pub(super) fn scaled_object(&self, route: &RouteKey) -> Option<Arc<str>> {
        let facts = self.facts.borrow();
        let scaled = facts.get(route)?.scaled_objects.first()?;
        // Omit the namespace if it is the route's own.
        let own = route.namespaced().is_some_and(|(namespace, _)| namespace == scaled.namespace);
        Some(if own {
            scaled.name.as_str().into()
        } else {
            format!("{}/{}", scaled.namespace, scaled.name).into()
        })
    }

    /// Emits an Event for a completed cold start.
    pub(super) fn cold_start(&self, cold_start: &ColdStart) {
        let (is_warning, reason) = match cold_start.outcome {
            Some(ColdStartOutcome::Completed) => (false, "ColdStartCompleted"),
            Some(ColdStartOutcome::Failed) => (true, "ColdStartFailed"),
            Some(ColdStartOutcome::Abandoned) | None => return,
        };
        let note = cold_start_report::note(cold_start);
        self.emit(&cold_start.route, is_warning, reason, note);
    }

    fn obstacle(&self, route: &RouteKey, obstacle: &Obstacle) {
        let is_warning = obstacle.kind != ObstacleKind::AutoscalingPaused;
        self.emit(route, is_warning, event_reason(obstacle.kind), obstacle.message.to_string());
    }

    /// Emits an Event about the route's object, or for a route of the file about its ScaledObject, if there is one.
    fn emit(&self, route: &RouteKey, is_warning: bool, reason: &'static str, note: String) {
        let about = if route.namespaced().is_some() {
            EventSubject::Route(route.clone())
        } else {
            let facts = self.facts.borrow();
            let Some(scaled) = facts.get(route).and_then(|facts| facts.scaled_objects.first()) else {
                return;
            };
            EventSubject::ScaledObject { namespace: scaled.namespace.clone(), name: scaled.name.clone() }
        };
        self.events.publish(EventNotice { about, is_warning, reason, note });
    }
}

/// Returns the reason of an Event in Kubernetes' CamelCase.
const fn event_reason(kind: ObstacleKind) -> &'static str {
    match kind {
        ObstacleKind::AutoscalingPaused => "AutoscalingPaused",
        ObstacleKind::NoScaledObject => "NoScaledObject",
        ObstacleKind::ScaleRefused => "ScaleRefused",
        ObstacleKind::NoKedaStream => "NoKedaStream",
        ObstacleKind::PushDropped => "PushDropped",
        ObstacleKind::ImagePull => "ImagePull",
        ObstacleKind::CrashLoop => "CrashLoop",
        ObstacleKind::Unschedulable => "Unschedulable",
        ObstacleKind::Quota => "Quota",
        ObstacleKind::OutOfMemory => "OutOfMemory",
        ObstacleKind::ApiServerUnreachable => "ApiServerUnreachable",
        ObstacleKind::NoService => "NoService",
        ObstacleKind::NoPodsSelected => "NoPodsSelected",
        ObstacleKind::PortRefused => "PortRefused",
        ObstacleKind::Volume => "Volume",
        ObstacleKind::NotReady => "NotReady",
        ObstacleKind::NameUnresolved => "NameUnresolved",
        ObstacleKind::ProbeRejected => "ProbeRejected",
        ObstacleKind::NotAnswering => "NotAnswering",
    }
}

#[cfg(test)]
mod tests;
