//! The launcher: starts the model server of a route when it is wanted, and stops it or puts it to sleep when it is idle.
//!
//! ```text
//! idle ──demand──▶ starting ──ready──▶ ready ──idleTimeout──▶ stopping ──▶ idle
//!   ▲                 │ exit, activationTimeout  │ exit
//!   └── backoff ◀─────┴──────────────────────────┘
//! ```

mod sleeping;

use std::{io, process::ExitStatus, sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Options, Shutdown,
    activator::{Activator, until_suspect, until_vacant},
    server::{GuardianOptions, ModelServer, ServerExit},
};
use crate::{
    admission::Gate,
    coldstart::{ColdStartKind, Phase},
    domain::{Backoff, ProcessTarget, Reason, WhenIdle},
    probe::ProbeResult,
    state::{Cause, Endpoint, Status},
};

/// Backoff between starts of a failing target.
const MIN_START_DELAY: Duration = Duration::from_secs(1);
const MAX_START_DELAY: Duration = Duration::from_secs(60);

/// Time for which a server must have served so that its exit does not count as a failure.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// The launcher of one route.
pub(super) struct Launcher {
    activator: Activator,
    target: ProcessTarget,
    guardian: GuardianOptions,
    shutdown: Shutdown,
    /// Backoff between starts. A failure is a start that does not become ready, or a server that exits within
    /// [`STABLE_AFTER`] of being ready. Any other end of a ready server resets it.
    backoff: Backoff,
    /// End of the current wait.
    retry_at: Option<Instant>,
    /// Endpoints of stopped servers whose answers clients still read.
    leaving: JoinSet<()>,
}

/// Result of a load.
enum LoadOutcome {
    Ready,
    Exited(io::Result<ExitStatus>),
    TimedOut(Option<ProbeResult>),
    Draining,
}

/// Result of serving.
enum ServeOutcome {
    /// Idle timeout; the endpoint is retired.
    Idle,
    Exited(io::Result<ExitStatus>),
    /// Runs, but failed requests and no longer answers probes.
    Silent(Option<ProbeResult>),
    Draining,
}

/// Result of a sleep.
pub(super) enum SleepOutcome {
    /// The server takes requests again.
    Awake,
    /// The server is to be stopped, for this reason.
    Over(&'static str),
    /// The server exited or does not wake.
    Lost(ServerExit),
}

// === impl Launcher ===

impl Launcher {
    pub(super) fn new(gate: Arc<Gate>, target: ProcessTarget, options: &Options, shutdown: Shutdown) -> Self {
        let guardian = GuardianOptions::new(options, gate.key());
        let activator = Activator::new(gate);
        let backoff = Backoff::new(MIN_START_DELAY, MAX_START_DELAY);
        Self { activator, target, guardian, shutdown, backoff, retry_at: None, leaving: JoinSet::new() }
    }

    /// Runs until shutdown.
    pub(super) async fn run(mut self) {
        let Shutdown { drain, kill, .. } = self.shutdown.clone();
        loop {
            tokio::select! {
                // Shutdown first: nothing is started any more.
                biased;
                () = drain.cancelled() => break,
                () = self.until_start_due() => self.run_once().await,
            }
        }
        self.gate().target().set_status(Status::Idle);
        tokio::select! {
            // A kill does not wait for answers that are still being read.
            biased;
            () = kill.cancelled() => {}
            () = async { while self.leaving.join_next().await.is_some() {} } => {}
        }
    }

    fn gate(&self) -> &Arc<Gate> {
        &self.activator.gate
    }

    /// Waits until a start is wanted and the backoff has passed. Cancel-safe.
    async fn until_start_due(&mut self) {
        if let Some(until) = self.retry_at {
            self.activator.run_accepting_demand(sleep_until(until)).await;
            self.retry_at = None;
        }
        if !self.activator.is_wanted() {
            self.gate().target().set_status(Status::Idle);
        }
        self.activator.wanted().await;
        self.activator.begin_activation();
    }

