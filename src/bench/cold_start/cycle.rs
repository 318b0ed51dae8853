//! One cycle: a burst from zero, and the record of the cold start that it caused.

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
    admin::Admins,
    arrivals::Arrivals,
    prompts::{Endpoint, Prompts},
    request::{Asked, Seen, ask},
};
use crate::{
    bench::{
        cost::Cost,
        http::Base,
        results::{Cycle, OutsideClock, Request, Verdict},
    },
    coldstart::{ColdStart, ColdStartKind, ColdStartOutcome},
};

/// What every burst is made of.
#[derive(Clone, Debug)]
pub(super) struct Burst {
    pub(super) base: Base,
    pub(super) endpoint: Endpoint,
    pub(super) headers: HeaderMap,
    pub(super) prompts: Prompts,
    pub(super) size: usize,
    pub(super) arrivals: Arrivals,
    /// Of [`Arrivals::File`].
    pub(super) times: Vec<Duration>,
    pub(super) seed: u64,
    /// How long answers may take.
    pub(super) limit: Duration,
    /// Begins the ids of all requests of this run.
    pub(super) id: String,
}

/// A burst that is over.
pub(super) struct Done {
    pub(super) cycle: Cycle,
    /// When the last answer had ended.
    pub(super) ended: Instant,
}

/// How long the record of a cold start may take to be there after its requests have ended.
const RECORD: Duration = Duration::from_secs(5);

/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(50);

// === impl Burst ===

impl Burst {
    /// Sends the burst of cycle `number` (from 1), and finds its record. `kind` is that of the cycles before. Dropping
    /// it hangs up.
    ///
    /// # Errors
    /// When the admin API cannot be asked.
    pub(super) async fn run(
        &self,
        number: usize,
        admins: &Admins,
        kind: Option<ColdStartKind>,
    ) -> Result<Done, String> {
        let known: HashSet<_> = admins.records().await?.iter().map(identity).collect();
        let started_at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        let seen = self.send(number).await;
        let ended = seen.iter().map(|seen| seen.ended).max().unwrap_or_else(Instant::now);
        let mut ids: HashSet<_> = seen.iter().map(|seen| seen.id.clone()).collect();
        ids.extend((0..self.size).map(|place| self.request_id(number, place)));
        let found = self.record(admins, &known, &ids).await?;
        let requests = of_burst(&seen);
        let (verdict, error) = judge(&requests, found.as_ref(), &ids, kind);
        let found = found.filter(|_| verdict != Verdict::NotCold);
        let last_ms = requests.iter().map(|request| request.sent_ms + request.total_ms).fold(0.0, f64::max);
        let cycle = Cycle {
            number,
            started_at,
            idle_ms: None,
            verdict,
            error,
            outside_clock: found.as_ref().and_then(|record| OutsideClock::of(&requests, record)),
            cost: found.as_ref().and_then(|record| Cost::of(record, last_ms)),
            cold_start: found,
            requests,
        };
        Ok(Done { cycle, ended })
    }

    async fn send(&self, number: usize) -> Vec<Seen> {
        let mut random = fastrand::Rng::with_seed(self.seed.wrapping_add(number as u64));
        let offsets = self.arrivals.offsets(self.size, &self.times, &mut random);
        let began = Instant::now();
        let deadline = began + self.limit;
        let mut running = JoinSet::new();
        for (place, offset) in offsets.into_iter().enumerate() {
            let asked = Asked {
                base: self.base.clone(),
                path: self.endpoint.path(),
                headers: self.headers.clone(),
                body: self.prompts.body((number - 1) * self.size + place),
                id: self.request_id(number, place),
                deadline,
                limit: self.limit,
            };
            running.spawn(async move {
                sleep_until(began + offset).await;
                (place, ask(asked).await)
            });
        }
        let mut seen = running.join_all().await;
        seen.sort_by_key(|(place, _)| *place);
        seen.into_iter().map(|(_, seen)| seen).collect()
    }

    fn request_id(&self, number: usize, place: usize) -> String {
        format!("{}-{number}-{}", self.id, place + 1)
    }

    /// The record that has come since: of several replicas' that which one of ours was answered first after, or else
    /// the longest.
    async fn record(
        &self,
        admins: &Admins,
        known: &HashSet<(u64, String)>,
        ids: &HashSet<String>,
    ) -> Result<Option<ColdStart>, String> {
        let deadline = Instant::now() + RECORD;
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
                let rank = |record: &ColdStart| is_ours(record, ids) == Some(true);
                rank(one).cmp(&rank(other)).then(one.total_ms.total_cmp(&other.total_ms))
            });
            if best.is_some() || late {
                return Ok(best);
            }
            sleep(LOOK).await;
        }
    }
}

fn identity(record: &ColdStart) -> (u64, String) {
    (record.id, record.started_at.clone())
}

