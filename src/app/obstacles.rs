//! Wiring of what stands in the way of targets: from what is known of the cluster to the gates, and to whoever looks on.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{pushes::receivers, told};
use crate::{
    admission::Gate,
    coldstart::{ColdStart, ColdStartOutcome},
    domain::{ObstacleKind, Phase, Route, RouteKey},
    kube::{
        About, AllFacts, Cluster, DirectScale, Events, Facts, Liveness, Notice, Pods, ScaledObjects, Seen,
        Trouble, session,
    },
    proxy::Shared,
    scaler,
    state::Obstacle,
};

/// What is known of what stands in the way, and who is told.
pub(super) struct Obstacles {
    cluster: Cluster,
    scaled_objects: watch::Receiver<ScaledObjects>,
    teller: Teller,
}

/// Tells the cluster what happens to routes.
#[derive(Clone)]
pub(super) struct Teller {
    liveness: Arc<Liveness>,
    facts: watch::Receiver<Arc<AllFacts>>,
    events: Events,
}

/// What is known of one route from one look to the next.
#[derive(Default)]
struct Looked {
    /// Since when KEDA has had no stream.
    unheard_since: Option<Instant>,
    /// Since when KEDA has dropped what is pushed.
    dropped_since: Option<Instant>,
    /// What was told last of what stands in the way.
    told: Option<Arc<Obstacle>>,
    /// What was found last that may pass in a moment, and since when.
    settling: Option<(ObstacleKind, Instant)>,
}

/// How often it is looked whether endpoints, streams and pauses fit together: not all of that tells when it changes.
const LOOK: Duration = Duration::from_secs(1);

/// How long no ScaledObject may name a route before that is told: the two come one after the other, in whatever order.
/// Who waits for the route is told at once.
const TOGETHER: Duration = Duration::from_secs(5);

/// How long something must last that also comes about for a moment, as one object is created or seen after the other.
const SETTLING: Duration = Duration::from_secs(5);

// === impl Looked ===

impl Looked {
    /// What stands in the way, once it is no matter of a moment.
    fn settled(&mut self, trouble: Option<Trouble>) -> Option<Trouble> {
        use ObstacleKind::{NoPodsSelected, NoService, NotReady, Volume};
        let kind = trouble.as_ref().map(|trouble| trouble.kind);
        let Some(kind) = kind.filter(|kind| matches!(kind, NoPodsSelected | NoService | NotReady | Volume))
        else {
            self.settling = None;
            return trouble;
        };
        let known = self.settling.filter(|(known, _)| *known == kind);
        let (_, since) = *self.settling.insert(known.unwrap_or_else(|| (kind, Instant::now())));
        trouble.filter(|_| since.elapsed() >= SETTLING)
    }
}

// === impl Obstacles ===

impl Obstacles {
    /// Follows the cluster for these routes, and has what scales without KEDA scale there.
    pub(super) fn new(
        cluster: &Cluster,
        pods: Arc<Pods>,
        routes: watch::Receiver<Arc<Vec<Arc<Route>>>>,
        options: &mut scaler::Options,
    ) -> Self {
        let scaled_objects = cluster.scaled_objects();
        let direct = DirectScale::new(cluster.clone(), scaled_objects.clone());
        let discovery = options.discovery.clone();
        let facts = cluster.facts(routes, scaled_objects.clone(), direct.refusals(), pods, discovery);
        options.scale = Arc::new(direct);
        let teller = Teller { liveness: cluster.liveness().clone(), facts, events: cluster.events() };
        Self { cluster: cluster.clone(), scaled_objects, teller }
    }

    /// Who tells the cluster what happens to routes.
    pub(super) const fn teller(&self) -> &Teller {
        &self.teller
    }

    /// Tells these gates, and ends the sessions of ScaledObjects, until the cluster is left.
    pub(super) fn start(self, shared: Arc<Shared>) {
        let ending = session::enforce(self.cluster.clone(), self.scaled_objects, self.teller.events.clone());
        self.cluster.spawn(ending);
        let gates = move || shared.table.load().gates().to_vec();
        self.cluster.spawn(tell_gates(gates, self.teller));
    }
}

async fn tell_gates(gates: impl Fn() -> Vec<Arc<Gate>>, teller: Teller) {
    let mut facts = teller.facts.clone();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looked = HashMap::<RouteKey, Looked>::new();
    loop {
        let known = facts.borrow_and_update().clone();
        let gates = gates();
        let keys: HashSet<_> = gates.iter().map(|gate| gate.key()).collect();
        looked.retain(|route, _| keys.contains(route));
        for gate in &gates {
            if let Some(facts) = known.get(gate.key()) {
                tell(gate, facts, looked.entry(gate.key().clone()).or_default(), &teller);
            }
        }
        tokio::select! {
            biased; // either will do
            Ok(()) = facts.changed() => {}
            _ = ticks.tick() => {}
        }
    }
}

