//! A server that sleeps instead of being stopped.
//!
//! ```text
//! ready ──idleTimeout──▶ falling asleep ──▶ sleeping ──demand──▶ waking ──▶ ready
//!                              │ cannot       │ stopAfter, exit    │ cannot, activationTimeout, exit
//!                              ▼              ▼                    ▼
//!                           stopped; whoever waits is not failed, but waits for a start
//! ```

use std::{io, process::ExitStatus, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until, timeout};

use super::Launcher;
use crate::{
    coldstart::ColdStartKind,
    scaler::{
        server::{End, Server},
        sleep::{SleepError, fall_asleep, wake_up},
        wake::vacant,
    },
    state::{Endpoint, Status},
};

/// How a sleep ended.
pub(super) enum Nap {
    /// It takes requests again.
    Awake,
    /// It is to be stopped: it cannot sleep, has slept long enough, or we are told to end.
    Over,
    /// It is dead, or does not wake.
    Lost(End),
}

// === impl Launcher ===

impl Launcher {
    /// Has a server sleep whose endpoint has been retired, until it is wanted. Nothing is sent to it while it falls
    /// asleep: who comes then waits until it is woken, which cannot be before it sleeps.
    pub(super) async fn nap(&mut self, server: &mut Server, endpoint: &Endpoint) -> Nap {
        let gate = self.gate().clone();
        let came = tokio::select! {
            // What is in flight without being demand is waited for, but nobody who wants the server has to.
            biased;
            status = server.exited() => return lost(server, status, "serving").await,
            () = self.stops.retire.cancelled() => return Nap::Over,
            () = vacant(endpoint) => self.wake.is_wanted(),
            () = self.wake.wanted() => true,
        };
        if came {
            self.wake.open(endpoint, None);
            return Nap::Awake;
        }
        self.backoff.reset();
        gate.cold_starts().abandoned();
        gate.cold_starts().set_kind(ColdStartKind::Wake);
        gate.target().set_status(Status::Stopping);
        let level = self.target.sleep_level;
        let asleep = tokio::select! {
            // An exit explains what an answer would say, so it is looked at first.
            biased;
            status = server.exited() => return lost(server, status, "falling asleep").await,
            () = self.stops.retire.cancelled() => return Nap::Over,
            asleep = self.wake.meanwhile(fall_asleep(endpoint.address(), level)) => asleep,
        };
        if let Err(error) = asleep {
            if let Some(status) = hung_up(server, &error).await {
                return lost(server, status, "falling asleep").await;
            }
            tracing::error!(route = %gate.key(), %error, "the target cannot sleep, and is stopped instead");
            self.starts_again(format!("the target did not fall asleep: {error}").into());
            return Nap::Over;
        }
        gate.target().set_status(Status::Sleeping);
        tracing::info!(route = %gate.key(), address = endpoint.address(), level, "asleep");
        let until = self.target.stop_after.map(|stop_after| Instant::now() + stop_after.get());
        tokio::select! {
            // Who comes in the very moment in which it is to be stopped finds it there.
            biased;
            status = server.exited() => return lost(server, status, "asleep").await,
            () = self.stops.retire.cancelled() => Nap::Over,
            () = self.wake.wanted() => self.wake_up(server, endpoint).await,
            () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => Nap::Over,
        }
    }

    async fn wake_up(&self, server: &mut Server, endpoint: &Endpoint) -> Nap {
        self.wake.told();
        self.gate().target().set_status(Status::Starting);
        tracing::info!(route = %self.gate().key(), address = endpoint.address(), "waking");
        let readiness = self.gate().policy().readiness.clone();
        let limit = readiness.activation_timeout.get();
        let mut last = None;
        let waking = async {
            let every = readiness.interval.get().max(Duration::from_millis(1));
            wake_up(endpoint.address(), self.target.sleep_level, every).await?;
            self.wake.until_ready(endpoint.address(), &mut last).await;
            Ok::<_, SleepError>(())
        };
        let awake = tokio::select! {
            // As above.
            biased;
            status = server.exited() => return lost(server, status, "waking").await,
            () = self.stops.retire.cancelled() => return Nap::Over,
            awake = timeout(limit, waking) => awake,
        };
        let reason = match awake {
            Ok(Ok(())) => {
                self.wake.activated(endpoint);
                tracing::info!(route = %self.gate().key(), address = endpoint.address(), "awake");
                return Nap::Awake;
            }
            Ok(Err(error)) => match hung_up(server, &error).await {
                Some(status) => return lost(server, status, "waking").await,
                None => format!("the target did not wake: {error}"),
            },
            Err(_) => format!("the target was not awake within {}", readiness.activation_timeout),
        };
        Nap::Lost(End { reason: reason.into(), last_lines: server.last_lines() })
    }

    /// What is left of a server that died in its sleep, or does not wake, goes, and whoever waits waits for a start.
    pub(super) async fn lost(&mut self, endpoint: Arc<Endpoint>, server: Server, end: End) {
        let End { reason, last_lines } = end;
        let output = last_lines.join("\n");
        tracing::warn!(route = %self.gate().key(), %reason, output, "the target is lost in its sleep");
        self.starts_again(reason.full().clone());
        self.leave(endpoint);
        self.stop(server).await;
    }

    /// What was to be a wake becomes a cold start.
    fn starts_again(&self, why: Arc<str>) {
        self.gate().cold_starts().set_kind(ColdStartKind::ColdStart);
        self.gate().cold_starts().set_obstacle(why);
    }
}

/// How a server ended that did not answer: if it is dead, its guardian tells so a moment later.
async fn hung_up(server: &mut Server, error: &SleepError) -> Option<io::Result<ExitStatus>> {
    const MOMENT: Duration = Duration::from_secs(1);
    let is_silent = matches!(error, SleepError::Silent(..));
    if is_silent { timeout(MOMENT, server.exited()).await.ok() } else { None }
}

async fn lost(server: &mut Server, status: io::Result<ExitStatus>, doing: &str) -> Nap {
    Nap::Lost(server.end(status, doing).await)
}
