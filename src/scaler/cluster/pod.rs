//! One pod: opened by the cluster's report or by its own answer, whichever comes first.
//!
//! ```text
//!          reported ready, or answers us              fails a request
//!  closed ──────────────────────────────▶ open ──────────────────────────▶ suspect
//!    ▲                                     │ ▲  backoff; answers us, or       │
//!    │                                     │ │  is still reported ready       │
//!    │  reported unready or terminating    │ └────────────────────────────────┤
//!    └─────────────────────────────────────┴──────────────────────────────────┘
//! ```
//!
//! Our own probes only shorten the time. A pod that the cluster reports ready recovers even if our probes are rejected or
//! slow; if they show that requests would fail as well, it recovers after the time in which the cluster would have noticed.
//!
//! If the target needs pods of several groups, a pod waits before it opens until each group has one that answers. A pod
//! that only helps others stays there.

use std::{future::pending, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    super::{
        activator::{Activator, until_suspect, until_vacant},
        probe_reporter::ProbeReporter,
    },
    keeper::Keeper,
    reported_state::ReportedState,
};
use crate::{domain::Role, probe::ProbeResult, state::Endpoint};

/// Interval of probes of a suspect pod while no request waits.
const IDLE_PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// Time in which the cluster notices a failed pod: three probes of the kubelet, by its defaults. After that, its report is
/// newer than the failure.
const KUBELET_NOTICE: Duration = Duration::from_secs(30);

/// Time in which other answers may clear a doubted pod that may not be probed.
const POD_DOUBT_GRACE: Duration = Duration::from_millis(50);

/// Time for which an answer that has begun may continue after its pod is reported dead: a forced deletion leaves the
/// containers running for a while.
const SEVER_GRACE: Duration = Duration::from_secs(30);

/// Supervises one pod.
pub(super) struct PodSupervisor {
    keeper: Arc<Keeper>,
    activator: Activator,
    endpoint: Arc<Endpoint>,
    role: Role,
    reported: watch::Receiver<ReportedState>,
    state: PodState,
    /// Limit of requests in flight when the pod opens; `None` keeps the current limit.
    limit: Option<u32>,
    /// The pod was ready before this keeper started, so it needs no ramp.
    is_warm: bool,
    /// The cluster has reported the pod ready since it opened, so a report of unready closes it.
    was_reported_ready: bool,
    /// An answer to our probe opens it. Cleared when the cluster reports a ready pod as unready, as its probes may check more
    /// than ours; set again when the port refuses connections, as the next answer is from another run of the server.
    opens_on_answer: bool,
    /// The last rejection of our probe before it opened.
    rejected: Option<ProbeResult>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PodState {
    Closed,
    /// Answers, but takes no requests: other groups are missing, or it only helps others.
    Waiting,
    Open,
    Suspect,
}

// === impl PodSupervisor ===

impl PodSupervisor {
    pub(super) fn new(
        keeper: Arc<Keeper>,
        endpoint: Arc<Endpoint>,
        role: Role,
        reported: watch::Receiver<ReportedState>,
        is_warm: bool,
    ) -> Self {
        let activator = Activator::new(keeper.gate.clone());
        let state = PodState::Closed;
        Self {
            keeper,
            activator,
            endpoint,
            role,
            reported,
            state,
            limit: None,
            is_warm,
            was_reported_ready: false,
            opens_on_answer: true,
            rejected: None,
        }
    }

