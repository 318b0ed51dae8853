//! What launcher, prober and keeper have in common: hearing of demand, saying so, and seeing when it is over.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};

use super::sight::{Sight, advice};
use crate::{
    admission::Gate,
    domain::{ObstacleKind, Reason, WhenPaused},
    probe::{Answer, probe},
    state::{Cause, Endpoint, Obstacle},
};

/// How long a ramp waits for a failure before it widens without an answer, if the endpoint gives a sign of life.
pub(super) const RAMP_STEP: Duration = Duration::from_millis(150);

/// How long it waits at most if the endpoint gives none.
const RAMP_STEP_UNANSWERED: Duration = Duration::from_secs(5);

/// Silence of a server with requests in flight before it is probed: the usual time to the first byte, within these, in
/// steps of the first.
const MIN_SILENCE: Duration = Duration::from_secs(10);
const MAX_SILENCE: Duration = Duration::from_secs(60);

/// Probes in a row that such a server leaves unanswered before it is suspect: one may come at a bad moment.
const SILENT_PROBES: u32 = 3;

/// Time between those.
const SILENT_PROBE_INTERVAL: Duration = Duration::from_secs(5);

/// The route that is woken.
pub(super) struct Wake {
    pub(super) gate: Arc<Gate>,
    signals: watch::Receiver<u64>,
}

// === impl Wake ===

impl Wake {
    pub(super) fn new(gate: Arc<Gate>) -> Self {
        let signals = gate.demand().arrivals();
        Self { gate, signals }
    }

    /// Whether somebody waits, or has come and the lease speaks for them. What is in flight already has an endpoint.
    pub(super) fn is_wanted(&self) -> bool {
        self.gate.demand().activation_since().is_some() || self.gate.held() > 0
    }

    /// Waits until the target is wanted. Cancel-safe.
    pub(super) async fn wanted(&mut self) {
        // The signal comes after the request has joined the queue, so none is missed between look and wait.
        while !self.is_wanted() && self.signals.changed().await.is_ok() {}
    }

    /// Waits until somebody has joined the queue since the last call. Cancel-safe.
    pub(super) async fn joined(&mut self) {
        if self.signals.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// We know that the target is wanted, and bring it up: an activation has begun.
    pub(super) fn told(&self) {
        self.begin();
        self.gate.cold_starts().signal_acknowledged();
    }

    /// An activation has begun. Whoever brings the target up will know.
    pub(super) fn begin(&self) {
        let demand = self.gate.demand();
        if demand.activation_since().is_none() {
            // Held when the last endpoint went away, and not heard of again since.
            demand.request_activation(self.gate.policy().readiness.activation_timeout.get());
        }
        let began = demand.activation_since().unwrap_or_else(Instant::now);
        let cold_starts = self.gate.cold_starts();
        cold_starts.begin(began, self.gate.held());
        if let Some(obstacle) = self.gate.target().obstacle().filter(|obstacle| obstacle.kind.hinders()) {
            cold_starts.set_obstacle(obstacle.message.full().clone());
        }
    }

    /// Does `work`, during which an activation may begin, but nothing can be done for it yet.
    pub(super) async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        tokio::select! {
            // The end of the work first: whoever is wanted then is told by the next step.
            biased;
            done = &mut work => return done,
            () = self.wanted() => self.told(),
        }
        work.await
    }