/// Whether the first answered request of a cold start was one of ours, if that is known.
fn is_ours(record: &ColdStart, ids: &HashSet<String>) -> Option<bool> {
    record.request_id.as_deref().map(|id| ids.contains(id))
}

/// A burst on the clock of its first request.
fn of_burst(seen: &[Seen]) -> Vec<Request> {
    let Some(first) = seen.iter().map(|seen| seen.sent).min() else { return Vec::new() };
    // To the microsecond: what is below says nothing.
    let ms = |to: Instant, from: Instant| (to.duration_since(from).as_secs_f64() * 1e6).round() / 1e3;
    let request = |seen: &Seen| Request {
        sent_ms: ms(seen.sent, first),
        ttft_ms: seen.first_token.map(|token| ms(token, seen.sent)),
        total_ms: ms(seen.ended, seen.sent),
        status: seen.status.map(|status| status.as_u16()),
        error: seen.error.clone(),
        request_id: Some(seen.id.clone()),
    };
    seen.iter().map(request).collect()
}

/// What a burst was good for, and if it does not count, why.
fn judge(
    requests: &[Request],
    record: Option<&ColdStart>,
    ids: &HashSet<String>,
    kind: Option<ColdStartKind>,
) -> (Verdict, Option<String>) {
    let answered = requests.iter().any(|request| request.error.is_none());
    let error = || requests.iter().find_map(|request| request.error.clone()).unwrap_or_default();
    let not = |verdict, why: String| (verdict, Some(why));
    let Some(record) = record else {
        return match answered {
            true => not(
                Verdict::NotCold,
                "there is no record of a cold start: the target was up before the burst, or it is not this proxy's \
                 --admin"
                    .to_owned(),
            ),
            false => not(Verdict::Failed, format!("no request was answered: {}", error())),
        };
    };
    if is_ours(record, ids) == Some(false) {
        return not(
            Verdict::NotCold,
            "somebody else's request was answered first; keep other traffic away, and send to the proxy itself, as a \
             gateway before it may rewrite x-request-id"
                .to_owned(),
        );
    }
    let why = record.reason.as_deref();
    match record.outcome {
        Some(ColdStartOutcome::Completed) if !answered => {
            not(Verdict::Failed, format!("it was up, but no request was answered whole: {}", error()))
        }
        Some(ColdStartOutcome::Completed) => match kind {
            Some(kind) if kind != record.kind => not(
                Verdict::NotCold,
                format!(
                    "this was a {}, and the cycles before were of the kind {}",
                    record.kind.name(),
                    kind.name()
                ),
            ),
            _ => (Verdict::Cold, None),
        },
        outcome => not(
            Verdict::Failed,
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

    fn request(error: Option<&str>) -> Request {
        Request {
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
    ) -> (Verdict, String) {
        let ids = HashSet::from(["a-1-1".to_owned()]);
        let (verdict, error) = judge(&[request(error)], record.as_ref(), &ids, kind);
        (verdict, error.unwrap_or_default())
    }

    #[test]
    fn a_cycle_counts_if_ours_was_the_request_that_woke() {
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
        assert_eq!(verdict(None, of(|_| {}), None), (Verdict::Cold, String::new()));
        // A replica that does not say whose request it was.
        assert_eq!(verdict(None, of(|record| record.request_id = None), None).0, Verdict::Cold);
        for (error, record, kind, expected, why) in [
            (None, None, None, Verdict::NotCold, "no record"),
            (Some("reset"), None, None, Verdict::Failed, "reset"),
            (
                None,
                of(|record| record.request_id = Some("b".into())),
                None,
                Verdict::NotCold,
                "somebody else's",
            ),
            (None, of(|_| {}), Some(ColdStartKind::Wake), Verdict::NotCold, "a cold_start"),
            (Some("cut"), of(|_| {}), None, Verdict::Failed, "cut"),
            (
                Some("503"),
                of(|record| {
                    record.outcome = Some(ColdStartOutcome::Failed);
                    record.reason = Some("exit code 1".into());
                    record.request_id = None;
                }),
                None,
                Verdict::Failed,
                "exit code 1",
            ),
        ] {
            let (found, error) = verdict(error, record, kind);
            assert_eq!(found, expected, "{error}");
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn requests_count_from_the_first_that_was_sent() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let seen = |sent, token: Option<u64>, ended| Seen {
            sent: at(sent),
            first_token: token.map(at),
            ended: at(ended),
            status: None,
            id: String::new(),
            error: None,
        };
        // The second was connected first.
        let requests = of_burst(&[seen(105, Some(3105), 4000), seen(100, None, 3000)]);
        let times: Vec<_> =
            requests.iter().map(|request| (request.sent_ms, request.ttft_ms, request.total_ms)).collect();
        assert_eq!(times, [(5.0, Some(3000.0), 3895.0), (0.0, None, 2900.0)]);
    }
}