    /// Runs until the pod was deleted or has left the target, and nothing is in flight on it.
    pub(super) async fn run(mut self) {
        loop {
            let reported = *self.reported.borrow_and_update();
            match (reported, self.state) {
                (ReportedState::Terminating | ReportedState::Gone | ReportedState::Dead, _) => {
                    self.close();
                    self.opens_on_answer = true;
                    if self.await_vacancy(reported).await {
                        return;
                    }
                }
                (
                    ReportedState::NotReady | ReportedState::Gated,
                    PodState::Waiting | PodState::Open | PodState::Suspect,
                ) if self.was_reported_ready || reported == ReportedState::Gated => {
                    self.opens_on_answer &= !self.was_reported_ready;
                    self.close();
                }
                (ReportedState::NotReady, PodState::Closed) => self.await_probe_answer().await,
                (ReportedState::Gated, PodState::Closed) => drop(self.reported.changed().await),
                (ReportedState::Ready, PodState::Closed) => {
                    if let Some(answer) = self.rejected.take() {
                        self.keeper.overruled(&self.endpoint, &answer);
                    }
                    self.limit = Some(self.take_start_limit());
                    self.set_state(PodState::Waiting);
                    self.was_reported_ready = true;
                }
                (_, PodState::Waiting) => {
                    self.was_reported_ready |= reported == ReportedState::Ready;
                    self.await_groups().await;
                }
                (_, PodState::Open) => {
                    self.was_reported_ready |= reported == ReportedState::Ready;
                    let Self { keeper, activator, endpoint, reported, .. } = &mut self;
                    let keeper: &Keeper = keeper;
                    tokio::select! {
                        biased; // the report first: it may explain the failure
                        _ = reported.changed() => {}
                        () = until_suspect(endpoint, || probe_doubted(keeper, endpoint)) => self.set_state(PodState::Suspect),
                        () = keeper.await_completeness(false), if !keeper.groups.is_empty() => {
                            self.endpoint.retire();
                            self.limit = None;
                            self.set_state(PodState::Waiting);
                        }
                        () = widen(keeper, activator, endpoint) => {}
                    }
                }
                (_, PodState::Suspect) => {
                    self.was_reported_ready |= reported == ReportedState::Ready;
                    self.await_recovery().await;
                }
            }
            // The keeper was dropped.
            if self.reported.has_changed().is_err() {
                pending::<()>().await;
            }
        }
    }

    /// Returns the first limit, and forgets that the pod was warm.
    fn take_start_limit(&mut self) -> u32 {
        match std::mem::take(&mut self.is_warm) {
            true => u32::MAX,
            false => self.keeper.gate.policy().concurrency.ramp_start,
        }
    }

    /// Waits until the pod answers, or its report changes. Probes only while the target is wanted.
    async fn await_probe_answer(&mut self) {
        let Self { keeper, activator, endpoint, reported, opens_on_answer: is_trusted, rejected, .. } = self;
        let mut reporter = ProbeReporter::new(keeper.gate.clone());
        let answered = async {
            loop {
                if !activator.is_wanted() {
                    reporter.withdraw();
                }
                activator.wanted().await;
                let asked = Instant::now();
                if keeper.gate.policy().readiness.probe {
                    let answer = keeper.probe_bounded(endpoint).await;
                    reporter.record(endpoint.address(), &answer);
                    match answer {
                        ProbeResult::Ready if *is_trusted => return,
                        ProbeResult::Refused => *is_trusted = true,
                        answer => *rejected = Some(answer).filter(ProbeResult::is_rejection),
                    }
                }
                sleep_until(asked + keeper.interval()).await;
            }
        };
        tokio::select! {
            biased; // the report first: it makes probing needless
            _ = reported.changed() => {}
            () = answered => {
                self.limit = Some(self.take_start_limit());
                self.set_state(PodState::Waiting);
            }
        }
    }

    /// Opens the pod once every group has a pod that answers. Returns early if the report changes.
    async fn await_groups(&mut self) {
        let keeper = self.keeper.clone();
        if self.role.is_helper {
            let _ = self.reported.changed().await;
            return;
        }
        if !keeper.groups.is_empty() {
            tokio::select! {
                biased; // the report first: the pod may be going
                _ = self.reported.changed() => return,
                () = keeper.await_completeness(true) => {}
            }
        }
        self.open();
    }

    /// Waits until the pod answers again, or the report overrules our probes, or the report changes.
    async fn await_recovery(&mut self) {
        let keeper = self.keeper.clone();
        let Self { activator, endpoint, reported, .. } = self;
        let is_reported_ready = *reported.borrow() == ReportedState::Ready;
        let mut doubt = Some(DoubtGuard::new(&keeper));
        let recovered = async {
            sleep(endpoint.backoff()).await;
            let failed = Instant::now();
            while keeper.gate.policy().readiness.probe || !is_reported_ready {
                let asked = Instant::now();
                let answer = keeper.probe_bounded(endpoint).await;
                if answer.is_alive() {
                    endpoint.record_recovery();
                }
                if answer.is_ready() {
                    return;
                }
                let has_another_cause = answer.is_rejection() || matches!(answer, ProbeResult::TimedOut(_));
                if is_reported_ready && (has_another_cause || failed.elapsed() >= KUBELET_NOTICE) {
                    return keeper.overruled(endpoint, &answer);
                }
                doubt = None;
                sleep_until(asked + keeper.interval()).await;
                tokio::select! {
                    biased; // waiting requests shorten the interval
                    () = activator.wanted() => {}
                    () = sleep_until(asked + IDLE_PROBE_INTERVAL) => {}
                }
            }
        };
        let has_recovered = tokio::select! {
            biased; // the report first: the pod may be going
            _ = reported.changed() => false,
            () = recovered => true,
        };
        if has_recovered {
            // Keeps the limit of one request that suspicion has set; the ramp widens it.
            self.limit = None;
            self.set_state(PodState::Waiting);
        }
    }

