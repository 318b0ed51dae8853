//! The two streams: whether there is demand, and which metrics there are.

use std::{sync::Arc, time::Duration};

use futures_util::stream::unfold;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    metrics::Metrics,
    proto::{GetMetricSpecResponse, IsActiveResponse},
    trigger::Trigger,
};
use crate::{
    admission::{Directory, Gate, Gates, OpenStream},
    demand::PushReceiver,
    grpc::StreamPlace,
    places::Source,
};

/// Interval at which `true` is repeated until KEDA has scaled. KEDA drops a push that comes before it knows its own
/// ScaledObject well, or at the same time as another change of it. Afterwards a repetition would only cost writes of the
/// ScaledObject's status, and put off the way to zero.
const REPEAT: Duration = Duration::from_secs(5);

/// Repetitions where the number of replicas is not known: for a minute, which is as long as KEDA backs off at most. Its
/// polls go on.
const BLIND_REPEATS: u32 = 12;

/// How long a trigger may name no route before that is logged: objects come in any order, and after a start of ours routes
/// of the cluster come later than KEDA.
const ROUTE_GRACE: Duration = Duration::from_secs(10);

/// Longest interval at which the metrics are sent again to a ScaledObject whose status does not list them.
const MAX_RESEND: Duration = Duration::from_secs(60);

/// The route that a trigger names, as long as there is one. A stream outlives it, and may be older: KEDA would back off up
/// to a minute from an error.
struct Followed {
    trigger: Trigger,
    routes: watch::Receiver<Gates>,
    /// With what changes when its demand or its policies may have.
    route: Option<(Arc<Gate>, watch::Receiver<u64>)>,
    /// Keeps the receiver of its changes alive.
    _directory: Arc<Directory>,
    ending: CancellationToken,
}

/// Says whether demand is true: at once, with every change, and `true` again until KEDA has scaled.
pub(super) struct Activity {
    followed: Followed,
    /// Counts it as one that would hear a push. KEDA's other stream would not, and may be to another replica.
    open: Option<OpenStream>,
    said: Option<bool>,
    /// How many activations had been asked for when it was said.
    activations: u64,
    /// Whether the ScaledObject's status listed our metric then.
    is_listed: bool,
    repeat: Instant,
    /// Repetitions since `true` was news.
    repeats: u32,
    /// When it is logged that there is no route; `None`: it has been.
    warn_at: Option<Instant>,
    peer: Source,
}

/// Says which metrics there are: at once, with every change, and again while the ScaledObject's status does not list them:
/// KEDA 2.21 then looks up what it should list, which it does not for a push that it drops.
pub(super) struct Specs {
    followed: Followed,
    said: Option<GetMetricSpecResponse>,
    resend: Instant,
    pause: Duration,
}

// === impl Followed ===

impl Followed {
    fn new(trigger: Trigger, directory: Arc<Directory>, ending: CancellationToken) -> Self {
        let mut routes = directory.changes();
        routes.mark_changed();
        Self { trigger, routes, route: None, _directory: directory, ending }
    }

    /// The route as it is now. What changes from here on wakes [`Self::changed`].
    fn look(&mut self) -> Option<&Arc<Gate>> {
        if self.routes.has_changed().unwrap_or(false) {
            let gate = self.trigger.find(&self.routes.borrow_and_update());
            let is_same = match (&self.route, &gate) {
                (Some((known, _)), Some(gate)) => Arc::ptr_eq(known, gate),
                _ => false,
            };
            if !is_same {
                self.route = gate.map(|gate| {
                    let changes = gate.demand().changes();
                    (gate, changes)
                });
            }
        }
        let (route, changes) = self.route.as_mut()?;
        changes.mark_unchanged();
        Some(route)
    }

    /// What the cluster shows of the ScaledObject.
    fn receiver(&self) -> Option<PushReceiver> {
        let (namespace, name) = self.trigger.object();
        self.route.as_ref()?.0.demand().receiver(namespace, name)
    }

    fn warn_of_no_route(&self, peer: Source) {
        let reason = self.trigger.unknown(&self.routes.borrow());
        tracing::warn!(
            %peer,
            reason,
            "KEDA asks for a route that is not there yet"
        );
    }

    /// Waits until there may be something new, or `until`. False: the stream ends. Cancel-safe.
    async fn changed(&mut self, until: Option<Instant>) -> bool {
        let Self { routes, route, ending, .. } = self;
        let changed = async {
            match route {
                Some((_, changes)) => changes.changed().await.is_ok(),
                None => std::future::pending().await,
            }
        };
        let elapsed = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // The end first, or a lively route would keep the stream open.
            biased;
            () = ending.cancelled() => false,
            changed = changed => changed,
            changed = routes.changed() => {
                // To be seen by the next look, which compares.
                routes.mark_changed();
                changed.is_ok()
            }
            () = elapsed => true,
        }
    }
}

