//! Sleep of an idle server instead of a stop.
//!
//! ```text
//! ready ──idleTimeout──▶ falling asleep ──▶ sleeping ──demand──▶ waking ──▶ ready
//!                              │ cannot       │ stopAfter, exit    │ cannot, activationTimeout, exit
//!                              ▼              ▼                    ▼
//!                           stopped; held requests wait for a start
//! ```

use std::{io, process::ExitStatus, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until, timeout};

use super::{Launcher, SleepOutcome};
use crate::{
    coldstart::ColdStartKind,
    scaler::{
        activator::until_vacant,
        server::{ModelServer, ServerExit},
        sleep::{SleepError, fall_asleep, wake_up},
    },
    state::{Endpoint, Status},
};

// === impl Launcher ===

impl Launcher {
    /// Puts a server with a retired endpoint to sleep until it is wanted. Requests that arrive while it falls asleep wait
    /// until it sleeps and is woken.
    pub(super) async fn sleep_until_wanted(
        &mut self,
        server: &mut ModelServer,
        endpoint: &Endpoint,
    ) -> SleepOutcome {
        let gate = self.gate().clone();
        let is_wanted = tokio::select! {
            // Waits for quiet requests in flight, but not if the server is wanted.
            biased;
            status = server.exited() => return lost(server, status, "serving").await,
            () = self.shutdown.drain.cancelled() => return SleepOutcome::Over(self.shutdown.reason()),
            () = until_vacant(endpoint) => self.activator.is_wanted(),
            () = self.activator.wanted() => true,
        };
        if is_wanted {
            self.activator.open(endpoint, None);
            return SleepOutcome::Awake;
        }
        self.backoff.reset();
        gate.cold_starts().abandoned();
        gate.cold_starts().set_kind(ColdStartKind::Wake);
        gate.target().set_status(Status::Stopping);
        let level = self.target.sleep_level;
        let asleep = tokio::select! {
            // An exit first: it explains a failing call.
            biased;
            status = server.exited() => return lost(server, status, "falling asleep").await,
            () = self.shutdown.drain.cancelled() => return SleepOutcome::Over(self.shutdown.reason()),
            asleep = self.activator.run_accepting_demand(fall_asleep(endpoint.address(), level)) => asleep,
        };
        if let Err(error) = asleep {
            if let Some(status) = exit_after_silence(server, &error).await {
                return lost(server, status, "falling asleep").await;
            }
            tracing::error!(route = %gate.key(), %error, "the target cannot sleep; stopping it instead");
            self.turn_into_cold_start(format!("the target did not fall asleep: {error}").into());
            return SleepOutcome::Over("it cannot sleep");
        }
        gate.target().set_status(Status::Sleeping);
        tracing::info!(route = %gate.key(), address = endpoint.address(), level, "asleep");
        let until = self.target.stop_after.map(|stop_after| Instant::now() + stop_after.get());
        tokio::select! {
            // Demand before `stopAfter`: at the same moment the server wakes.
            biased;
            status = server.exited() => return lost(server, status, "asleep").await,
            () = self.shutdown.drain.cancelled() => SleepOutcome::Over(self.shutdown.reason()),
            () = self.activator.wanted() => self.wake_up(server, endpoint).await,
            () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => SleepOutcome::Over("idle, asleep for stopAfter"),
        }
    }

    async fn wake_up(&self, server: &mut ModelServer, endpoint: &Endpoint) -> SleepOutcome {
        self.activator.begin_activation();
        self.gate().target().set_status(Status::Starting);
        tracing::info!(route = %self.gate().key(), address = endpoint.address(), "waking");
        let readiness = self.gate().policy().readiness.clone();
        let limit = readiness.activation_timeout.get();
        let mut last = None;
        let waking = async {
            let every = readiness.interval.get().max(Duration::from_millis(1));
            wake_up(endpoint.address(), self.target.sleep_level, every).await?;
            self.activator.until_ready(endpoint.address(), &mut last).await;
            Ok::<_, SleepError>(())
        };
        let awake = tokio::select! {
            // An exit first, as above.
            biased;
            status = server.exited() => return lost(server, status, "waking").await,
            () = self.shutdown.drain.cancelled() => return SleepOutcome::Over(self.shutdown.reason()),
            awake = timeout(limit, waking) => awake,
        };
        let reason = match awake {
            Ok(Ok(())) => {
                self.activator.activated(endpoint);
                tracing::info!(route = %self.gate().key(), address = endpoint.address(), "awake");
                return SleepOutcome::Awake;
            }
            Ok(Err(error)) => match exit_after_silence(server, &error).await {
                Some(status) => return lost(server, status, "waking").await,
                None => format!("the target did not wake: {error}"),
            },
            Err(_) => format!("the target was not awake within {}", readiness.activation_timeout),
        };
        SleepOutcome::Lost(ServerExit { reason: reason.into(), last_lines: server.last_lines() })
    }

    /// Stops a server that does not wake, and cleans up after one that exited in its sleep. Held requests wait for a
    /// start.
    pub(super) async fn lost(&mut self, endpoint: Arc<Endpoint>, server: ModelServer, exit: ServerExit) {
        let ServerExit { reason, last_lines } = exit;
        let output = last_lines.join("\n");
        tracing::warn!(route = %self.gate().key(), %reason, output, "the model server exited or did not wake while asleep");
        self.turn_into_cold_start(reason.full().clone());
        self.remove_when_vacant(endpoint);
        self.stop(server, "lost while it slept").await;
    }

    /// Turns a wake into a cold start, with the reason as its obstacle.
    fn turn_into_cold_start(&self, why: Arc<str>) {
        self.gate().cold_starts().set_kind(ColdStartKind::ColdStart);
        self.gate().cold_starts().set_obstacle(why);
    }
}

/// Returns the exit status of a server that did not answer, if its guardian reports one within a second.
async fn exit_after_silence(server: &mut ModelServer, error: &SleepError) -> Option<io::Result<ExitStatus>> {
    const EXIT_GRACE: Duration = Duration::from_secs(1);
    let is_silent = matches!(error, SleepError::Silent(..));
    if is_silent { timeout(EXIT_GRACE, server.exited()).await.ok() } else { None }
}

async fn lost(server: &mut ModelServer, status: io::Result<ExitStatus>, doing: &str) -> SleepOutcome {
    SleepOutcome::Lost(server.exit(status, doing).await)
}