/// Looks at one target and says what stands in its way, and when it was told to have replicas.
fn tell(gate: &Gate, facts: &Facts, looked: &mut Looked, teller: &Teller) {
    if let Some(raised) = facts.raised() {
        gate.cold_starts().observe(Phase::Scale, raised.clone());
    }
    let target = gate.target();
    let no_stream_for = if gate.counts_everywhere().streams > 0 {
        looked.unheard_since = None;
        None
    } else {
        Some(looked.unheard_since.get_or_insert_with(Instant::now).elapsed())
    };
    gate.demand().set_receivers(receivers(facts));
    let dropped_for = if facts.drops_pushes().is_none() {
        looked.dropped_since = None;
        None
    } else {
        Some(looked.dropped_since.get_or_insert_with(Instant::now).elapsed())
    };
    let trouble = if target.is_up() {
        None
    } else {
        let namespace = gate.key().namespaced().map(|(namespace, _)| namespace);
        let seen = Seen {
            pods: target.endpoints().iter().any(|endpoint| endpoint.servers() > 0),
            no_stream_for,
            dropped_for,
            api_server: teller.liveness.trouble(namespace),
            refusing: target.refusing_for(SETTLING),
        };
        looked.settled(facts.obstacle(gate.key(), &seen))
    };
    target.set_obstacle(trouble.map(|trouble| Obstacle::new(trouble.kind, trouble.message)));
    // Endpoints go away without a word to who waits.
    gate.give_up_if_paused();
    let obstacle = target.obstacle();
    let is_young = obstacle.as_ref().is_some_and(|obstacle| {
        obstacle.kind == ObstacleKind::NoScaledObject && obstacle.since.elapsed() < TOGETHER
    });
    let is_told = match (&looked.told, &obstacle) {
        (Some(told), Some(now)) => told.is_same(now),
        (told, now) => told.is_none() && now.is_none(),
    };
    if is_told || is_young {
        return;
    }
    let route = gate.key();
    match &obstacle {
        Some(obstacle) => {
            let kind = obstacle.kind.name();
            match obstacle.kind {
                // Logged by what probes. One that only does not answer yet is no news for the cluster.
                ObstacleKind::NotAnswering => {}
                ObstacleKind::NameUnresolved | ObstacleKind::ProbeRejected => {
                    teller.obstacle(route, obstacle)
                }
                // Who pauses mostly means to.
                ObstacleKind::AutoscalingPaused => {
                    tracing::info!(%route, kind, reason = %obstacle.message, "the target cannot come up");
                    teller.obstacle(route, obstacle);
                }
                _ => {
                    tracing::warn!(%route, kind, reason = %obstacle.message, "the target cannot come up");
                    teller.obstacle(route, obstacle);
                }
            }
        }
        None => tracing::info!(%route, "nothing stands in the way of the target any more"),
    }
    looked.told = obstacle;
}

// === impl Teller ===

impl Teller {
    /// The ScaledObject that names a route.
    pub(super) fn scaled_object(&self, route: &RouteKey) -> Option<Arc<str>> {
        let facts = self.facts.borrow();
        let scaled = facts.get(route)?.scaled_objects.first()?;
        // A route of the cluster has it in its own namespace.
        let own = route.namespaced().is_some_and(|(namespace, _)| namespace == scaled.namespace);
        Some(if own {
            scaled.name.as_str().into()
        } else {
            format!("{}/{}", scaled.namespace, scaled.name).into()
        })
    }

    /// A cold start has ended.
    pub(super) fn cold_start(&self, cold_start: &ColdStart) {
        let (is_warning, reason) = match cold_start.outcome {
            Some(ColdStartOutcome::Completed) => (false, "ColdStartCompleted"),
            Some(ColdStartOutcome::Failed) => (true, "ColdStartFailed"),
            Some(ColdStartOutcome::Abandoned) | None => return,
        };
        let note = told::note(cold_start);
        self.say(&cold_start.route, is_warning, reason, note);
    }

    fn obstacle(&self, route: &RouteKey, obstacle: &Obstacle) {
        let is_warning = obstacle.kind != ObstacleKind::AutoscalingPaused;
        self.say(route, is_warning, in_one_word(obstacle.kind), obstacle.message.to_string());
    }

    /// A route of the file has no object: then it is said of the ScaledObject that names it, if there is one.
    fn say(&self, route: &RouteKey, is_warning: bool, reason: &'static str, note: String) {
        let about = if route.namespaced().is_some() {
            About::Route(route.clone())
        } else {
            let facts = self.facts.borrow();
            let Some(scaled) = facts.get(route).and_then(|facts| facts.scaled_objects.first()) else {
                return;
            };
            About::ScaledObject { namespace: scaled.namespace.clone(), name: scaled.name.clone() }
        };
        self.events.tell(Notice { about, is_warning, reason, note });
    }
}

/// The reason of an Event: Kubernetes writes them in one word.
const fn in_one_word(kind: ObstacleKind) -> &'static str {
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
