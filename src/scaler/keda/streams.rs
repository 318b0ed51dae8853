//! The streams `StreamIsActive` and `StreamMetricSpec`.

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
    metrics::TriggerMetrics,
    proto::{GetMetricSpecResponse, IsActiveResponse},
    trigger::Trigger,
};
use crate::{
    admission::{Directory, Gate, Gates, OpenStream},
    demand::PushReceiver,
    grpc::StreamPlace,
    places::Source,
};

/// Interval at which `true` is repeated until KEDA has scaled. KEDA drops a push before it has reconciled its ScaledObject,
/// or during another change of it. Later repetitions would only write the ScaledObject's status and delay scaling to zero.
const REPEAT_INTERVAL: Duration = Duration::from_secs(5);

/// Maximum number of repetitions if the number of replicas is unknown: for a minute, KEDA's longest backoff. After
/// that, KEDA still polls.
const MAX_BLIND_REPEATS: u32 = 12;

/// Time after which an unknown route is logged: objects are applied in any order, and after a start of this proxy KEDA
/// connects before the cluster's routes are listed.
const ROUTE_GRACE: Duration = Duration::from_secs(10);

/// Longest interval at which metrics are resent to a ScaledObject whose status does not list them.
const MAX_RESEND_INTERVAL: Duration = Duration::from_secs(60);

/// Follower of the route that a trigger names. The stream may be older than the route and outlive it, as KEDA backs off
/// up to a minute after an error.
struct RouteFollower {
    trigger: Trigger,
    routes: watch::Receiver<Gates>,
    /// The route, and its changes of demand and policy.
    route: Option<(Arc<Gate>, watch::Receiver<u64>)>,
    /// Keeps the sender of `routes` alive.
    _directory: Arc<Directory>,
    ending: CancellationToken,
}

/// Source of `StreamIsActive`: sends the demand at once, on every change, and `true` repeatedly until KEDA has scaled.
pub(super) struct Activity {
    route: RouteFollower,
    /// Counts this stream as a receiver of pushes, which `StreamMetricSpec` is not.
    open: Option<OpenStream>,
    last_sent: Option<bool>,
    /// Activations requested as of the last message.
    activations: u64,
    /// The ScaledObject's status listed the metric as of the last message.
    is_listed: bool,
    repeat_at: Instant,
    /// Repetitions since the last edge or activation.
    repeats: u32,
    /// Time at which an unknown route is logged; `None` once it was.
    warn_at: Option<Instant>,
    peer: Source,
}

/// Source of `StreamMetricSpec`: sends the metrics at once, on every change, and again while the ScaledObject's status
/// does not list them, which makes KEDA 2.21 update that list.
pub(super) struct Specs {
    route: RouteFollower,
    last_sent: Option<GetMetricSpecResponse>,
    resend_at: Instant,
    pause: Duration,
}

// === impl RouteFollower ===

impl RouteFollower {
    fn new(trigger: Trigger, directory: Arc<Directory>, ending: CancellationToken) -> Self {
        let mut routes = directory.changes();
        routes.mark_changed();
        Self { trigger, routes, route: None, _directory: directory, ending }
    }

