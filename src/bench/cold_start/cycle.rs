//! One cycle: a burst at zero and the record of its cold start.

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use http::HeaderMap;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use super::{
    admin::AdminApis,
    arrivals::Arrivals,
    prompts::{BenchEndpoint, Prompts},
    request::{self, RequestSpec, TimedRequest},
};
use crate::{
    bench::{
        http::BaseUrl,
        results::{ClockCheck, Cost, Cycle, CycleVerdict, RequestResult},
    },
    coldstart::{ColdStart, ColdStartKind, ColdStartOutcome},
};

/// Parameters of every burst.
#[derive(Clone, Debug)]
pub(super) struct Burst {
    pub(super) base: BaseUrl,
    pub(super) endpoint: BenchEndpoint,
    pub(super) headers: HeaderMap,
    pub(super) prompts: Prompts,
    pub(super) size: usize,
    pub(super) arrivals: Arrivals,
    /// Send times for [`Arrivals::File`].
    pub(super) times: Vec<Duration>,
    pub(super) seed: u64,
    /// Time limit for all answers of a burst.
    pub(super) timeout: Duration,
    /// Prefix of all request ids of this run.
    pub(super) id_prefix: String,
}

/// Result of a burst.
pub(super) struct FinishedBurst {
    pub(super) cycle: Cycle,
    /// End of the last answer.
    pub(super) ended: Instant,
}

/// Time limit for the record of a cold start to appear after the last answer.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval between queries for the record.
const RECORD_POLL_INTERVAL: Duration = Duration::from_millis(50);

// === impl Burst ===

impl Burst {
    /// Sends the burst of cycle `number` (from 1) and fetches its record. `kind` is the kind of the previous cold starts.
    /// Dropping the future closes all connections.
    ///
    /// # Errors
    /// If an admin API is unreachable.
    pub(super) async fn run(
        &self,
        number: usize,
        admins: &AdminApis,
        kind: Option<ColdStartKind>,
    ) -> Result<FinishedBurst, String> {
        let known: HashSet<_> = admins.records().await?.iter().map(identity).collect();
        let started_at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        let traces = self.send_all(number).await;
        let ended = traces.iter().map(|trace| trace.ended).max().unwrap_or_else(Instant::now);
        let mut ids: HashSet<_> = traces.iter().map(|trace| trace.id.clone()).collect();
        ids.extend((0..self.size).map(|place| self.request_id(number, place)));
        let found = self.record(admins, &known, &ids).await?;
        let requests = relative_times(&traces);
        let (verdict, error) = classify(&requests, found.as_ref(), &ids, kind);
        let found = found.filter(|_| verdict != CycleVerdict::NotCold);
        let last_ms = requests.iter().map(|request| request.sent_ms + request.total_ms).fold(0.0, f64::max);
        let cycle = Cycle {
            number,
            started_at,
            idle_ms: None,
            verdict,
            error,
            outside_clock: found.as_ref().and_then(|record| ClockCheck::of(&requests, record)),
            cost: found.as_ref().and_then(|record| Cost::of(record, last_ms)),
            cold_start: found,
            requests,
        };
        Ok(FinishedBurst { cycle, ended })
    }

    async fn send_all(&self, number: usize) -> Vec<TimedRequest> {
        let mut random = fastrand::Rng::with_seed(self.seed.wrapping_add(number as u64));
        let offsets = self.arrivals.offsets(self.size, &self.times, &mut random);
        let began = Instant::now();
        let deadline = began + self.timeout;
        let mut running = JoinSet::new();
        for (place, offset) in offsets.into_iter().enumerate() {
            let spec = RequestSpec {
                base: self.base.clone(),
                path: self.endpoint.path(),
                headers: self.headers.clone(),
                body: self.prompts.body((number - 1) * self.size + place),
                id: self.request_id(number, place),
                deadline,
                timeout: self.timeout,
            };
            running.spawn(async move {
                sleep_until(began + offset).await;
                (place, request::send(spec).await)
            });
        }
        let mut traces = running.join_all().await;
        traces.sort_by_key(|(place, _)| *place);
        traces.into_iter().map(|(_, trace)| trace).collect()
    }

    fn request_id(&self, number: usize, place: usize) -> String {
        format!("{}-{number}-{}", self.id_prefix, place + 1)
    }

    /// Waits for the new record. If several replicas have one, prefers a record whose first answered request belongs to
    /// this run, then the longest record.
    async fn record(
        &self,
        admins: &AdminApis,
        known: &HashSet<(u64, String)>,
        ids: &HashSet<String>,
    ) -> Result<Option<ColdStart>, String> {
        let deadline = Instant::now() + RECORD_TIMEOUT;
        loop {
            let records = admins.records().await;
            let late = Instant::now() >= deadline;
            let mut new = match records {
                Ok(records) => records,
                Err(error) if late => return Err(error),
                Err(_) => Vec::new(),
            };
            new.retain(|record| record.outcome.is_some() && !known.contains(&identity(record)));
            let best = new.into_iter().max_by(|one, other| {
                let rank = |record: &ColdStart| belongs_to_run(record, ids) == Some(true);
                rank(one).cmp(&rank(other)).then(one.total_ms.total_cmp(&other.total_ms))
            });
            if best.is_some() || late {
                return Ok(best);
            }
            sleep(RECORD_POLL_INTERVAL).await;
        }
    }
}

fn identity(record: &ColdStart) -> (u64, String) {
    (record.id, record.started_at.clone())
}

/// Returns whether the first answered request of a cold start belongs to this run, if known.
fn belongs_to_run(record: &ColdStart, ids: &HashSet<String>) -> Option<bool> {
    record.request_id.as_deref().map(|id| ids.contains(id))
}

