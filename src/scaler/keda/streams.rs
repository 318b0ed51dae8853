//! The two streams: whether there is demand, and which metrics there are.

use std::{sync::Arc, time::Duration};

use futures_util::stream::unfold;
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
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
use crate::admission::{Directory, Gate, Gates, OpenStream};

/// How often `true` is said again. KEDA drops a push that comes before it knows its own ScaledObject well, or at the
/// same time as another change of it.
const REPEAT: Duration = Duration::from_secs(5);

/// The route that a trigger names, as long as there is one. A stream outlives it: KEDA would back off up to a minute
/// from an error, so a route that comes later than its ScaledObject would be cold for that long.
struct Followed {
    trigger: Trigger,
    routes: watch::Receiver<Gates>,
    /// With what changes when its demand or its policies may have.
    route: Option<(Arc<Gate>, watch::Receiver<u64>)>,
    /// Keeps the receiver of its changes alive.
    _directory: Arc<Directory>,
    ending: CancellationToken,
}

/// Says whether demand is true: at once, with every change, and `true` every few seconds again.
pub(super) struct Activity {
    followed: Followed,
    /// Counts it as one that would hear a push. KEDA's other stream would not, and may be to another replica.
    open: Option<OpenStream>,
    said: Option<bool>,
    /// How many activations had been asked for when it was said.
    activations: u64,
    repeat: Instant,
}

/// Says which metrics there are: at once, and with every change.
pub(super) struct Specs {
    followed: Followed,
    said: Option<GetMetricSpecResponse>,
}

// === impl Followed ===

impl Followed {
    fn new(trigger: Trigger, directory: Arc<Directory>, ending: CancellationToken) -> Self {
        let mut routes = directory.changes();
        routes.mark_changed();
        let gates = directory.gates();
        if trigger.find(&gates).is_none() {
            tracing::warn!(
                reason = trigger.unknown(&gates).message(),
                "KEDA asks for a route that is not there yet"
            );
        }
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
    pub(super) fn new(trigger: Trigger, directory: Arc<Directory>, ending: CancellationToken) -> Self {
        let followed = Followed::new(trigger, directory, ending);
        Self { followed, open: None, said: None, activations: 0, repeat: Instant::now() }
    }

    /// Cancel-safe.
    async fn next(&mut self) -> Option<bool> {
        loop {
            let now = Instant::now();
            let mut until = None;
            let mut active = false;
            let gate = self.followed.look();
            if self.open.as_ref().map(OpenStream::gate).map(Arc::as_ptr) != gate.map(Arc::as_ptr) {
                self.open = gate.cloned().map(OpenStream::new);
            }
            if let Some(gate) = gate {
                let ours = gate.watched_counts();
                let all = ours.plus(gate.demand().peers());
                active = all.is_active();
                let is_new = self.said != Some(true) || all.activations > self.activations;
                self.activations = all.activations;
                if active && (is_new || now >= self.repeat) {
                    if is_new {
                        gate.demand().pushed();
                    }
                    gate.scaler_knows();
                    self.said = Some(true);
                    self.repeat = now + REPEAT;
                    return Some(true);
                }
                // Nothing tells when the demand of this replica becomes false with time; the others tell us.
                until = match (active, ours.is_active()) {
                    (true, true) => Some(self.repeat.min(now + gate.lasts_at_least())),
                    (true, false) => Some(self.repeat),
                    (false, _) => None,
                };
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
        permit: OwnedSemaphorePermit,
    ) -> impl Stream<Item = Result<IsActiveResponse, Status>> + Send {
        unfold((self, permit), |(mut activity, permit)| async {
            let result = activity.next().await?;
            Some((Ok(IsActiveResponse { result }), (activity, permit)))
        })
    }
}

// === impl Specs ===

impl Specs {
    pub(super) fn new(trigger: Trigger, directory: Arc<Directory>, ending: CancellationToken) -> Self {
        Self { followed: Followed::new(trigger, directory, ending), said: None }
    }

    /// Cancel-safe.
    async fn next(&mut self) -> Option<GetMetricSpecResponse> {
        loop {
            let trigger = self.followed.trigger.clone();
            let specs = self.followed.look().map(|gate| Metrics::of(&trigger, gate).specs());
            if specs.is_some() && specs != self.said {
                self.said.clone_from(&specs);
                return specs;
            }
            if !self.followed.changed(None).await {
                return None;
            }
        }
    }

    /// The stream, as long as it may be open.
    pub(super) fn stream(
        self,
        permit: OwnedSemaphorePermit,
    ) -> impl Stream<Item = Result<GetMetricSpecResponse, Status>> + Send {
        unfold((self, permit), |(mut specs, permit)| async {
            let response = specs.next().await?;
            Some((Ok(response), (specs, permit)))
        })
    }
}

#[cfg(test)]
mod tests;
