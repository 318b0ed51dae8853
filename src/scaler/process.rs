//! The launcher: starts the model server of a route when it is wanted, and stops it when it is idle, or has it sleep.
//!
//! ```text
//! idle ──demand──▶ starting ──ready──▶ ready ──idleTimeout──▶ stopping ──▶ idle
//!   ▲                 │ exit, activationTimeout  │ exit
//!   └── back-off ◀────┴──────────────────────────┘
//! ```

mod nap;

use std::{io, process::ExitStatus, sync::Arc};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

use nap::Nap;

use super::{
    Options, Stops,
    backoff::Backoff,
    server::{End, GuardianOptions, Server},
    wake::{Wake, suspect, vacant},
};
use crate::{
    admission::Gate,
    coldstart::{ColdStartKind, Phase},
    domain::{ProcessTarget, Reason, WhenIdle},
    probe::Answer,
    state::{Cause, Endpoint, Status},
};

/// The launcher of one route.
pub(super) struct Launcher {
    wake: Wake,
    target: ProcessTarget,
    guardian: GuardianOptions,
    stops: Stops,
    backoff: Backoff,
    /// Endpoints of servers that are gone, as long as answers of theirs are still being read.
    leaving: JoinSet<()>,
}

/// How a load ended.
enum Load {
    Ready,
    Exited(io::Result<ExitStatus>),
    TimedOut(Option<Answer>),
    Told,
}

/// How serving ended.
enum Serve {
    /// No request for so long; the endpoint is retired.
    Idle,
    Exited(io::Result<ExitStatus>),
    /// It runs, but it has failed requests and does not answer probes any more.
    Silent(Option<Answer>),
    Told,
}

// === impl Launcher ===

impl Launcher {
    pub(super) fn new(gate: Arc<Gate>, target: ProcessTarget, options: &Options, stops: Stops) -> Self {
        let guardian = GuardianOptions::new(options, gate.key());
        let wake = Wake::new(gate);
        Self { wake, target, guardian, stops, backoff: Backoff::default(), leaving: JoinSet::new() }
    }

    /// Runs until it is told to end.
    pub(super) async fn run(mut self) {
        let Stops { retire, stop } = self.stops.clone();
        loop {
            tokio::select! {
                // The end first: nothing is started any more.
                biased;
                () = retire.cancelled() => break,
                () = self.due() => self.run_once().await,
            }
        }
        self.gate().target().set_status(Status::Idle);
        tokio::select! {
            // Told to stop now, answers that are still being read are not waited for.
            biased;
            () = stop.cancelled() => {}
            () = async { while self.leaving.join_next().await.is_some() {} } => {}
        }
    }

    fn gate(&self) -> &Arc<Gate> {
        &self.wake.gate
    }

    /// Waits until a start is wanted, and the back-off of the last one is over. Cancel-safe.
    async fn due(&mut self) {
        if let Some(until) = self.backoff.until() {
            self.wake.meanwhile(sleep_until(until)).await;
            self.backoff.elapsed();
        }
        if !self.wake.is_wanted() {
            self.gate().target().set_status(Status::Idle);
        }
        self.wake.wanted().await;
        self.wake.told();
    }

    /// One run of the server, from start to end.
    async fn run_once(&mut self) {
        self.gate().target().set_status(Status::Starting);
        let mut server = match Server::start(&self.target, &self.guardian, self.gate()) {
            Ok(server) => server,
            Err(error) => return self.failed(error.to_string().into(), Vec::new(), Cause::Lasting),
        };
        self.gate().cold_starts().mark(Phase::Start);
        tracing::info!(route = %self.gate().key(), address = server.address(), "starting");
        match self.load(&mut server).await {
            Load::Ready => self.serve(server).await,
            Load::Told => self.stop(server).await,
            Load::Exited(status) => {
                let End { reason, last_lines } = server.end(status, "loading").await;
                self.failed(reason, last_lines, Cause::Lasting);
            }
            Load::TimedOut(answer) => {
                let reason = self.wake.too_late(answer).into();
                // Nobody waits for it to be gone.
                self.failed(reason, server.last_lines(), Cause::Passing);
                self.wake.meanwhile(server.stop()).await;
            }
        }
    }

    async fn load(&mut self, server: &mut Server) -> Load {
        let limit = self.gate().policy().readiness.activation_timeout.get();
        let address = server.address().to_owned();
        let mut last = None;
        tokio::select! {
            // An exit explains what a probe sees, so it is looked at first.
            biased;
            status = server.exited() => Load::Exited(status),
            () = self.stops.retire.cancelled() => Load::Told,
            ready = timeout(limit, self.wake.until_ready(&address, &mut last)) => match ready {
                Ok(()) => Load::Ready,
                Err(_) => Load::TimedOut(last),
            },
        }
    }