/// Converts the times of a burst to times relative to its first request.
fn relative_times(traces: &[TimedRequest]) -> Vec<RequestResult> {
    let Some(first) = traces.iter().map(|trace| trace.sent).min() else { return Vec::new() };
    // Rounded to microseconds.
    let ms = |to: Instant, from: Instant| (to.duration_since(from).as_secs_f64() * 1e6).round() / 1e3;
    let request = |trace: &TimedRequest| RequestResult {
        sent_ms: ms(trace.sent, first),
        ttft_ms: trace.first_token.map(|token| ms(token, trace.sent)),
        total_ms: ms(trace.ended, trace.sent),
        status: trace.status.map(|status| status.as_u16()),
        error: trace.error.clone(),
        request_id: Some(trace.id.clone()),
    };
    traces.iter().map(request).collect()
}

/// Classifies a cycle, with the reason unless it is cold.
fn classify(
    requests: &[RequestResult],
    record: Option<&ColdStart>,
    ids: &HashSet<String>,
    kind: Option<ColdStartKind>,
) -> (CycleVerdict, Option<String>) {
    let answered = requests.iter().any(|request| request.error.is_none());
    let error = || requests.iter().find_map(|request| request.error.clone()).unwrap_or_default();
    let not = |verdict, why: String| (verdict, Some(why));
    let Some(record) = record else {
        return match answered {
            true => not(
                CycleVerdict::NotCold,
                "no record of a cold start: the target was already up, or --admin belongs to a different proxy"
                    .to_owned(),
            ),
            false => not(CycleVerdict::Failed, format!("no request was answered: {}", error())),
        };
    };
    if belongs_to_run(record, ids) == Some(false) {
        return not(
            CycleVerdict::NotCold,
            "a foreign request was answered first; keep other traffic away and connect to the proxy directly, because a \
             gateway may rewrite x-request-id"
                .to_owned(),
        );
    }
    let why = record.reason.as_deref();
    match record.outcome {
        Some(ColdStartOutcome::Completed) if !answered => not(
            CycleVerdict::Failed,
            format!("the target became ready, but no request got a complete answer: {}", error()),
        ),
        Some(ColdStartOutcome::Completed) => match kind {
            Some(kind) if kind != record.kind => not(
                CycleVerdict::NotCold,
                format!("kind {}, but the previous cycles were of kind {}", record.kind.name(), kind.name()),
            ),
            _ => (CycleVerdict::Cold, None),
        },
        outcome => not(
            CycleVerdict::Failed,
            why.map_or_else(
                || {
                    format!(
                        "the activation {}: {}",
                        outcome.map_or("did not end", ColdStartOutcome::name),
                        error()
                    )
                },
                str::to_owned,
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(error: Option<&str>) -> RequestResult {
        RequestResult {
            sent_ms: 0.0,
            ttft_ms: None,
            total_ms: 1.0,
            status: Some(200),
            error: error.map(str::to_owned),
            request_id: Some("a-1-1".to_owned()),
        }
    }

    fn verdict(
        error: Option<&str>,
        record: Option<ColdStart>,
        kind: Option<ColdStartKind>,
    ) -> (CycleVerdict, String) {
        let ids = HashSet::from(["a-1-1".to_owned()]);
        let (verdict, error) = classify(&[request(error)], record.as_ref(), &ids, kind);
        (verdict, error.unwrap_or_default())
    }

    #[test]
    fn cycle_counts_if_its_own_request_woke_the_target() {
        let completed = ColdStart {
            outcome: Some(ColdStartOutcome::Completed),
            request_id: Some("a-1-1".into()),
            ..ColdStart::default()
        };
        let of = |change: fn(&mut ColdStart)| {
            let mut record = completed.clone();
            change(&mut record);
            Some(record)
        };
        assert_eq!(verdict(None, of(|_| {}), None), (CycleVerdict::Cold, String::new()));
        // A record without a request id.
        assert_eq!(verdict(None, of(|record| record.request_id = None), None).0, CycleVerdict::Cold);
        for (error, record, kind, expected, why) in [
            (None, None, None, CycleVerdict::NotCold, "no record"),
            (Some("reset"), None, None, CycleVerdict::Failed, "reset"),
            (
                None,
                of(|record| record.request_id = Some("b".into())),
                None,
                CycleVerdict::NotCold,
                "a foreign request",
            ),
            (None, of(|_| {}), Some(ColdStartKind::Wake), CycleVerdict::NotCold, "kind cold_start"),
            (Some("cut"), of(|_| {}), None, CycleVerdict::Failed, "cut"),
            (
                Some("503"),
                of(|record| {
                    record.outcome = Some(ColdStartOutcome::Failed);
                    record.reason = Some("exit code 1".into());
                    record.request_id = None;
                }),
                None,
                CycleVerdict::Failed,
                "exit code 1",
            ),
        ] {
            let (found, error) = verdict(error, record, kind);
            assert_eq!(found, expected, "{error}");
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn request_times_are_relative_to_the_first_sent() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let trace = |sent, token: Option<u64>, ended| TimedRequest {
            sent: at(sent),
            first_token: token.map(at),
            ended: at(ended),
            status: None,
            id: String::new(),
            error: None,
        };
        // The second request is sent first.
        let requests = relative_times(&[trace(105, Some(3105), 4000), trace(100, None, 3000)]);
        let times: Vec<_> =
            requests.iter().map(|request| (request.sent_ms, request.ttft_ms, request.total_ms)).collect();
        assert_eq!(times, [(5.0, Some(3000.0), 3895.0), (0.0, None, 2900.0)]);
    }
}