    /// Waits until nothing is in flight on a pod that was deleted or has left the target, and returns true. Returns
    /// false if the report changes.
    async fn await_vacancy(&mut self, reported: ReportedState) -> bool {
        let Self { endpoint, reported: states, .. } = self;
        let left = async {
            if reported == ReportedState::Dead {
                sever(endpoint).await;
            }
            until_vacant(endpoint).await;
        };
        tokio::select! {
            biased; // a pod that is back must not be removed
            _ = states.changed() => return false,
            () = left => {}
        }
        if matches!(reported, ReportedState::Gone | ReportedState::Dead) {
            return true;
        }
        let _ = self.reported.changed().await;
        false
    }

    fn open(&mut self) {
        let limit = self.limit;
        match &self.keeper.pods_behind_gateway {
            Some(pods) => {
                self.keeper.gate.cold_starts().pod_loaded(self.endpoint.address());
                pods.ready(&self.endpoint, limit);
            }
            None => self.keeper.open(&self.activator, &self.endpoint, limit),
        }
        self.set_state(PodState::Open);
    }

    fn close(&mut self) {
        self.was_reported_ready = false;
        self.endpoint.retire();
        self.set_state(PodState::Closed);
    }

    fn set_state(&mut self, state: PodState) {
        let (was, is) = (u32::from(self.state == PodState::Open), u32::from(state == PodState::Open));
        let answers = |state| u32::from(matches!(state, PodState::Waiting | PodState::Open));
        let (answered, now_answers) = (answers(self.state), answers(state));
        let groups = self.role.groups;
        self.state = state;
        let is_endpoint = self.keeper.pods_behind_gateway.is_none();
        self.keeper.update_counts(|counts| {
            counts.pods = counts.pods + is - was;
            for (_, count) in
                counts.groups.iter_mut().enumerate().filter(|(index, _)| groups >> index & 1 == 1)
            {
                *count = *count + now_answers - answered;
            }
            if is_endpoint {
                counts.open = counts.open + is - was;
            }
        });
    }
}

/// Widens the ramp of a pod. Never returns; cancel-safe. Behind a gateway only the gateway has a ramp.
async fn widen(keeper: &Keeper, activator: &Activator, pod: &Endpoint) {
    if keeper.pods_behind_gateway.is_some() {
        return pending().await;
    }
    activator.widen_ramp(pod, || keeper.probe_if_permitted(pod)).await;
}

/// Breaks off the requests on a dead pod: those without an answer at once, so that they are retried, the others after the
/// grace.
async fn sever(endpoint: &Endpoint) {
    endpoint.sever(false);
    if timeout(SEVER_GRACE, until_vacant(endpoint)).await.is_err() {
        endpoint.sever(true);
    }
}

/// Probes a pod that broke off a request. Without permission to probe, only its other answers can clear the doubt.
async fn probe_doubted(keeper: &Keeper, endpoint: &Endpoint) -> ProbeResult {
    if keeper.gate.policy().readiness.probe {
        return keeper.probe_bounded(endpoint).await;
    }
    sleep(POD_DOUBT_GRACE).await;
    ProbeResult::TimedOut(POD_DOUBT_GRACE.into())
}

/// Counts a pod as doubtful until dropped: it failed a request, and no probe yet.
struct DoubtGuard<'a>(&'a Keeper);

impl<'a> DoubtGuard<'a> {
    fn new(keeper: &'a Keeper) -> Self {
        keeper.update_counts(|counts| counts.doubtful += 1);
        Self(keeper)
    }
}

impl Drop for DoubtGuard<'_> {
    fn drop(&mut self) {
        self.0.update_counts(|counts| counts.doubtful -= 1);
    }
}
