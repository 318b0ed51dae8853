//! The overflow scenario: many more requests than the queue holds.

use std::time::Duration;

use serde_json::json;

use crate::clock::Instant;
use crate::descriptors::ClientLimit;
use crate::error::LoadtestError;
use crate::findings::{Criterion, Findings, Table, disturbed, thousands};
use crate::scene::{RouteSettings, Testbed};
use crate::setup::Setup;
use crate::target::RampSettings;

const QUEUED_REQUESTS: usize = 10_000;
/// Number of requests as a multiple of the queue's bound.
const QUEUE_MULTIPLE: usize = 10;
/// Arrivals per second, on a schedule independent of responses; a fraction of the machine's capacity.
const ARRIVALS_PER_SEC: f64 = 5_000.0;
const RAMP: RampSettings = RampSettings { start: 64, max: 64 };
/// Delay behind schedule above which the findings have a note: the aim for rejections is only five times as long.
const MAX_SCHEDULE_DELAY: Duration = Duration::from_millis(1);

pub(crate) fn run(setup: &Setup, requests: Option<usize>) -> Result<Findings, LoadtestError> {
    let (count, note) = ClientLimit::from_raised_limit()?.fit(requests.unwrap_or(QUEUED_REQUESTS));
    let bound = count / QUEUE_MULTIPLE;
    let surplus = count - bound;
    eprintln!("overflow: {count} requests, of which {bound} fit into the queue");
    let mut scene = Testbed::start(setup, RouteSettings { hold: bound, ramp: RAMP, streamed: false })?;
    scene.gather(count)?;
    let before = scene.read()?;
    let begin = Instant::now();
    let mut latest = Duration::ZERO;
    for member in 0..count {
        let due = begin + Duration::from_secs_f64(member as f64 / ARRIVALS_PER_SEC);
        while Instant::now() < due {
            scene.turn()?;
        }
        latest = latest.max(Instant::now() - due);
        scene.sides.crowd.send(member, due);
    }
    scene.until("every surplus request answered", |sides| sides.crowd.tally.refused >= surplus)?;
    let elapsed = begin.elapsed().as_secs_f64();
    let spent = before.until(&scene.read()?);
    scene.await_held(bound)?;
    scene.sides.target.ready = true;
    scene.until("all that were held served", |sides| sides.crowd.tally.waiting == 0)?;
    let tally = &mut scene.sides.crowd.tally;
    if (tally.served, tally.refused) != (bound, surplus) {
        let (served, refused) = (tally.served, tally.refused);
        return Err(LoadtestError::Wrong(format!(
            "{served} of {bound} were served and {refused} of {surplus} refused"
        )));
    }
    let mut took = std::mem::take(&mut tally.refused_after);
    took.sort_unstable();
    let metrics = scene.admin.metrics()?;
    let refused = metrics.sum("anteroom_refused_requests_total", &["reason=\"hold_queue_full\""]);
    let completed = metrics.sum("anteroom_requests_total", &["outcome=\"completed\""]);
    if (completed, refused) != (bound as u64, surplus as u64) {
        return Err(LoadtestError::Wrong(format!(
            "it counts {completed} completed of {bound}, and {refused} refused of {surplus}"
        )));
    }

    let quantile = |part: f64| took[((took.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e3;
    let (p50, p99, worst) = (quantile(0.5), quantile(0.99), quantile(1.0));
    let cpu = spent.contender.as_secs_f64() / elapsed * 100.0;
    let row = |what: &str, value: String| vec![what.to_owned(), value];
    let rows = vec![
        row("held, and served in the end", thousands(bound as f64)),
        row("refused", thousands(surplus as f64)),
        row("ms to be refused, median", format!("{p50:.3}")),
        row("ms to be refused, p99", format!("{p99:.3}")),
        row("ms to be refused, the slowest", format!("{worst:.3}")),
        row("share of its core used, %", format!("{cpu:.0}")),
    ];
    let mut notes: Vec<String> = note.into_iter().collect();
    if latest > MAX_SCHEDULE_DELAY {
        notes.push(format!(
            "the load test itself was up to {:.1} ms behind its schedule, which is in the times",
            latest.as_secs_f64() * 1e3
        ));
    }
    let others = spent.others.as_secs_f64() / elapsed;
    notes.extend(disturbed(others));
    Ok(Findings {
        scenario: "overflow",
        how: format!(
            "{} requests of 2 KB, {} a second by schedule, where {} may wait",
            thousands(count as f64),
            thousands(ARRIVALS_PER_SEC),
            thousands(bound as f64)
        ),
        tables: vec![Table {
            title: String::new(),
            header: ["anteroom", ""].map(str::to_owned).into(),
            rows,
            legend: Some(
                "to be refused: from the due time of a request to the end of its `hold_queue_full` response",
            ),
        }],
        results: json!({
            "requests": count, "bound": bound, "per_second": ARRIVALS_PER_SEC, "refused": surplus, "served": bound,
            "p50_ms": p50, "p99_ms": p99, "max_ms": worst, "behind_schedule_ms": latest.as_secs_f64() * 1e3,
            "cpu_percent": cpu, "others": others,
        }),
        aims: vec![Criterion::at_most(
            "anteroom",
            "ms until the last surplus request knew, at most",
            5.0,
            worst,
        )],
        notes,
    })
}
