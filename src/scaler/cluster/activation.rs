//! Activation of a target in a cluster: begin, end and failure of cold starts.

use std::{future::pending, time::Duration};

use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    super::{activator::Activator, probe_reporter::advice},
    keeper::{Keeper, PodCounts},
};
use crate::{
    admission::Gate,
    domain::{Phase, Reason},
    state::{Cause, PodStart, Status},
};

/// Wait for the first list of pods before a start counts as cold.
const SYNC_GRACE: Duration = Duration::from_secs(1);

/// `Retry-After` of failed requests.
const ACTIVATION_RETRY_AFTER: Duration = Duration::from_secs(10);

/// Interval at which a cold start without requests is abandoned.
const ABANDON_INTERVAL: Duration = Duration::from_secs(1);

/// Runs the activations of a target. Never returns.
pub(super) async fn run(keeper: &Keeper) {
    let mut activator = Activator::new(keeper.gate.clone());
    let mut counts = keeper.counts.subscribe();
    loop {
        until_cold_start(keeper, &mut activator, &mut counts).await;
        activate(keeper, &mut activator, &mut counts).await;
    }
}

/// Runs one cold start to its end. If all endpoints go away before one has answered, and requests are held, the same cold
/// start continues with a new activation timeout.
async fn activate(keeper: &Keeper, activator: &mut Activator, counts: &mut watch::Receiver<PodCounts>) {
    loop {
        activator.begin_external_activation();
        keeper.gate.target().set_status(Status::Starting);
        let limit = keeper.gate.policy().readiness.activation_timeout.get();
        tokio::select! {
            biased; // a ready endpoint outweighs any obstacle
            () = until(counts, PodCounts::is_up) => {}
            obstacle = activator.unrecoverable() => {
                return activator.failed(obstacle.message.clone(), keeper.last_lines(), obstacle.cause(), ACTIVATION_RETRY_AFTER);
            }
            () = sleep(limit) => {
                return activator.failed(keeper.timeout_reason(), keeper.last_lines(), Cause::Passing, ACTIVATION_RETRY_AFTER);
            }
        }
        if until_served(&keeper.gate, activator, counts).await {
            return;
        }
        tracing::info!(route = %keeper.gate.key(), "all endpoints went away before one answered; the cold start continues");
        keeper.gate.cold_starts().reopen(Phase::Load);
    }
}

/// Waits until requests are held while the target is down.
async fn until_cold_start(
    keeper: &Keeper,
    activator: &mut Activator,
    counts: &mut watch::Receiver<PodCounts>,
) {
    loop {
        let now = *counts.borrow_and_update();
        if now.is_up() {
            until(counts, |counts| !counts.is_up()).await;
            continue;
        }
        if activator.is_wanted() {
            if now.is_synced
                || timeout(SYNC_GRACE, until(counts, |counts| counts.is_synced || counts.is_up()))
                    .await
                    .is_err()
            {
                return;
            }
            continue;
        }
        let target = keeper.gate.target();
        let has_failed = matches!(target.status(), Status::Failed(_));
        if !has_failed {
            let is_leaving = target.in_flight() > 0;
            target.set_status(if is_leaving { Status::Stopping } else { Status::Idle });
        }
        tokio::select! {
            biased; // any order will do
            () = until(counts, |counts| *counts != now) => {}
            () = activator.next_arrival() => {}
            () = sleep(ACTIVATION_RETRY_AFTER), if has_failed => target.set_status(Status::Idle),
        }
    }
}

/// Waits until the cold start is answered or abandoned. Returns `false` if the target goes down first and requests are
/// held.
async fn until_served(
    gate: &Gate,
    activator: &mut Activator,
    counts: &mut watch::Receiver<PodCounts>,
) -> bool {
    let cold_starts = gate.cold_starts();
    let over = async {
        while cold_starts.phase().is_some() {
            sleep(ABANDON_INTERVAL).await;
            if gate.requests() == 0 {
                cold_starts.abandoned();
            }
        }
    };
    let down = async {
        loop {
            until(counts, |counts| !counts.is_up()).await;
            if cold_starts.phase().is_none() {
                return;
            }
            tokio::select! {
                biased; // an endpoint that is ready again first
                () = until(counts, PodCounts::is_up) => {}
                // A request in flight on a removed pod may still be answered.
                () = activator.wanted() => return,
            }
        }
    };
    tokio::select! {
        biased; // down first: no request can be answered
        () = down => cold_starts.phase().is_none(),
        () = over => true,
    }
}

/// Waits until the counts satisfy `is_so`. Cancel-safe.
async fn until(counts: &mut watch::Receiver<PodCounts>, is_so: impl FnMut(&PodCounts) -> bool) {
    if counts.wait_for(is_so).await.is_err() {
        // The keeper was dropped.
        pending::<()>().await;
    }
}

// === impl Keeper ===

impl Keeper {
    /// Describes an activation that timed out.
    fn timeout_reason(&self) -> Reason {
        let limit = self.gate.policy().readiness.activation_timeout;
        let obstacle =
            self.gate.target().obstacle().filter(|obstacle| !obstacle.kind.is_detected_by_probes());
        let why = obstacle.map_or_else(|| self.describe_pods().into(), |obstacle| obstacle.message.clone());
        why.map(|why| format!("the target was not ready within {limit}: {why}"))
    }

    /// Returns the last lines of output of the newest pod that is not ready, if logs are read.
    fn last_lines(&self) -> Vec<String> {
        let discovered = self.discovered.borrow();
        let created = |start: &PodStart| start.seen(Phase::Create).map(|seen| seen.at);
        let unready = discovered.starts.iter().filter(|start| start.seen(Phase::Load).is_none());
        let lines = unready.filter_map(|start| Some((created(start), start.tail.as_ref()?.lines())));
        let lines = lines.filter(|(_, lines)| !lines.is_empty()).max_by_key(|(created, _)| *created);
        lines.map(|(_, lines)| lines).unwrap_or_default()
    }

    /// Describes why no pod is ready.
    fn describe_pods(&self) -> String {
        let discovered = self.discovered.borrow().clone();
        if let Some(problem) = &discovered.problem {
            return problem.to_string();
        }
        if !discovered.is_synced {
            return "the Kubernetes API server has not answered yet".into();
        }
        let pods = discovered.endpoints.iter().filter(|endpoint| !endpoint.terminating).count();
        let gated = discovered.endpoints.iter().filter(|endpoint| endpoint.gated).count();
        let counts = *self.counts.borrow();
        let missing: Vec<_> = self.missing_groups(&counts).map(|name| &**name).collect();
        let path = &self.gate.policy().readiness.path;
        match &*self.last_probe.lock() {
            _ if pods == 0 => "there is no pod".into(),
            _ if !missing.is_empty() => format!("no pod is ready of: {}", missing.join(", ")),
            _ if gated > 0 => format!("{gated} of {pods} pods wait for a readiness gate that they declare"),
            None => format!("none of {pods} pods is ready"),
            Some((address, answer)) => {
                let advice = if answer.is_rejection() { advice(answer) } else { "" };
                let pause = if advice.is_empty() { "" } else { "; " };
                format!(
                    "none of {pods} pods is ready; the last probe, of {path} at {address}, saw: {answer}{pause}{advice}"
                )
            }
        }
    }
}

// === impl PodCounts ===

impl PodCounts {
    /// Returns true if an endpoint takes requests, or is likely to again.
    const fn is_up(&self) -> bool {
        self.open > 0 || self.doubtful > 0
    }
}