    /// Returns the current route, and marks all changes so far as processed for [`Self::changed`].
    fn current(&mut self) -> Option<&Arc<Gate>> {
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

    /// Returns the ScaledObject, if the cluster has it.
    fn receiver(&self) -> Option<PushReceiver> {
        let (namespace, name) = self.trigger.object();
        self.route.as_ref()?.0.demand().receiver(namespace, name)
    }

    fn warn_unknown_route(&self, peer: Source) {
        let reason = self.trigger.describe_unknown(&self.routes.borrow());
        tracing::warn!(%peer, reason, "KEDA asks for an unknown route");
    }

    /// Waits for a change, or until `until`. Returns `false` if the stream must end. Cancel-safe.
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
            // Shutdown first, or a busy route would keep the stream open.
            biased;
            () = ending.cancelled() => false,
            changed = changed => changed,
            changed = routes.changed() => {
                // `current` must process the change: it compares the routes.
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
        let route = RouteFollower::new(trigger, directory, ending);
        let now = Instant::now();
        Self {
            route,
            open: None,
            last_sent: None,
            activations: 0,
            is_listed: true,
            repeat_at: now,
            repeats: 0,
            warn_at: Some(now + ROUTE_GRACE),
            peer,
        }
    }

    /// Waits for the next message. Cancel-safe.
    async fn next(&mut self) -> Option<bool> {
        loop {
            let now = Instant::now();
            let mut until = None;
            let mut active = false;
            let gate = self.route.current().cloned();
            if self.open.as_ref().map(OpenStream::gate).map(Arc::as_ptr) != gate.as_ref().map(Arc::as_ptr) {
                self.open = gate.clone().map(OpenStream::new);
            }
            if let Some(gate) = gate {
                let receiver = self.route.receiver();
                let is_listed = receiver.as_ref().is_none_or(|receiver| receiver.is_listed);
                let is_scaled = receiver.and_then(|receiver| receiver.is_scaled);
                let is_wanted = match is_scaled {
                    Some(is_scaled) => !is_scaled,
                    None => !gate.target().is_up() && self.repeats < MAX_BLIND_REPEATS,
                };
                let ours = gate.counts_or_mark_idle();
                let all = ours.plus(gate.demand().peers());
                active = all.is_active();
                // KEDA dropped all pushes that were sent before the metric was listed.
                let is_newly_listed = is_listed && !self.is_listed;
                let is_new = self.last_sent != Some(true) || all.activations > self.activations;
                (self.activations, self.is_listed) = (all.activations, is_listed);
                if active && (is_new || is_wanted && (is_newly_listed || now >= self.repeat_at)) {
                    if is_new {
                        gate.demand().record_push();
                    }
                    if is_listed {
                        gate.record_scaler_notified();
                    }
                    self.repeats = if is_new { 0 } else { self.repeats + 1 };
                    self.last_sent = Some(true);
                    self.repeat_at = now + REPEAT_INTERVAL;
                    return Some(true);
                }
                // The demand of this replica ends without a notification; that of peers sends one.
                let lasts = ours.is_active().then(|| now + gate.active_for_at_least());
                let repeat = is_wanted.then_some(self.repeat_at);
                until = [lasts, repeat].into_iter().flatten().min().filter(|_| active);
                self.warn_at = Some(now + ROUTE_GRACE);
            } else if self.warn_at.is_some_and(|at| now >= at) {
                self.warn_at = None;
                self.route.warn_unknown_route(self.peer);
            } else {
                until = self.warn_at;
            }
            if !active && self.last_sent != Some(false) {
                self.last_sent = Some(false);
                return Some(false);
            }
            if !self.route.changed(until).await {
                return None;
            }
        }
    }

    /// Returns the stream of messages.
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
        let route = RouteFollower::new(trigger, directory, ending);
        Self { route, last_sent: None, resend_at: Instant::now(), pause: REPEAT_INTERVAL }
    }

    /// Waits for the next message. Cancel-safe.
    async fn next(&mut self) -> Option<GetMetricSpecResponse> {
        loop {
            let now = Instant::now();
            let gate = self.route.current().cloned();
            let specs = TriggerMetrics::of(&self.route.trigger, gate.as_deref()).specs();
            let is_listed = self.route.receiver().is_none_or(|receiver| receiver.is_listed);
            let is_new = self.last_sent.as_ref() != Some(&specs);
            if is_listed {
                self.pause = REPEAT_INTERVAL;
            }
            if is_new || (!is_listed && now >= self.resend_at) {
                self.pause = if is_new { REPEAT_INTERVAL } else { MAX_RESEND_INTERVAL.min(self.pause * 2) };
                self.resend_at = now + self.pause;
                self.last_sent = Some(specs.clone());
                return Some(specs);
            }
            if !self.route.changed((!is_listed).then_some(self.resend_at)).await {
                return None;
            }
        }
    }

    /// Returns the stream of messages.
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