    async fn serve(&mut self, mut server: Server) {
        let max = self.gate().policy().concurrency.max;
        let endpoint = Endpoint::new(server.address(), max);
        self.gate().target().add(&endpoint);
        self.wake.activated(&endpoint);
        server.is_loaded();
        let mut up = Instant::now();
        tracing::info!(route = %self.gate().key(), address = server.address(), "ready");
        let ended = loop {
            let ended = tokio::select! {
                // An exit first, since it explains why the endpoint is suspect.
                biased;
                status = server.exited() => Serve::Exited(status),
                () = self.stops.retire.cancelled() => Serve::Told,
                ended = self.tend(&endpoint, up) => ended,
            };
            if !matches!(ended, Serve::Idle) || self.target.when_idle == WhenIdle::Stop {
                break ended;
            }
            match self.nap(&mut server, &endpoint).await {
                Nap::Awake => up = Instant::now(),
                Nap::Over => {
                    self.leave(endpoint);
                    return self.stop(server).await;
                }
                Nap::Lost(end) => return self.lost(endpoint, server, end).await,
            }
        };
        endpoint.retire();
        match ended {
            Serve::Idle | Serve::Told => {
                tokio::select! {
                    // Being told to stop now is not to wait for anything.
                    biased;
                    () = self.stops.stop.cancelled() => {}
                    _ = server.exited() => {}
                    () = vacant(&endpoint) => {}
                }
                self.backoff.reset();
                self.gate().cold_starts().abandoned();
                self.leave(endpoint);
                self.stop(server).await;
            }
            Serve::Exited(status) => {
                let end = server.end(status, "serving").await;
                self.died(endpoint, end, up.elapsed() >= Backoff::STABLE);
            }
            Serve::Silent(answer) => {
                let reason = format!("the target does not answer any more: {}", self.wake.seen(answer));
                self.died(endpoint, End { reason: reason.into(), last_lines: server.last_lines() }, false);
                self.wake.meanwhile(server.stop()).await;
            }
        }
    }

    /// Looks after a server that runs, until it is idle or past help. Cancel-safe.
    async fn tend(&self, endpoint: &Endpoint, up: Instant) -> Serve {
        loop {
            tokio::select! {
                // A suspect endpoint holds requests up, so it cannot wait.
                biased;
                () = suspect(endpoint, || self.wake.ask(endpoint)) => {
                    let mut limit = self.gate().policy().readiness.activation_timeout.get();
                    if endpoint.in_flight() > 0 {
                        // It may be busy with one request, and too busy for probes: then it has the time of that.
                        limit = limit.max(self.gate().policy().upstream.response_timeout.get());
                    }
                    let mut last = None;
                    let recovered = async {
                        sleep(endpoint.backoff()).await;
                        self.wake.until_ready(endpoint.address(), &mut last).await;
                    };
                    if timeout(limit, recovered).await.is_err() {
                        return Serve::Silent(last);
                    }
                    endpoint.vouch();
                    // The limit stays at the one request that being suspect left, and grows from there.
                    self.wake.open(endpoint, None);
                }
                () = self.wake.idle(endpoint, || self.target.idle_timeout.get(), up) => return Serve::Idle,
                () = self.wake.widen(endpoint, || self.wake.ask(endpoint)) => {}
                () = self.wake.watch_silence(endpoint, || self.wake.ask(endpoint)) => {}
            }
        }
    }

    /// The start has failed: the next one waits.
    fn failed(&mut self, reason: Reason, last_lines: Vec<String>, cause: Cause) {
        let retry_after = self.backoff.failed();
        self.wake.failed(reason, last_lines, cause, retry_after);
    }

    /// The server has died while it served. Held requests wait for the next one, which comes at once if this one was
    /// stable.
    fn died(&mut self, endpoint: Arc<Endpoint>, end: End, stable: bool) {
        let End { reason, last_lines } = end;
        let output = last_lines.join("\n");
        tracing::warn!(route = %self.gate().key(), %reason, output, "the target has died");
        self.leave(endpoint);
        let reason = reason.full().clone();
        // If it died before it answered anything, so did its cold start.
        self.gate().cold_starts().failed(reason.clone(), last_lines);
        self.gate().cold_starts().set_kind(ColdStartKind::ColdStart);
        if stable {
            self.backoff.reset();
        } else {
            self.backoff.failed();
            self.gate().target().set_status(Status::Failed(reason));
        }
    }

    /// Forgets a retired endpoint, once nothing is in flight on it: a client may still be reading what it sent.
    fn leave(&mut self, endpoint: Arc<Endpoint>) {
        while self.leaving.try_join_next().is_some() {}
        if endpoint.in_flight() == 0 {
            self.gate().target().remove(&endpoint);
            return;
        }
        let gate = self.gate().clone();
        self.leaving.spawn(async move {
            vacant(&endpoint).await;
            gate.target().remove(&endpoint);
        });
    }

    async fn stop(&mut self, server: Server) {
        tracing::info!(route = %self.gate().key(), "stopping");
        self.gate().cold_starts().set_kind(ColdStartKind::ColdStart);
        self.gate().target().set_status(Status::Stopping);
        if self.stops.retire.is_cancelled() {
            // What is wanted now is not ours to bring.
            server.stop().await;
        } else {
            self.wake.meanwhile(server.stop()).await;
        }
        self.gate().target().set_status(Status::Idle);
    }
}
