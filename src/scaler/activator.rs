//! Steps shared by launcher, prober and keeper: wait for demand, run an activation, watch an endpoint.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};

use super::probe_reporter::{ProbeReporter, advice};
use crate::{
    admission::Gate,
    domain::{ObstacleKind, Reason, WhenPaused},
    probe::{ProbeResult, probe},
    state::{Cause, Endpoint, Obstacle},
};

/// Time without a failure after which a ramp widens without an answer, if the endpoint is alive.
pub(super) const RAMP_STEP: Duration = Duration::from_millis(150);

/// Longest such time if the endpoint does not answer probes.
const MAX_UNANSWERED_RAMP_STEP: Duration = Duration::from_secs(5);

/// Bounds of the silence after which a server with requests in flight is probed: the mean time to the first byte, in steps
/// of the lower bound.
const MIN_SILENCE: Duration = Duration::from_secs(10);
const MAX_SILENCE: Duration = Duration::from_secs(60);

/// Consecutive unanswered probes after which a silent server is suspect.
const SILENT_PROBES: u32 = 3;

/// Interval between probes of a silent server.
const SILENT_PROBE_INTERVAL: Duration = Duration::from_secs(5);

/// Drives the activations of one route.
pub(super) struct Activator {
    pub(super) gate: Arc<Gate>,
    arrivals: watch::Receiver<u64>,
}

// === impl Wake ===

impl Activator {
    pub(super) fn new(gate: Arc<Gate>) -> Self {
        let arrivals = gate.demand().arrivals();
        Self { gate, arrivals }
    }

    /// Returns true if requests are held or an activation is pending. Requests in flight have an endpoint already.
    pub(super) fn is_wanted(&self) -> bool {
        self.gate.demand().activation_since().is_some() || self.gate.held() > 0
    }

    /// Waits until the target is wanted. Cancel-safe.
    pub(super) async fn wanted(&mut self) {
        // A request is enqueued before its arrival is published, so none is missed in between.
        while !self.is_wanted() && self.arrivals.changed().await.is_ok() {}
    }

    /// Waits for the next enqueued request. Cancel-safe.
    pub(super) async fn next_arrival(&mut self) {
        if self.arrivals.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// Begins an activation by this proxy, which ends the `signal` phase.
    pub(super) fn begin_activation(&self) {
        self.begin_external_activation();
        self.gate.cold_starts().signal_acknowledged();
    }

    /// Begins an activation of a target that is scaled elsewhere; the push to the scaler ends the `signal` phase.
    pub(super) fn begin_external_activation(&self) {
        let demand = self.gate.demand();
        if demand.activation_since().is_none() {
            // Requests were held when the last endpoint went away.
            demand.request_activation(self.gate.policy().readiness.activation_timeout.get());
        }
        let began = demand.activation_since().unwrap_or_else(Instant::now);
        let cold_starts = self.gate.cold_starts();
        cold_starts.begin(began, self.gate.held());
        if let Some(obstacle) =
            self.gate.target().obstacle().filter(|obstacle| obstacle.kind.prevents_start())
        {
            cold_starts.set_obstacle(obstacle.message.full().clone());
        }
    }

    /// Runs `work` to its end. If the target becomes wanted meanwhile, the activation begins but has to wait.
    pub(super) async fn run_accepting_demand<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        tokio::select! {
            // The end of the work first: then the caller begins the activation.
            biased;
            done = &mut work => return done,
            () = self.wanted() => self.begin_activation(),
        }
        work.await
    }

