//! Scaling without KEDA: from zero to one when the target is wanted, and to zero when it is idle.
//!
//! Every replica of the proxy does this, without a leader: each reads the scale before it patches it, and a concurrent
//! patch fails with a conflict.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::activator::Activator;
use crate::{
    admission::Gate,
    domain::{Backoff, Phase, ScaleBy, Workload},
    state::{Observation, Scale, ScaleError},
};

/// Interval at which the scale is read while requests wait: another replica may have scaled down at the same moment.
const WANTED_INTERVAL: Duration = Duration::from_secs(2);

/// Interval at which idleness is checked.
const SCALE_IDLE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Interval at which the scale is read at zero, in case an operator has scaled up.
const ZERO_INTERVAL: Duration = Duration::from_secs(60);

/// Backoff after a failure, doubling.
const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_SCALE_BACKOFF: Duration = Duration::from_secs(15);

/// Scales the workload of a route in `namespace` while its policy has `scaleBy: kubernetes`. Never returns; cancel-safe
/// between API calls.
pub(super) async fn run(gate: Arc<Gate>, namespace: &str, scale: Arc<dyn Scale>) {
    let mut activator = Activator::new(gate.clone());
    let backoff = Backoff::new(MIN_BACKOFF, MAX_SCALE_BACKOFF);
    let mut direct =
        DirectScalingLoop { gate, namespace, scale, idle: IdleClock::new(), replicas: None, backoff };
    loop {
        let next = match direct.workload() {
            None => {
                // New policies are noticed only at this interval.
                direct.idle = IdleClock::new();
                ZERO_INTERVAL
            }
            Some(workload) if activator.is_wanted() => direct.ensure_replica(&workload).await,
            Some(workload) => direct.scale_down_if_idle(&workload).await,
        };
        let wanted = async {
            // If the target is wanted already, `ensure_replica` has just run.
            if activator.is_wanted() { std::future::pending().await } else { activator.wanted().await }
        };
        tokio::select! {
            biased; // waiting requests first
            () = wanted => {}
            () = sleep(next) => {}
        }
    }
}

struct DirectScalingLoop<'a> {
    gate: Arc<Gate>,
    namespace: &'a str,
    scale: Arc<dyn Scale>,
    idle: IdleClock,
    /// Desired replicas as last read; `None` if not read yet, or refused.
    replicas: Option<u32>,
    backoff: Backoff,
}

/// Time since the target was last wanted in any replica of the proxy.
struct IdleClock {
    since: Instant,
}

// === impl DirectScalingLoop ===

impl DirectScalingLoop<'_> {
    fn workload(&self) -> Option<Workload> {
        let policy = self.gate.policy();
        policy.workload.clone().filter(|_| policy.scale_by == ScaleBy::Kubernetes)
    }

    /// Ensures at least one replica for waiting requests. Returns the time until the next check.
    async fn ensure_replica(&mut self, workload: &Workload) -> Duration {
        // Assumes that the requests wait until the next check.
        self.idle.since = Instant::now() + WANTED_INTERVAL;
        if self.gate.target().is_up() {
            // The target is up and full. This never requests a second replica.
            return WANTED_INTERVAL;
        }
        let result = async {
            let seen = self.scale.replicas(self.namespace, workload).await?;
            if seen.wanted == 0 {
                // The notification is recorded before the patch, whose effects may be observed before its response.
                self.gate.record_scaler_notified();
                self.scale.set(self.namespace, workload, &seen, 1).await?;
                self.gate.cold_starts().observe(Phase::Scale, Observation::now());
                tracing::info!(route = %self.gate.key(), workload = %workload.name, "scaled from zero to one");
            }
            self.replicas = Some(seen.wanted.max(1));
            Ok(())
        };
        match result.await {
            Ok(()) => {
                self.gate.record_scaler_notified();
                self.backoff.reset();
                WANTED_INTERVAL
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Scales to zero once no replica of the proxy has wanted the target for the idle timeout. Returns the time until the
    /// next check.
    async fn scale_down_if_idle(&mut self, workload: &Workload) -> Duration {
        if self.replicas.is_none() {
            // Reports a workload that cannot be scaled before a request waits for it, and until it can be.
            match self.scale.replicas(self.namespace, workload).await {
                Ok(seen) => self.replicas = Some(seen.wanted),
                Err(error) => return self.failed(&error),
            }
        }
        let idle = self.gate.policy().scaling.idle_timeout.get();
        let until = self.idle.update(&self.gate) + idle;
        let now = Instant::now();
        if now < until {
            // Frequent, as demand of other replicas may come and go between two checks.
            return SCALE_IDLE_CHECK_INTERVAL.min(until - now);
        }
        let result = async {
            let seen = self.scale.replicas(self.namespace, workload).await?;
            if seen.wanted > 0 && self.replicas == Some(0) {
                // An operator has scaled up: the idle timeout restarts.
                self.idle = IdleClock::new();
            }
            self.replicas = Some(seen.wanted);
            // This is the last check before the patch: a request that arrives later finds the scale at zero, and
            // raises it.
            if seen.wanted > 0 && self.idle.update(&self.gate) + idle <= Instant::now() {
                self.scale.set(self.namespace, workload, &seen, 0).await?;
                tracing::info!(route = %self.gate.key(), workload = %workload.name, "idle: scaled to zero");
                self.replicas = Some(0);
            }
            Ok(())
        };
        match result.await {
            Ok(()) => {
                self.backoff.reset();
                if self.replicas == Some(0) { ZERO_INTERVAL } else { SCALE_IDLE_CHECK_INTERVAL }
            }
            Err(error) => self.failed(&error),
        }
    }

    fn failed(&mut self, error: &ScaleError) -> Duration {
        let backoff = self.backoff.failed();
        match error {
            // The other replica has probably scaled: check soon.
            ScaleError::Conflict => return MIN_BACKOFF,
            ScaleError::Refused(reason) => {
                self.replicas = None;
                tracing::debug!(route = %self.gate.key(), %reason, "the workload cannot be scaled");
            }
            ScaleError::Unavailable(_) => {
                tracing::warn!(route = %self.gate.key(), %error, again_in = ?backoff, "cannot scale the workload; retrying");
            }
        }
        backoff
    }
}

// === impl IdleClock ===

impl IdleClock {
    /// Starts now: earlier demand is unknown.
    fn new() -> Self {
        Self { since: Instant::now() }
    }

    /// Returns the start of the idle period. Demand of other replicas includes their linger.
    fn update(&mut self, gate: &Gate) -> Instant {
        let now = Instant::now();
        if gate.requests() > 0
            || gate.demand().activation_since().is_some()
            || gate.demand().peers().is_active()
        {
            self.since = now;
        } else if let Some(since) = gate.demand().since_last_activity() {
            self.since = self.since.max(now.checked_sub(since).unwrap_or(now));
        }
        self.since
    }
}

#[cfg(test)]
mod tests;