    /// Runs the server once, from start to end.
    async fn run_once(&mut self) {
        self.gate().target().set_status(Status::Starting);
        let mut server = match ModelServer::start(&self.target, &self.guardian, self.gate()) {
            Ok(server) => server,
            Err(error) => return self.failed(error.to_string().into(), Vec::new(), Cause::Lasting),
        };
        self.gate().cold_starts().mark(Phase::Start);
        tracing::info!(route = %self.gate().key(), address = server.address(), "starting");
        match self.load(&mut server).await {
            LoadOutcome::Ready => self.serve(server).await,
            LoadOutcome::Draining => self.stop(server, self.shutdown.reason()).await,
            LoadOutcome::Exited(status) => {
                let ServerExit { reason, last_lines } = server.exit(status, "loading").await;
                self.failed(reason, last_lines, Cause::Lasting);
            }
            LoadOutcome::TimedOut(answer) => {
                let reason = self.activator.timeout_reason(answer).into();
                // The failure is reported before the stop, which may take long.
                self.failed(reason, server.last_lines(), Cause::Passing);
                self.activator.run_accepting_demand(server.stop()).await;
            }
        }
    }

    async fn load(&mut self, server: &mut ModelServer) -> LoadOutcome {
        let limit = self.gate().policy().readiness.activation_timeout.get();
        let address = server.address().to_owned();
        let mut last = None;
        tokio::select! {
            // An exit first: it explains a failing probe.
            biased;
            status = server.exited() => LoadOutcome::Exited(status),
            () = self.shutdown.drain.cancelled() => LoadOutcome::Draining,
            ready = timeout(limit, self.activator.until_ready(&address, &mut last)) => match ready {
                Ok(()) => LoadOutcome::Ready,
                Err(_) => LoadOutcome::TimedOut(last),
            },
        }
    }

    async fn serve(&mut self, mut server: ModelServer) {
        let max = self.gate().policy().concurrency.max;
        let endpoint = Endpoint::new(server.address(), max);
        self.gate().target().add(&endpoint);
        self.activator.activated(&endpoint);
        server.set_loaded();
        let mut up = Instant::now();
        tracing::info!(route = %self.gate().key(), address = server.address(), "ready");
        let ended = loop {
            let ended = tokio::select! {
                // An exit first: it explains why the endpoint is suspect.
                biased;
                status = server.exited() => ServeOutcome::Exited(status),
                () = self.shutdown.drain.cancelled() => ServeOutcome::Draining,
                ended = self.watch(&endpoint, up) => ended,
            };
            if !matches!(ended, ServeOutcome::Idle) || self.target.when_idle == WhenIdle::Stop {
                break ended;
            }
            match self.sleep_until_wanted(&mut server, &endpoint).await {
                SleepOutcome::Awake => up = Instant::now(),
                SleepOutcome::Over(reason) => {
                    self.remove_when_vacant(endpoint);
                    return self.stop(server, reason).await;
                }
                SleepOutcome::Lost(exit) => return self.lost(endpoint, server, exit).await,
            }
        };
        endpoint.retire();
        match ended {
            ServeOutcome::Idle | ServeOutcome::Draining => {
                tokio::select! {
                    // A kill does not wait for requests in flight.
                    biased;
                    () = self.shutdown.kill.cancelled() => {}
                    _ = server.exited() => {}
                    () = until_vacant(&endpoint) => {}
                }
                self.backoff.reset();
                self.gate().cold_starts().abandoned();
                self.remove_when_vacant(endpoint);
                let reason =
                    if matches!(ended, ServeOutcome::Idle) { "idle" } else { self.shutdown.reason() };
                self.stop(server, reason).await;
            }
            ServeOutcome::Exited(status) => {
                let exit = server.exit(status, "serving").await;
                self.handle_exit(endpoint, exit, up.elapsed() >= STABLE_AFTER);
            }
            ServeOutcome::Silent(answer) => {
                let reason =
                    format!("the target no longer answers: {}", self.activator.describe_probe(answer));
                self.handle_exit(
                    endpoint,
                    ServerExit { reason: reason.into(), last_lines: server.last_lines() },
                    false,
                );
                self.activator.run_accepting_demand(server.stop()).await;
            }
        }
    }