    /// Probes at the readiness interval until the target is ready, reports lasting failures as obstacles, and stores the
    /// last answer in `last`.
    pub(super) async fn until_ready(&self, address: &str, last: &mut Option<ProbeResult>) {
        let readiness = self.gate.policy().readiness.clone();
        let mut ticks = interval(readiness.interval.get().max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reporter = ProbeReporter::new(self.gate.clone());
        loop {
            ticks.tick().await;
            let answer = probe(address, &readiness).await;
            reporter.record(address, &answer);
            let is_ready = answer.is_ready();
            *last = Some(answer);
            if is_ready {
                return;
            }
        }
    }

    /// Waits until an obstacle has outlasted its failure grace. Cancel-safe.
    pub(super) async fn unrecoverable(&self) -> Arc<Obstacle> {
        let mut obstacles = self.gate.target().obstacles();
        loop {
            let obstacle = obstacles.borrow_and_update().clone();
            let until = obstacle.as_ref().and_then(|obstacle| self.grace_end(obstacle));
            tokio::select! {
                // A changed obstacle first: it may have been removed in time.
                biased;
                // Cannot fail: `self.gate` has the sender.
                _ = obstacles.changed() => {}
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {
                    if let Some(obstacle) = obstacle {
                        return obstacle;
                    }
                }
            }
        }
    }

    /// Returns the end of the obstacle's failure grace; `None` if the policy sets no limit.
    fn grace_end(&self, obstacle: &Obstacle) -> Option<Instant> {
        let policy = self.gate.policy();
        match obstacle.kind {
            // The gate has failed the held requests already.
            ObstacleKind::AutoscalingPaused if policy.when_paused == WhenPaused::Reject => {
                Some(obstacle.since)
            }
            kind => policy.failure_grace.of(kind).map(|grace| obstacle.since + grace.get()),
        }
    }

    /// Marks the endpoint as ready, which ends the lease.
    pub(super) fn open(&self, endpoint: &Endpoint, limit: Option<u32>) {
        self.gate.target().ready(endpoint, limit);
        self.gate.demand().end_activation();
    }

    /// Widens the ramp of an endpoint while requests are held, without waiting for answers, which may take long or
    /// never arrive. `ask` probes the endpoint. Never returns; cancel-safe. The owner drops this future when a
    /// request fails.
    pub(super) async fn widen_ramp<F: Future<Output = ProbeResult>>(
        &self,
        endpoint: &Endpoint,
        ask: impl Fn() -> F,
    ) {
        let mut arrivals = self.gate.demand().arrivals();
        loop {
            while endpoint.is_wide() || self.gate.held() == 0 {
                if arrivals.changed().await.is_err() {
                    // The gate was dropped.
                    std::future::pending().await
                }
            }
            let began = Instant::now();
            sleep(RAMP_STEP.max(endpoint.ramp_pause())).await;
            match ask().await {
                // The endpoint would refuse requests as well, so the ramp does not widen.
                ProbeResult::Refused => continue,
                answer if answer.is_alive() => {}
                _ => {
                    sleep_until(began + self.mean_first_byte().clamp(RAMP_STEP, MAX_UNANSWERED_RAMP_STEP))
                        .await
                }
            }
            if self.gate.held() > 0 {
                self.gate.target().widen(endpoint);
            }
        }
    }

    /// Detects a server that stalled without closing its connections: with requests in flight it sends nothing for
    /// longer than the mean time to the first byte, then answers none of [`SILENT_PROBES`] probes. The endpoint then
    /// becomes suspect. A busy server answers a probe, or sends part of an answer. Never returns; cancel-safe.
    pub(super) async fn watch_silence<F: Future<Output = ProbeResult>>(
        &self,
        endpoint: &Endpoint,
        ask: impl Fn() -> F,
    ) {
        let (mut silent, mut probes) = (Duration::ZERO, 0);
        loop {
            let step = if probes == 0 { MIN_SILENCE } else { SILENT_PROBE_INTERVAL };
            sleep(step).await;
            silent += step;
            if endpoint.take_data_arrived() || endpoint.in_flight() == 0 {
                (silent, probes) = (Duration::ZERO, 0);
                continue;
            }
            if silent < self.mean_first_byte().min(MAX_SILENCE) {
                continue;
            }
            let answer = ask().await;
            probes = if answer.is_alive() { 0 } else { probes + 1 };
            if probes < SILENT_PROBES {
                continue;
            }
            if !endpoint.take_data_arrived() {
                let (route, address) = (self.gate.key(), endpoint.address());
                let probe = self.describe_probe(Some(answer));
                tracing::warn!(%route, address, probe, "the server answers neither requests nor probes; sending no more requests to it");
                endpoint.suspect();
            }
            (silent, probes) = (Duration::ZERO, 0);
        }
    }

    /// Probes the endpoint once.
    pub(super) async fn probe_endpoint(&self, endpoint: &Endpoint) -> ProbeResult {
        let readiness = self.gate.policy().readiness.clone();
        probe(endpoint.address(), &readiness).await
    }

    /// Returns the mean time to the first byte of requests that were not held by a cold start.
    fn mean_first_byte(&self) -> Duration {
        let summed = self.gate.counters().first_byte_durations();
        match summed.count {
            0 => Duration::MAX,
            count => Duration::try_from_secs_f64(summed.sum / count as f64).unwrap_or(Duration::MAX),
        }
    }

    /// Ends the activation: the target is ready.
    pub(super) fn activated(&self, endpoint: &Endpoint) {
        self.gate.cold_starts().ready(Some(endpoint.address()));
        endpoint.record_recovery();
        let ramp_start = self.gate.policy().concurrency.ramp_start;
        self.open(endpoint, Some(ramp_start));
        // New requests are dispatched immediately, so only requests that were held before could be left here.
        if self.gate.requests() == 0 {
            self.gate.cold_starts().abandoned();
        }
    }

    /// Describes an activation that timed out, with the answer to the last probe.
    pub(super) fn timeout_reason(&self, last: Option<ProbeResult>) -> String {
        let limit = self.gate.policy().readiness.activation_timeout;
        format!("the target was not ready within {limit}: {}", self.describe_probe(last))
    }

    /// Describes the answer to the last probe.
    pub(super) fn describe_probe(&self, last: Option<ProbeResult>) -> String {
        let path = &self.gate.policy().readiness.path;
        match last {
            Some(answer) if answer.is_rejection() => {
                format!("the last probe of {path} saw: {answer}; {}", advice(&answer))
            }
            Some(answer) => format!("the last probe of {path} saw: {answer}"),
            None => format!("no probe of {path} had time to end"),
        }
    }

    /// Ends the activation as failed, with all held requests. The next one begins after `retry_after`.
    pub(super) fn failed(
        &self,
        reason: Reason,
        last_lines: Vec<String>,
        cause: Cause,
        retry_after: Duration,
    ) {
        tracing::warn!(route = %self.gate.key(), %reason, ?retry_after, "the target could not be started");
        // The record first: a client may read it as soon as its request has failed.
        self.gate.cold_starts().failed(reason.full().clone(), last_lines.clone());
        self.gate.target().failed(reason, &last_lines, cause, retry_after);
        self.gate.demand().end_activation();
    }

    /// Waits until no request has been held or in flight for `after`, then retires the endpoint. A request that
    /// arrives at the same moment is served: if it was dispatched, the endpoint is reopened; if it is held, it
    /// triggers the next activation. Sleeps to the earliest possible end. Cancel-safe.
    pub(super) async fn until_idle(&self, endpoint: &Endpoint, after: impl Fn() -> Duration, up: Instant) {
        let demand = self.gate.demand();
        loop {
            let wait =
                time_until_idle(demand.since_last_activity(), up.elapsed(), self.gate.requests(), after());
            if !wait.is_zero() {
                sleep(wait).await;
                continue;
            }
            // Clears an activation that was requested before the endpoint became ready. This precedes the retirement,
            // since an activation requested after that must stay.
            demand.end_activation();
            let was_ready = endpoint.is_ready();
            endpoint.retire();
            if self.gate.requests() == 0 {
                return;
            }
            if was_ready {
                self.open(endpoint, None);
            }
        }
    }
}

/// Returns the shortest time until the target can be idle: `after` since the last request, and since it became ready, as
/// clients that gave up may retry.
fn time_until_idle(since_last: Option<Duration>, up: Duration, requests: u64, after: Duration) -> Duration {
    if requests > 0 {
        return after.max(Duration::from_millis(1));
    }
    after.saturating_sub(since_last.map_or(up, |since| since.min(up)))
}

/// Waits until the endpoint is suspect. A doubted endpoint is probed with `ask`, at once but at most every 50 ms, and
/// becomes suspect unless it is alive. Cancel-safe.
pub(super) async fn until_suspect<F: Future<Output = ProbeResult>>(
    endpoint: &Endpoint,
    mut ask: impl FnMut() -> F,
) {
    let mut next = Instant::now();
    while endpoint.is_ready() {
        if !endpoint.is_doubted() {
            endpoint.attention().await;
            continue;
        }
        let asked = async {
            sleep_until(next).await;
            next = Instant::now() + Endpoint::BACKOFF;
            ask().await
        };
        tokio::select! {
            biased; // another request may have made it suspect, which spares the probe
            () = endpoint.attention() => {}
            answer = asked => match answer.is_alive() {
                true => endpoint.record_recovery(),
                // A request may have been answered meanwhile, which cleared the doubt.
                false if endpoint.is_doubted() => endpoint.suspect(),
                false => {}
            }
        }
    }
}

/// Waits until nothing is in flight on a retired endpoint. Cancel-safe.
pub(super) async fn until_vacant(endpoint: &Endpoint) {
    while endpoint.in_flight() > 0 {
        endpoint.attention().await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::{coldstart::ColdStarts, domain::Policy};

    #[test]
    fn idle_counts_from_the_last_request_or_from_ready() {
        let s = Duration::from_secs;
        let after = s(300);
        assert_eq!(time_until_idle(Some(s(100)), s(1000), 0, after), s(200), "300 - 100");
        assert_eq!(
            time_until_idle(Some(s(900)), s(60), 0, after),
            s(240),
            "the last request 900 s ago, but ready for 60: 300 - 60"
        );
        assert_eq!(time_until_idle(Some(s(300)), s(300), 0, after), s(0));
        assert_eq!(
            time_until_idle(Some(s(400)), s(400), 1, after),
            s(300),
            "a request may end now: then 300 are left"
        );
        assert_eq!(time_until_idle(None, s(10), 0, after), s(290), "no request yet");
        assert!(
            !time_until_idle(None, s(10), 1, s(0)).is_zero(),
            "a request in flight must not cause a busy loop"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn obstacle_is_unrecoverable_after_its_grace() {
        let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
        let activator = Activator::new(gate.clone());
        let began = Instant::now();
        let secs = Duration::from_secs;
        let facts = async {
            let say = |kind, text: &str| gate.target().set_obstacle(Some(Obstacle::new(kind, text)));
            say(ObstacleKind::CrashLoop, "exit code 1");
            sleep(secs(59)).await;
            say(ObstacleKind::NoKedaStream, "no stream");
            sleep(secs(600)).await;
            say(ObstacleKind::ImagePull, "not found");
            sleep(secs(100)).await;
            say(ObstacleKind::ImagePull, "back-off");
            std::future::pending().await
        };
        let obstacle = tokio::select! {
            biased;
            obstacle = activator.unrecoverable() => obstacle,
            () = facts => unreachable!(),
        };
        assert_eq!((obstacle.kind, &*obstacle.message), (ObstacleKind::ImagePull, "back-off"));
        let took = began.elapsed();
        assert_eq!(
            took.as_secs(),
            779,
            "59 of 60 s for a crash loop, no limit for a stream, 120 s for an image"
        );
        gate.target().set_obstacle(Some(Obstacle::new(ObstacleKind::AutoscalingPaused, "paused")));
        activator.unrecoverable().await;
        assert_eq!(began.elapsed(), took, "a pause has no grace");
    }

    #[tokio::test(start_paused = true)]
    async fn endpoint_retires_idle_timeout_after_last_answer() {
        let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
        let activator = Activator::new(gate.clone());
        let endpoint = Endpoint::new("127.0.0.1:9", 1);
        gate.target().add(&endpoint);
        activator.open(&endpoint, None);
        let up = Instant::now();
        let (permit, _) = gate.enter().unwrap();
        let last = async {
            sleep(Duration::from_secs(1000)).await;
            drop(permit);
        };
        tokio::join!(last, activator.until_idle(&endpoint, || Duration::from_secs(300), up));
        let took = up.elapsed();
        assert!(
            took >= Duration::from_secs(1300) && took <= Duration::from_millis(1_300_010),
            "{took:?}: 1000 + 300"
        );
        assert!(!endpoint.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn silent_server_is_suspect_and_a_busy_one_is_not() {
        let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
        let activator = Activator::new(gate.clone());
        let endpoint = Endpoint::new("127.0.0.1:9", 1);
        gate.target().add(&endpoint);
        activator.open(&endpoint, None);
        let hour = Duration::from_secs(3600);
        let unanswered = async || ProbeResult::TimedOut(Duration::from_secs(1).into());
        assert!(timeout(hour, activator.watch_silence(&endpoint, unanswered)).await.is_err());
        assert!(endpoint.is_ready(), "nothing is in flight, so it is not probed");

        let _permit = gate.enter().unwrap();
        assert!(
            timeout(hour, activator.watch_silence(&endpoint, async || ProbeResult::Ready)).await.is_err()
        );
        assert!(endpoint.is_ready(), "slow, but it answers probes");
        let connection = endpoint.connection();
        let sends = async {
            loop {
                sleep(Duration::from_secs(50)).await;
                connection.record_arrived_data();
            }
        };
        let busy = async { tokio::join!(activator.watch_silence(&endpoint, unanswered), sends) };
        assert!(timeout(hour, busy).await.is_err());
        assert!(endpoint.is_ready(), "it sends parts of an answer");

        for (usual, expected) in [(None, 70), (Some(1), 20), (Some(30), 30)] {
            if let Some(usual) = usual {
                gate.counters().first_byte(Duration::from_secs(usual), false, None);
            }
            endpoint.take_data_arrived();
            let began = Instant::now();
            tokio::select! {
                () = until_suspect(&endpoint, unanswered) => {}
                () = activator.watch_silence(&endpoint, unanswered) => {}
            }
            // Expected silence: 60 s without a mean; at least 10 s; then the mean of 1 s and 30 s, rounded to steps
            // of 10 s.
            assert_eq!(
                (began.elapsed().as_secs(), endpoint.is_ready()),
                (expected, false),
                "plus two intervals of 5 s"
            );
            activator.open(&endpoint, None);
        }
    }
}