// === impl Activity ===

impl Activity {
    pub(super) fn new(
        trigger: Trigger,
        directory: Arc<Directory>,
        ending: CancellationToken,
        peer: Source,
    ) -> Self {
        let followed = Followed::new(trigger, directory, ending);
        let now = Instant::now();
        Self {
            followed,
            open: None,
            said: None,
            activations: 0,
            is_listed: true,
            repeat: now,
            repeats: 0,
            warn_at: Some(now + ROUTE_GRACE),
            peer,
        }
    }

    /// Cancel-safe.
    async fn next(&mut self) -> Option<bool> {
        loop {
            let now = Instant::now();
            let mut until = None;
            let mut active = false;
            let gate = self.followed.look().cloned();
            if self.open.as_ref().map(OpenStream::gate).map(Arc::as_ptr) != gate.as_ref().map(Arc::as_ptr) {
                self.open = gate.clone().map(OpenStream::new);
            }
            if let Some(gate) = gate {
                let receiver = self.followed.receiver();
                let is_listed = receiver.as_ref().is_none_or(|receiver| receiver.is_listed);
                let is_scaled = receiver.and_then(|receiver| receiver.is_scaled);
                let is_wanted = match is_scaled {
                    Some(is_scaled) => !is_scaled,
                    None => !gate.target().is_up() && self.repeats < BLIND_REPEATS,
                };
                let ours = gate.counts_or_mark_idle();
                let all = ours.plus(gate.demand().peers());
                active = all.is_active();
                // What was said before was dropped.
                let is_heard_now = is_listed && !self.is_listed;
                let is_new = self.said != Some(true) || all.activations > self.activations;
                (self.activations, self.is_listed) = (all.activations, is_listed);
                if active && (is_new || is_wanted && (is_heard_now || now >= self.repeat)) {
                    if is_new {
                        gate.demand().record_push();
                    }
                    if is_listed {
                        gate.record_scaler_notified();
                    }
                    self.repeats = if is_new { 0 } else { self.repeats + 1 };
                    self.said = Some(true);
                    self.repeat = now + REPEAT;
                    return Some(true);
                }
                // Nothing tells when the demand of this replica becomes false with time; the others tell us.
                let lasts = ours.is_active().then(|| now + gate.active_for_at_least());
                let repeat = is_wanted.then_some(self.repeat);
                until = [lasts, repeat].into_iter().flatten().min().filter(|_| active);
                self.warn_at = Some(now + ROUTE_GRACE);
            } else if self.warn_at.is_some_and(|at| now >= at) {
                self.warn_at = None;
                self.followed.warn_of_no_route(self.peer);
            } else {
                until = self.warn_at;
            }
            if !active && self.said != Some(false) {
                self.said = Some(false);
                return Some(false);
            }
            if !self.followed.changed(until).await {
                return None;
            }
        }
    }

    /// The stream, as long as it may be open.
    pub(super) fn stream(
        self,
        place: StreamPlace,
    ) -> impl Stream<Item = Result<IsActiveResponse, Status>> + Send {
        unfold((self, place), |(mut activity, place)| async {
            let result = activity.next().await?;
            Some((Ok(IsActiveResponse { result }), (activity, place)))
        })
    }
}

// === impl Specs ===

impl Specs {
    pub(super) fn new(trigger: Trigger, directory: Arc<Directory>, ending: CancellationToken) -> Self {
        let followed = Followed::new(trigger, directory, ending);
        Self { followed, said: None, resend: Instant::now(), pause: REPEAT }
    }

    /// Cancel-safe.
    async fn next(&mut self) -> Option<GetMetricSpecResponse> {
        loop {
            let now = Instant::now();
            let gate = self.followed.look().cloned();
            let specs = Metrics::of(&self.followed.trigger, gate.as_deref()).specs();
            let is_listed = self.followed.receiver().is_none_or(|receiver| receiver.is_listed);
            let is_new = self.said.as_ref() != Some(&specs);
            if is_listed {
                self.pause = REPEAT;
            }
            if is_new || (!is_listed && now >= self.resend) {
                self.pause = if is_new { REPEAT } else { MAX_RESEND.min(self.pause * 2) };
                self.resend = now + self.pause;
                self.said = Some(specs.clone());
                return Some(specs);
            }
            if !self.followed.changed((!is_listed).then_some(self.resend)).await {
                return None;
            }
        }
    }

    /// The stream, as long as it may be open.
    pub(super) fn stream(
        self,
        place: StreamPlace,
    ) -> impl Stream<Item = Result<GetMetricSpecResponse, Status>> + Send {
        unfold((self, place), |(mut specs, place)| async {
            let response = specs.next().await?;
            Some((Ok(response), (specs, place)))
        })
    }
}

#[cfg(test)]
mod tests;
