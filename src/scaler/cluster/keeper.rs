//! State shared by the tasks of one target, and the probes of its pods.

use std::{sync::Arc, time::Duration};

use futures_util::future::{BoxFuture, join_all};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use crate::{
    admission::Gate,
    domain::{Period, Readiness, Roles},
    probe::{ProbeProtocol, ProbeResult},
    scaler::{activator::Activator, probe_reporter::advice},
    state::{Discovered, Endpoint, Protocol, TargetState},
};

/// Maximum number of concurrent probes of a target.
pub(super) const MAX_PROBES: usize = 32;

/// Probes an endpoint.
pub(super) type Prober = Arc<dyn Fn(&Endpoint, &Readiness) -> BoxFuture<'static, ProbeResult> + Send + Sync>;

/// Resolves the host of an address. Returns the answer of a probe if that fails.
pub(super) type Resolver = Arc<dyn Fn(&str, Period) -> BoxFuture<'static, Option<ProbeResult>> + Send + Sync>;

/// State shared by the pods, the gateway and the activation of one target.
pub(super) struct Keeper {
    pub(super) gate: Arc<Gate>,
    pub(super) discovered: watch::Receiver<Arc<Discovered>>,
    /// The pods behind a gateway, which are not endpoints of the target.
    pub(super) pods_behind_gateway: Option<TargetState>,
    /// Names of the groups of pods that the target needs.
    pub(super) groups: Vec<Arc<str>>,
    pub(super) counts: watch::Sender<PodCounts>,
    pub(super) prober: Prober,
    pub(super) resolver: Resolver,
    pub(super) probes: Semaphore,
    /// Address and answer of the last probe.
    pub(super) last_probe: Mutex<Option<(Box<str>, ProbeResult)>>,
    /// The last answer that the pod's state in the cluster overruled.
    pub(super) overruled: Mutex<Option<ProbeResult>>,
}

/// Numbers of endpoints and pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PodCounts {
    /// Endpoints of the target that take requests.
    pub(super) open: u32,
    /// Endpoints that failed a request and have not failed a probe since.
    pub(super) doubtful: u32,
    /// Pods that take requests.
    pub(super) pods: u32,
    /// Pods of each group that answer probes, whether or not they take requests.
    pub(super) groups: [u32; Roles::MAX_GROUPS],
    /// The cluster's pods have been listed.
    pub(super) is_synced: bool,
}

pub(super) const fn probe_protocol_of(protocol: Protocol) -> ProbeProtocol {
    match protocol {
        Protocol::Http1 => ProbeProtocol::Http1,
        Protocol::H2c => ProbeProtocol::Http2,
    }
}

// === impl Keeper ===

impl Keeper {
    /// Returns the pods' endpoints.
    pub(super) fn pods(&self) -> &TargetState {
        self.pods_behind_gateway.as_ref().unwrap_or_else(|| self.gate.target())
    }

    /// Returns the groups without a pod that answers. While any group is missing, no pod takes requests.
    pub(super) fn missing_groups(&self, counts: &PodCounts) -> impl Iterator<Item = &Arc<str>> {
        self.groups.iter().zip(counts.groups).filter(|(_, count)| *count == 0).map(|(name, _)| name)
    }

    /// Waits until every group has a pod that answers, or with `is_complete` false, until a group has none.
    /// Cancel-safe.
    pub(super) async fn await_completeness(&self, is_complete: bool) {
        let mut counts = self.counts.subscribe();
        let so = counts.wait_for(|counts| self.missing_groups(counts).next().is_none() == is_complete);
        if so.await.is_err() {
            std::future::pending().await
        }
    }

    /// Opens an endpoint of the target with `limit` requests at first. The first endpoint ends the activation.
    pub(super) fn open(&self, activator: &Activator, endpoint: &Endpoint, limit: Option<u32>) {
        let cold_starts = self.gate.cold_starts();
        if !self.gate.target().is_up() {
            // Behind a gateway, the record names the first pod instead.
            cold_starts.ready(self.pods_behind_gateway.is_none().then(|| endpoint.address()));
        }
        activator.open(endpoint, limit);
        if self.gate.requests() == 0 {
            cold_starts.abandoned();
        }
    }

    /// Probes an endpoint, at most [`MAX_PROBES`] at once.
    pub(super) async fn probe_bounded(&self, endpoint: &Endpoint) -> ProbeResult {
        // The semaphore is never closed; a failure would only allow more probes.
        let _turn = self.probes.acquire().await;
        let readiness = self.gate.policy().readiness.clone();
        let answer = (self.prober)(endpoint, &readiness).await;
        self.gate.target().set_refusing(endpoint.address(), answer == ProbeResult::Refused);
        *self.last_probe.lock() = Some((endpoint.address().into(), answer.clone()));
        answer
    }

    /// Resolves the host of an endpoint. Returns the answer of a probe if that fails.
    pub(super) async fn resolve(&self, endpoint: &Endpoint) -> Option<ProbeResult> {
        let limit = self.gate.policy().readiness.timeout;
        (self.resolver)(endpoint.address(), limit).await
    }

    /// Probes an open endpoint; without permission to probe, an open endpoint counts as ready.
    pub(super) async fn probe_if_permitted(&self, endpoint: &Endpoint) -> ProbeResult {
        if self.gate.policy().readiness.probe {
            self.probe_bounded(endpoint).await
        } else {
            ProbeResult::Ready
        }
    }

    /// Probes all open pods. Returns the answer of one that is not alive, if any.
    pub(super) async fn probe_open_pods(&self) -> ProbeResult {
        let pods = self.pods().endpoints().clone();
        let open = pods.iter().filter(|pod| pod.is_ready());
        let answers = join_all(open.map(|pod| self.probe_if_permitted(pod))).await;
        answers.into_iter().find(|answer| !answer.is_alive()).unwrap_or(ProbeResult::Ready)
    }

    /// Logs, once per answer, that a pod is used because the cluster reports it ready although our probe fails.
    pub(super) fn overruled(&self, endpoint: &Endpoint, answer: &ProbeResult) {
        if self.overruled.lock().replace(answer.clone()).as_ref() == Some(answer) {
            return;
        }
        let (route, address, path) =
            (self.gate.key(), endpoint.address(), &self.gate.policy().readiness.path);
        let advice = if answer.is_rejection() { advice(answer) } else { "" };
        tracing::warn!(
            %route, address, path, %answer,
            "the cluster reports the pod as ready, but our probe fails; using the pod. {advice}"
        );
    }

    /// Returns the interval of probes.
    pub(super) fn interval(&self) -> Duration {
        self.gate.policy().readiness.interval.get().max(Duration::from_millis(1))
    }

    pub(super) fn update_counts(&self, change: impl FnOnce(&mut PodCounts)) {
        self.counts.send_if_modified(|counts| {
            let before = *counts;
            change(counts);
            *counts != before
        });
    }
}
