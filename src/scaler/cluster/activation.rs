//! When a cold start begins, and when it has failed.

use std::{future::pending, time::Duration};

use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    super::{sight::advice, wake::Wake},
    Keeper, Tally,
};
use crate::{
    admission::Gate,
    domain::{Phase, Reason},
    state::{Cause, PodStart, Status},
};

/// How long we wait for the cluster's first word before we call a start cold.
const UNHEARD: Duration = Duration::from_secs(1);

/// When those who were told of a failure are to try again, at the soonest.
const RETRY: Duration = Duration::from_secs(10);

/// How often a cold start is looked at for whether anybody is left whom it serves.
const LOOK: Duration = Duration::from_secs(1);

/// Watches over the activations of a target. Never ends.
pub(super) async fn run(keeper: &Keeper) {
    let mut wake = Wake::new(keeper.gate.clone());
    let mut tally = keeper.tally.subscribe();
    loop {
        cold(keeper, &mut wake, &mut tally).await;
        activate(keeper, &mut wake, &mut tally).await;
    }
}

/// Runs one cold start to its end. If all endpoints go away again before one has answered, and requests are held, the
/// same cold start continues, with the whole activation timeout: it ends with an answer, or with what stands in its way.
async fn activate(keeper: &Keeper, wake: &mut Wake, tally: &mut watch::Receiver<Tally>) {
    loop {
        wake.begin();
        keeper.gate.target().set_status(Status::Starting);
        let limit = keeper.gate.policy().readiness.activation_timeout.get();
        tokio::select! {
            biased; // what is up is up, whatever stood in its way
            () = until(tally, Tally::is_up) => {}
            obstacle = wake.hopeless() => {
                return wake.failed(obstacle.message.clone(), keeper.last_lines(), obstacle.cause(), RETRY);
            }
            () = sleep(limit) => {
                return wake.failed(keeper.too_late(), keeper.last_lines(), Cause::Passing, RETRY);
            }
        }
        if served(&keeper.gate, wake, tally).await {
            return;
        }
        tracing::info!(route = %keeper.gate.key(), "all endpoints went away before one answered; the cold start continues");
        keeper.gate.cold_starts().reopen(Phase::Load);
    }
}

/// Waits until requests want a target that is not there.
async fn cold(keeper: &Keeper, wake: &mut Wake, tally: &mut watch::Receiver<Tally>) {
    loop {
        let now = *tally.borrow_and_update();
        if now.is_up() {
            until(tally, |tally| !tally.is_up()).await;
            continue;
        }
        if wake.is_wanted() {
            if now.is_heard
                || timeout(UNHEARD, until(tally, |tally| tally.is_heard || tally.is_up())).await.is_err()
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
            biased; // both lead to the same
            () = until(tally, |tally| *tally != now) => {}
            () = wake.joined() => {}
            () = sleep(RETRY), if has_failed => target.set_status(Status::Idle),
        }
    }
}

/// Waits until the cold start is over: answered, or without requests. Returns `false` if the target goes down before that
/// and requests are held.
async fn served(gate: &Gate, wake: &mut Wake, tally: &mut watch::Receiver<Tally>) -> bool {
    let cold_starts = gate.cold_starts();
    let looking = async {
        while cold_starts.phase().is_some() {
            sleep(LOOK).await;
            if gate.requests() == 0 {
                cold_starts.abandoned();
            }
        }
    };
    let down = async {
        loop {
            until(tally, |tally| !tally.is_up()).await;
            if cold_starts.phase().is_none() {
                return;
            }
            tokio::select! {
                biased; // what is up again is not missed
                () = until(tally, Tally::is_up) => {}
                // What is in flight on a pod that has gone may still be answered.
                () = wake.wanted() => return,
            }
        }
    };
    tokio::select! {
        biased; // what is down serves nobody
        () = down => cold_starts.phase().is_none(),
        () = looking => true,
    }
}

/// Waits until the tally is so. Cancel-safe.
async fn until(tally: &mut watch::Receiver<Tally>, is_so: impl FnMut(&Tally) -> bool) {
    if tally.wait_for(is_so).await.is_err() {
        // The keeper has gone.
        pending::<()>().await;
    }
}

// === impl Keeper ===

impl Keeper {
    /// Why the activation took too long.
    fn too_late(&self) -> Reason {
        let limit = self.gate.policy().readiness.activation_timeout;
        let obstacle = self.gate.target().obstacle().filter(|obstacle| !obstacle.kind.is_seen_by_probes());
        let why = obstacle.map_or_else(|| self.sight().into(), |obstacle| obstacle.message.clone());
        why.map(|why| format!("the target was not ready within {limit}: {why}"))
    }

    /// What a pod that did not get ready printed last, where logs are read: of several, the one that came last.
    fn last_lines(&self) -> Vec<String> {
        let discovered = self.discovered.borrow();
        let created = |start: &PodStart| start.seen(Phase::Create).map(|seen| seen.at);
        let unready = discovered.starts.iter().filter(|start| start.seen(Phase::Load).is_none());
        let lines = unready.filter_map(|start| Some((created(start), start.tail.as_ref()?.lines())));
        let lines = lines.filter(|(_, lines)| !lines.is_empty()).max_by_key(|(created, _)| *created);
        lines.map(|(_, lines)| lines).unwrap_or_default()
    }

    /// What there is to be seen of the pods.
    fn sight(&self) -> String {
        let discovered = self.discovered.borrow().clone();
        if let Some(problem) = &discovered.problem {
            return problem.to_string();
        }
        if !discovered.is_synced {
            return "the Kubernetes API server has not been heard".into();
        }
        let pods = discovered.endpoints.iter().filter(|endpoint| !endpoint.terminating).count();
        let gated = discovered.endpoints.iter().filter(|endpoint| endpoint.gated).count();
        let tally = *self.tally.borrow();
        let missing: Vec<_> = self.missing(&tally).map(|name| &**name).collect();
        let path = &self.gate.policy().readiness.path;
        match &*self.seen.lock() {
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

// === impl Tally ===

impl Tally {
    /// Whether requests are taken, or soon may be again.
    const fn is_up(&self) -> bool {
        self.open > 0 || self.doubtful > 0
    }
}