    /// Probes at every interval until the target is ready, and reports what stands in its way for a while; `last` is what
    /// the last probe saw.
    pub(super) async fn until_ready(&self, address: &str, last: &mut Option<Answer>) {
        let readiness = self.gate.policy().readiness.clone();
        let mut ticks = interval(readiness.interval.get().max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sight = Sight::new(self.gate.clone());
        loop {
            ticks.tick().await;
            let answer = probe(address, &readiness).await;
            sight.saw(address, &answer);
            let is_ready = answer.is_ready();
            *last = Some(answer);
            if is_ready {
                return;
            }
        }
    }

    /// Waits until something has stood in the way of the target for longer than the policy allows. Cancel-safe.
    pub(super) async fn hopeless(&self) -> Arc<Obstacle> {
        let mut obstacles = self.gate.target().obstacles();
        loop {
            let obstacle = obstacles.borrow_and_update().clone();
            let until = obstacle.as_ref().and_then(|obstacle| self.until_hopeless(obstacle));
            tokio::select! {
                // What has just passed is no reason to give up.
                biased;
                // The gate, which is ours, has the sender.
                _ = obstacles.changed() => {}
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {
                    if let Some(obstacle) = obstacle {
                        return obstacle;
                    }
                }
            }
        }
    }

    /// Until when the target may still come though this stands in its way; `None`: for ever.
    fn until_hopeless(&self, obstacle: &Obstacle) -> Option<Instant> {
        let policy = self.gate.policy();
        match obstacle.kind {
            // The gate has told those who waited.
            ObstacleKind::AutoscalingPaused if policy.when_paused == WhenPaused::Reject => {
                Some(obstacle.since)
            }
            kind => policy.failure_grace.of(kind).map(|grace| obstacle.since + grace.get()),
        }
    }

    /// The endpoint takes requests, and so the demand for one has been met.
    pub(super) fn open(&self, endpoint: &Endpoint, limit: Option<u32>) {
        self.gate.target().ready(endpoint, limit);
        self.gate.demand().end_activation();
    }

    /// Widens the ramp of an endpoint while requests are held for it: answers may be long, and the first ones may never
    /// come. `ask` says what a probe of it sees. Never ends; cancel-safe. The owner drops this when a request fails.
    pub(super) async fn widen<F: Future<Output = Answer>>(&self, endpoint: &Endpoint, ask: impl Fn() -> F) {
        let mut signals = self.gate.demand().arrivals();
        loop {
            while endpoint.is_wide() || self.gate.held() == 0 {
                if signals.changed().await.is_err() {
                    // The gate has gone.
                    std::future::pending().await
                }
            }
            let began = Instant::now();
            sleep(RAMP_STEP.max(endpoint.ramp_pause())).await;
            match ask().await {
                // It would refuse requests, too.
                Answer::Refused => continue,
                answer if answer.is_alive() => {}
                _ => {
                    sleep_until(began + self.usual_first_byte().clamp(RAMP_STEP, RAMP_STEP_UNANSWERED)).await
                }
            }
            if self.gate.held() > 0 {
                self.gate.target().widen(endpoint);
            }
        }
    }

    /// Watches for a server that stopped without closing anything: requests are in flight on it, nothing has come from it
    /// for longer than first bytes usually take, and then it answers none of [`SILENT_PROBES`] probes. It becomes suspect.
    /// A server that is only busy answers a probe, or sends a part of an answer meanwhile. Never ends; cancel-safe.
    pub(super) async fn watch_silence<F: Future<Output = Answer>>(
        &self,
        endpoint: &Endpoint,
        ask: impl Fn() -> F,
    ) {
        let (mut silent, mut probes) = (Duration::ZERO, 0);
        loop {
            let step = if probes == 0 { MIN_SILENCE } else { SILENT_PROBE_INTERVAL };
            sleep(step).await;
            silent += step;
            if endpoint.take_heard() || endpoint.in_flight() == 0 {
                (silent, probes) = (Duration::ZERO, 0);
                continue;
            }
            if silent < self.usual_first_byte().min(MAX_SILENCE) {
                continue;
            }
            let answer = ask().await;
            probes = if answer.is_alive() { 0 } else { probes + 1 };
            if probes < SILENT_PROBES {
                continue;
            }
            if !endpoint.take_heard() {
                let (route, address) = (self.gate.key(), endpoint.address());
                let probe = self.seen(Some(answer));
                tracing::warn!(%route, address, probe, "the server answers neither requests nor probes: nothing more is sent to it");
                endpoint.suspect();
            }
            (silent, probes) = (Duration::ZERO, 0);
        }
    }

    /// Probes the endpoint once.
    pub(super) async fn ask(&self, endpoint: &Endpoint) -> Answer {
        let readiness = self.gate.policy().readiness.clone();
        probe(endpoint.address(), &readiness).await
    }

    /// The mean time to the first byte of an answer, of requests that waited for no start.
    fn usual_first_byte(&self) -> Duration {
        let summed = self.gate.counters().first_byte_durations();
        match summed.count {
            0 => Duration::MAX,
            count => Duration::try_from_secs_f64(summed.sum / count as f64).unwrap_or(Duration::MAX),
        }
    }

    /// The activation has succeeded.
    pub(super) fn activated(&self, endpoint: &Endpoint) {
        self.gate.cold_starts().ready(Some(endpoint.address()));
        endpoint.vouch();
        let ramp_start = self.gate.policy().concurrency.ramp_start;
        self.open(endpoint, Some(ramp_start));
        // Whoever comes from now on finds the target up, so this counts only those that had waited.
        if self.gate.requests() == 0 {
            self.gate.cold_starts().abandoned();
        }
    }

    /// Why an activation failed that took too long.
    pub(super) fn too_late(&self, last: Option<Answer>) -> String {
        let limit = self.gate.policy().readiness.activation_timeout;
        format!("the target was not ready within {limit}: {}", self.seen(last))
    }

    /// What the last probe saw, in words.
    pub(super) fn seen(&self, last: Option<Answer>) -> String {
        let path = &self.gate.policy().readiness.path;
        match last {
            Some(answer) if answer.is_rejection() => {
                format!("the last probe of {path} saw: {answer}; {}", advice(&answer))
            }
            Some(answer) => format!("the last probe of {path} saw: {answer}"),
            None => format!("no probe of {path} had time to end"),
        }
    }

    /// The activation has failed: nobody waits on. The next one begins after `retry_after`, if it is wanted.
    pub(super) fn failed(
        &self,
        reason: Reason,
        last_lines: Vec<String>,
        cause: Cause,
        retry_after: Duration,
    ) {
        tracing::warn!(route = %self.gate.key(), %reason, ?retry_after, "the target could not be started");
        // The record first, so that who is told finds it.
        self.gate.cold_starts().failed(reason.full().clone(), last_lines.clone());
        self.gate.target().failed(reason, &last_lines, cause, retry_after);
        self.gate.demand().end_activation();
    }

    /// Waits until no request has been held or in flight for `after`, then retires the endpoint. Whoever came in
    /// the very moment is served: either it is in flight, which brings the endpoint back, or it is held and wanted.
    /// Cancel-safe. It looks only when it could be so, at the earliest.
    pub(super) async fn idle(&self, endpoint: &Endpoint, after: impl Fn() -> Duration, up: Instant) {
        let demand = self.gate.demand();
        loop {
            let wait = idle_in(demand.since_last_activity(), up.elapsed(), self.gate.requests(), after());
            if !wait.is_zero() {
                sleep(wait).await;
                continue;
            }
            // A signal from before the endpoint was ready may have come late: it wants what is there. One from after
            // the retirement counts, so this cannot come later.
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

/// When a target could be idle at the earliest: not while there are requests, and `after` since the last one, but
/// also since it is up. Whoever waited for it and left may come back.
fn idle_in(quiet: Option<Duration>, up: Duration, requests: u64, after: Duration) -> Duration {
    if requests > 0 {
        return after.max(Duration::from_millis(1));
    }
    after.saturating_sub(quiet.map_or(up, |quiet| quiet.min(up)))
}

/// Waits until the endpoint is not ready. One that is in doubt is asked whether it answers (`ask`), at once but not more
/// often than every 50 ms: it is suspect if it gives no sign of life. Cancel-safe.
pub(super) async fn suspect<F: Future<Output = Answer>>(endpoint: &Endpoint, mut ask: impl FnMut() -> F) {
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
            biased; // it became suspect by another request, so that asking is needless
            () = endpoint.attention() => {}
            answer = asked => match answer.is_alive() {
                true => endpoint.vouch(),
                // It may have answered a request meanwhile.
                false if endpoint.is_doubted() => endpoint.suspect(),
                false => {}
            }
        }
    }
}

/// Waits until nothing is in flight on an endpoint that has been retired. Cancel-safe.
pub(super) async fn vacant(endpoint: &Endpoint) {
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
    fn idle_is_counted_from_the_last_request_or_from_ready_and_never_while_there_are_any() {
        let s = Duration::from_secs;
        let after = s(300);
        assert_eq!(idle_in(Some(s(100)), s(1000), 0, after), s(200), "300 - 100");
        assert_eq!(
            idle_in(Some(s(900)), s(60), 0, after),
            s(240),
            "it left 900 s ago, but it is up since 60: 300 - 60"
        );
        assert_eq!(idle_in(Some(s(300)), s(300), 0, after), s(0));
        assert_eq!(idle_in(Some(s(400)), s(400), 1, after), s(300), "it may end now, and then 300 are to go");
        assert_eq!(idle_in(None, s(10), 0, after), s(290), "nobody ever came");
        assert!(!idle_in(None, s(10), 1, s(0)).is_zero(), "a request in flight is waited for, not spun on");
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_hopeless_when_a_reason_has_lasted_its_grace_and_not_when_it_passed_in_time() {
        let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
        let wake = Wake::new(gate.clone());
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
            obstacle = wake.hopeless() => obstacle,
            () = facts => unreachable!(),
        };
        assert_eq!((obstacle.kind, &*obstacle.message), (ObstacleKind::ImagePull, "back-off"));
        let took = began.elapsed();
        assert_eq!(
            took.as_secs(),
            779,
            "59 of the 60 of a crash loop, no bound for a stream, 120 for an image"
        );
        gate.target().set_obstacle(Some(Obstacle::new(ObstacleKind::AutoscalingPaused, "paused")));
        wake.hopeless().await;
        assert_eq!(began.elapsed(), took, "who waits for a paused one is told at once");
    }

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_retires_when_the_last_answer_is_that_long_ago_and_not_before() {
        let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
        let wake = Wake::new(gate.clone());
        let endpoint = Endpoint::new("127.0.0.1:9", 1);
        gate.target().add(&endpoint);
        wake.open(&endpoint, None);
        let up = Instant::now();
        let (permit, _) = gate.enter().unwrap();
        let last = async {
            sleep(Duration::from_secs(1000)).await;
            drop(permit);
        };
        tokio::join!(last, wake.idle(&endpoint, || Duration::from_secs(300), up));
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
        let wake = Wake::new(gate.clone());
        let endpoint = Endpoint::new("127.0.0.1:9", 1);
        gate.target().add(&endpoint);
        wake.open(&endpoint, None);
        let hour = Duration::from_secs(3600);
        let unanswered = async || Answer::TimedOut(Duration::from_secs(1).into());
        assert!(timeout(hour, wake.watch_silence(&endpoint, unanswered)).await.is_err());
        assert!(endpoint.is_ready(), "nothing is in flight: it is not even asked");

        let _permit = gate.enter().unwrap();
        assert!(timeout(hour, wake.watch_silence(&endpoint, async || Answer::Ready)).await.is_err());
        assert!(endpoint.is_ready(), "it takes its time, and answers probes");
        let connection = endpoint.connection();
        let sends = async {
            loop {
                sleep(Duration::from_secs(50)).await;
                connection.hear();
            }
        };
        let busy = async { tokio::join!(wake.watch_silence(&endpoint, unanswered), sends) };
        assert!(timeout(hour, busy).await.is_err());
        assert!(endpoint.is_ready(), "it sends parts of an answer, though it has no time for probes");

        for (usual, expected) in [(None, 70), (Some(1), 20), (Some(30), 30)] {
            if let Some(usual) = usual {
                gate.counters().first_byte(Duration::from_secs(usual), false, None);
            }
            endpoint.take_heard();
            let began = Instant::now();
            tokio::select! {
                () = suspect(&endpoint, unanswered) => {}
                () = wake.watch_silence(&endpoint, unanswered) => {}
            }
            // After 60 s, as long as no usual time is known; after 10; after the mean of 1 and 30 s, in steps of 10.
            assert_eq!(
                (began.elapsed().as_secs(), endpoint.is_ready()),
                (expected, false),
                "and two times 5"
            );
            wake.open(&endpoint, None);
        }
    }
}