    /// Supervises a running server until it is idle or silent. Cancel-safe.
    async fn watch(&self, endpoint: &Endpoint, up: Instant) -> ServeOutcome {
        loop {
            tokio::select! {
                // A suspect endpoint first: it blocks requests.
                biased;
                () = until_suspect(endpoint, || self.activator.probe_endpoint(endpoint)) => {
                    let mut limit = self.gate().policy().readiness.activation_timeout.get();
                    if endpoint.in_flight() > 0 {
                        // The server may be too busy with a request to answer probes: allow for the longest request.
                        limit = limit.max(self.gate().policy().upstream.response_timeout.get());
                    }
                    let mut last = None;
                    let recovered = async {
                        sleep(endpoint.backoff()).await;
                        self.activator.until_ready(endpoint.address(), &mut last).await;
                    };
                    if timeout(limit, recovered).await.is_err() {
                        return ServeOutcome::Silent(last);
                    }
                    endpoint.record_recovery();
                    // Keeps the limit of one request that suspicion has set; the ramp widens it.
                    self.activator.open(endpoint, None);
                }
                () = self.activator.until_idle(endpoint, || self.target.idle_timeout.get(), up) => return ServeOutcome::Idle,
                () = self.activator.widen_ramp(endpoint, || self.activator.probe_endpoint(endpoint)) => {}
                () = self.activator.watch_silence(endpoint, || self.activator.probe_endpoint(endpoint)) => {}
            }
        }
    }

    /// Ends a failed start, and begins the backoff.
    fn failed(&mut self, reason: Reason, last_lines: Vec<String>, cause: Cause) {
        let retry_after = self.back_off();
        self.activator.failed(reason, last_lines, cause, retry_after);
    }

    /// Counts a failure, and returns the time until the next start.
    fn back_off(&mut self) -> Duration {
        let wait = self.backoff.failed();
        self.retry_at = Some(Instant::now() + wait);
        wait
    }

    /// Handles a server that exited while serving. Held requests wait for the next start, without backoff if this one was
    /// stable.
    fn handle_exit(&mut self, endpoint: Arc<Endpoint>, exit: ServerExit, stable: bool) {
        let ServerExit { reason, last_lines } = exit;
        let output = last_lines.join("\n");
        tracing::warn!(route = %self.gate().key(), %reason, output, "the target has died");
        self.remove_when_vacant(endpoint);
        let reason = reason.full().clone();
        // The cold start of this server fails too, unless the server had answered a request.
        self.gate().cold_starts().failed(reason.clone(), last_lines);
        self.gate().cold_starts().set_kind(ColdStartKind::ColdStart);
        if stable {
            self.backoff.reset();
        } else {
            self.back_off();
            self.gate().target().set_status(Status::Failed(reason));
        }
    }

    /// Removes a retired endpoint once nothing is in flight on it: a client may still read its answer.
    fn remove_when_vacant(&mut self, endpoint: Arc<Endpoint>) {
        while self.leaving.try_join_next().is_some() {}
        if endpoint.in_flight() == 0 {
            self.gate().target().remove(&endpoint);
            return;
        }
        let gate = self.gate().clone();
        self.leaving.spawn(async move {
            until_vacant(&endpoint).await;
            gate.target().remove(&endpoint);
        });
    }

    /// Stops the server and logs the reason.
    async fn stop(&mut self, server: ModelServer, reason: &'static str) {
        let started = server.started();
        tracing::info!(route = %self.gate().key(), "stopping");
        self.gate().cold_starts().set_kind(ColdStartKind::ColdStart);
        self.gate().target().set_status(Status::Stopping);
        if self.shutdown.drain.is_cancelled() {
            // Demand that arrives during the stop is left to the next target.
            server.stop().await;
        } else {
            self.activator.run_accepting_demand(server.stop()).await;
        }
        // Not logged as "stopped", which is the last log line of the proxy.
        tracing::info!(route = %self.gate().key(), reason, ran_s = started.elapsed().as_secs(), "model server ended");
        self.gate().target().set_status(Status::Idle);
    }
}
