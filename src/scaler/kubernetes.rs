//! Scaling without KEDA: the workload of a route goes from zero to one when it is wanted, and back when idle.
//!
//! Every replica of the proxy does this, and none leads. Each looks at the number before it changes it, and the change
//! fails if somebody else was there first.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::wake::Wake;
use crate::{
    admission::Gate,
    domain::{Phase, ScaleBy, Workload},
    state::{Scale, ScaleError, Seen},
};

/// How often the number is looked at again while somebody waits: another replica may have found the target idle in the
/// same moment.
const LOOK: Duration = Duration::from_secs(2);

/// How often it is looked at whether the target is idle.
const TICK: Duration = Duration::from_secs(1);

/// How often the number is looked at while nothing is asked for: somebody may have scaled by hand.
const IDLE_LOOK: Duration = Duration::from_secs(60);

/// Pauses after a failure, doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Scales the workload of a route of `namespace` for as long as the route says `scaleBy: kubernetes`. Never ends by
/// itself; cancel-safe between calls of the API.
pub(super) async fn run(gate: Arc<Gate>, namespace: &str, scale: Arc<dyn Scale>) {
    let mut wake = Wake::new(gate.clone());
    let mut direct = Direct { gate, namespace, scale, quiet: Quiet::new(), seen: None, pause: FIRST_PAUSE };
    loop {
        let next = match direct.workload() {
            None => {
                // Nothing tells of new policies; a route that changes them can wait for so long.
                direct.quiet = Quiet::new();
                IDLE_LOOK
            }
            Some(workload) if wake.is_wanted() => direct.up(&workload).await,
            Some(workload) => direct.down(&workload).await,
        };
        let wanted = async {
            // What is wanted already has just been seen to.
            if wake.is_wanted() { std::future::pending().await } else { wake.wanted().await }
        };
        tokio::select! {
            biased; // whoever waits goes first
            () = wanted => {}
            () = sleep(next) => {}
        }
    }
}

struct Direct<'a> {
    gate: Arc<Gate>,
    namespace: &'a str,
    scale: Arc<dyn Scale>,
    quiet: Quiet,
    /// The number that was seen last; `None`: none yet, or it was not ours to see.
    seen: Option<u32>,
    pause: Duration,
}

/// Since when nobody, in any replica of the proxy, has wanted the target.
struct Quiet {
    since: Instant,
}

// === impl Direct ===

impl Direct<'_> {
    fn workload(&self) -> Option<Workload> {
        let policy = self.gate.policy();
        policy.workload.clone().filter(|_| policy.scale_by == ScaleBy::Kubernetes)
    }

    /// Somebody waits: at least one replica is asked for. Says when to look again.
    async fn up(&mut self, workload: &Workload) -> Duration {
        // As far as is known they wait until the next look.
        self.quiet.since = Instant::now() + LOOK;
        if self.gate.target().is_up() {
            // It is full; more than one replica is not ours to ask for.
            return LOOK;
        }
        let result = async {
            let seen = self.scale.replicas(self.namespace, workload).await?;
            if seen.wanted == 0 {
                // Before the answer: what follows from it may be seen earlier than that.
                self.gate.record_scaler_notified();
                self.scale.set(self.namespace, workload, &seen, 1).await?;
                self.gate.cold_starts().observe(Phase::Scale, Seen::now());
                tracing::info!(route = %self.gate.key(), workload = %workload.name, "scaled from zero to one");
            }
            self.seen = Some(seen.wanted.max(1));
            Ok(())
        };
        match result.await {
            Ok(()) => {
                self.gate.record_scaler_notified();
                self.pause = FIRST_PAUSE;
                LOOK
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Nobody waits: if that has been so for long enough, everywhere, no replica is asked for. Says when to look again.
    async fn down(&mut self, workload: &Workload) -> Duration {
        if self.seen.is_none() {
            // Whether it could be scaled is told before somebody waits for it, and again while it could not be.
            match self.scale.replicas(self.namespace, workload).await {
                Ok(seen) => self.seen = Some(seen.wanted),
                Err(error) => return self.failed(&error),
            }
        }
        let idle = self.gate.policy().scaling.idle_timeout.get();
        let until = self.quiet.look(&self.gate) + idle;
        let now = Instant::now();
        if now < until {
            // Others may be asked without our hearing of it between two looks, so these are frequent.
            return TICK.min(until - now);
        }
        let result = async {
            let seen = self.scale.replicas(self.namespace, workload).await?;
            if seen.wanted > 0 && self.seen == Some(0) {
                // Somebody has scaled it by hand, and may be about to use it.
                self.quiet = Quiet::new();
            }
            self.seen = Some(seen.wanted);
            // The last look: what comes from now on finds the number at zero, and raises it.
            if seen.wanted > 0 && self.quiet.look(&self.gate) + idle <= Instant::now() {
                self.scale.set(self.namespace, workload, &seen, 0).await?;
                tracing::info!(route = %self.gate.key(), workload = %workload.name, "idle: scaled to zero");
                self.seen = Some(0);
            }
            Ok(())
        };
        match result.await {
            Ok(()) => {
                self.pause = FIRST_PAUSE;
                if self.seen == Some(0) { IDLE_LOOK } else { TICK }
            }
            Err(error) => self.failed(&error),
        }
    }

    fn failed(&mut self, error: &ScaleError) -> Duration {
        let pause = self.pause;
        self.pause = LONGEST_PAUSE.min(pause * 2);
        match error {
            // Whoever was there first has perhaps done it: look at once.
            ScaleError::Conflict => return FIRST_PAUSE,
            ScaleError::Refused(reason) => {
                self.seen = None;
                tracing::debug!(route = %self.gate.key(), %reason, "the workload cannot be scaled");
            }
            ScaleError::Unavailable(_) => {
                tracing::warn!(route = %self.gate.key(), %error, again_in = ?pause, "the workload could not be scaled");
            }
        }
        pause
    }
}

// === impl Quiet ===

impl Quiet {
    /// What came before is not known, so that the time begins now.
    fn new() -> Self {
        Self { since: Instant::now() }
    }

    /// Looks at the demand, and says since when there has been none. That of other replicas lasts for the linger.
    fn look(&mut self, gate: &Gate) -> Instant {
        let now = Instant::now();
        if gate.requests() > 0
            || gate.demand().activation_since().is_some()
            || gate.demand().peers().is_active()
        {
            self.since = now;
        } else if let Some(quiet) = gate.demand().since_last_activity() {
            self.since = self.since.max(now.checked_sub(quiet).unwrap_or(now));
        }
        self.since
    }
}

#[cfg(test)]
mod tests;
