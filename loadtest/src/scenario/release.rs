//! The release scenario: a model server becomes ready while many requests wait for it.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use crate::clock::Instant;
use crate::descriptors::ClientLimit;
use crate::error::LoadtestError;
use crate::findings::{Criterion, Findings, Table, disturbed, thousands};
use crate::scene::{RouteSettings, Testbed};
use crate::setup::Setup;
use crate::spread::Spread;
use crate::target::RampSettings;

const RELEASED_REQUESTS: usize = 10_000;
/// `concurrency.max`, and so the number of connections to the model server; without the ramp, from the start.
const SERVER_CONCURRENCY: u64 = 64;
const RAMP_OFF: RampSettings = RampSettings { start: SERVER_CONCURRENCY, max: SERVER_CONCURRENCY };
const RAMP_ON: RampSettings = RampSettings { start: 4, max: SERVER_CONCURRENCY };
/// One at a time: the requests reach the model server in the order of their release.
const SEQUENTIAL_RAMP: RampSettings = RampSettings { start: 1, max: 1 };
/// Response time of the model server when its concurrent requests are counted.
const SERVER_RESPONSE_TIME: Duration = Duration::from_millis(5);
/// Share of its core above which the rig itself may be the limit.
const MAX_RIG_CORE_SHARE: f64 = 0.95;

/// A release without the ramp, followed by a warm measurement of the same clients.
#[derive(Clone, Debug, Serialize)]
struct ReleaseRound {
    /// Time from the model server's first 200 to a health check until the arrival of the first request.
    first_ms: f64,
    /// Rate of all requests but the first, until the client received the last response.
    requests_per_second: f64,
    /// Rate of as many clients as there are connections to the model server, each in a closed loop.
    warm_per_second: f64,
    /// Rate at the same concurrency, but with all clients in turn.
    wide_per_second: f64,
    times_warm: f64,
    times_wide: f64,
    /// Requests that arrived later than their turn, and the largest displacement in places.
    late: usize,
    latest: usize,
    /// Share of the rig's core used during the release.
    rig_busy: f64,
    /// Share of the rig's core used in the warm measurement.
    rig_busy_warm: f64,
    /// Cores used by other processes, on our two cores.
    others: f64,
}

/// A release with the ramp.
#[derive(Clone, Debug, Serialize)]
struct Ramped {
    first_ms: f64,
    seconds: f64,
    /// Maximum concurrent requests at the model server.
    most: u64,
    /// Requests that arrived when the ramp's limit was already reached.
    beyond: u64,
    late: usize,
    latest: usize,
}

/// Requests that arrived later than their turn, and the largest displacement in places, when dispatched one at a time.
#[derive(Clone, Copy, Debug, Serialize)]
struct Reordering {
    late: usize,
    latest: usize,
}

pub(crate) fn run(setup: &Setup, requests: Option<usize>) -> Result<Findings, LoadtestError> {
    let (count, note) = ClientLimit::from_raised_limit()?.fit(requests.unwrap_or(RELEASED_REQUESTS));
    let rounds = setup.rounds();
    let seconds = Duration::from_secs(setup.seconds(1, 2).into());
    let (mut released, mut ramped, mut disorder) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=rounds {
        eprintln!("release, round {round} of {rounds}");
        released.push(release(setup, count, seconds)?);
        ramped.push(ramp(setup, count)?);
        disorder.push(one_by_one(setup, count)?);
    }
    let how = format!(
        "medians of {rounds} rounds; {} requests of 2 KB held, {SERVER_CONCURRENCY} at a time to the model server. They are sent one \
         after the other over connections that are all open, so one worker hears of them, and admits them, in that \
         order. One at a time they have to be at the model server in it, too; {SERVER_CONCURRENCY} at a time they may pass each \
         other only between dispatch and model server",
        thousands(count as f64)
    );
    Ok(findings(how, &released, &ramped, &disorder, note))
}

/// Starts a scene with `count` held requests.
fn held(setup: &Setup, count: usize, ramp: RampSettings) -> Result<Testbed, LoadtestError> {
    let mut scene = Testbed::start(setup, RouteSettings { hold: count, ramp, streamed: false })?;
    scene.gather(count)?;
    scene.send_all()?;
    scene.await_held(count)?;
    Ok(scene)
}

fn release(setup: &Setup, count: usize, duration: Duration) -> Result<ReleaseRound, LoadtestError> {
    let mut scene = held(setup, count, RAMP_OFF)?;
    let before = scene.read()?;
    scene.sides.target.ready = true;
    let passed = scene.until("all served", |sides| sides.crowd.tally.waiting == 0)?;
    let spent = before.until(&scene.read()?);
    let (seen, last) = (&scene.sides.target.seen, scene.sides.crowd.tally.last_served);
    let (first, (late, latest)) = (seen.time_to_first_arrival(), seen.count_reordered());
    let begin = seen.arrivals.first().map(|(_, at)| *at);
    let (Some(first), Some(begin), Some(last)) = (first, begin, last) else {
        return Err(LoadtestError::Wrong(
            "responses arrived for requests that the model server did not receive".into(),
        ));
    };
    // Counted from the first 200 of the health check: before it the rig was idle.
    let working = last - begin + first;
    let idle = passed.idle.saturating_sub(passed.elapsed.saturating_sub(working));
    let requests_per_second = (count - 1) as f64 / (last - begin).as_secs_f64();

    let at_once = SERVER_CONCURRENCY as usize;
    let (warm_per_second, rig_busy_warm) = warm(&mut scene, at_once, duration)?;
    let (wide_per_second, _) = warm(&mut scene, count, duration)?;
    Ok(ReleaseRound {
        first_ms: first.as_secs_f64() * 1e3,
        requests_per_second,
        warm_per_second,
        wide_per_second,
        times_warm: requests_per_second / warm_per_second,
        times_wide: requests_per_second / wide_per_second,
        late,
        latest,
        rig_busy: 1.0 - idle.as_secs_f64() / working.as_secs_f64(),
        rig_busy_warm,
        others: spent.others.as_secs_f64() / passed.elapsed.as_secs_f64(),
    })
}

/// Returns the rate at which `members` clients in turn are served, at maximum concurrency, and the busy share of the
/// rig.
fn warm(scene: &mut Testbed, members: usize, duration: Duration) -> Result<(f64, f64), LoadtestError> {
    scene.sides.target.reset_stats();
    scene.sides.crowd.send_in_turn(members, SERVER_CONCURRENCY as usize);
    scene.run_for(duration / 4)?;
    let served = scene.sides.crowd.tally.served;
    let begin = Instant::now();
    let passed = scene.run_for(duration)?;
    let rate = (scene.sides.crowd.tally.served - served) as f64 / begin.elapsed().as_secs_f64();
    scene.sides.crowd.stop();
    scene.until("the last served", |sides| sides.crowd.tally.waiting == 0)?;
    Ok((rate, passed.busy()))
}

fn ramp(setup: &Setup, count: usize) -> Result<Ramped, LoadtestError> {
    let mut scene = held(setup, count, RAMP_ON)?;
    scene.sides.target.delay = SERVER_RESPONSE_TIME;
    scene.sides.target.ready = true;
    scene.until("all served", |sides| sides.crowd.tally.waiting == 0)?;
    let (seen, last) = (&scene.sides.target.seen, scene.sides.crowd.tally.last_served);
    let (late, latest) = seen.count_reordered();
    let seconds = seen.known.zip(last).map(|(known, last)| (last - known).as_secs_f64());
    let first_ms = seen.time_to_first_arrival().map_or(f64::NAN, |first| first.as_secs_f64() * 1e3);
    Ok(Ramped {
        first_ms,
        seconds: seconds.unwrap_or(f64::NAN),
        most: seen.most,
        beyond: seen.beyond,
        late,
        latest,
    })
}

fn one_by_one(setup: &Setup, count: usize) -> Result<Reordering, LoadtestError> {
    let mut scene = held(setup, count, SEQUENTIAL_RAMP)?;
    scene.sides.target.ready = true;
    scene.until("all served", |sides| sides.crowd.tally.waiting == 0)?;
    let seen = &scene.sides.target.seen;
    if seen.most > 1 {
        return Err(LoadtestError::Wrong(format!(
            "{} requests were at the model server at a time, where one may be",
            seen.most
        )));
    }
    let (late, latest) = seen.count_reordered();
    Ok(Reordering { late, latest })
}

fn findings(
    how: String,
    released: &[ReleaseRound],
    ramped: &[Ramped],
    disorder: &[Reordering],
    note: Option<String>,
) -> Findings {
    let spread =
        |figure: fn(&ReleaseRound) -> f64| Spread::of(released.iter().map(figure)).unwrap_or_default();
    let most = |figure: fn(&Ramped) -> u64| ramped.iter().map(figure).max().unwrap_or_default();
    let first = spread(|round| round.first_ms);
    let (rate, warm) = (spread(|round| round.requests_per_second), spread(|round| round.warm_per_second));
    let (wide, times) = (spread(|round| round.wide_per_second), spread(|round| round.times_warm));
    let latest = released.iter().map(|round| round.latest).max().unwrap_or_default();
    let latest_alone = disorder.iter().map(|round| round.latest).max().unwrap_or_default();
    let latest_ramped = most(|round| round.latest as u64);
    let (at_a_time, beyond) = (most(|round| round.most), most(|round| round.beyond));
    let per_second = |rate: Spread| {
        format!("{} ({}–{})", thousands(rate.median), thousands(rate.min), thousands(rate.max))
    };
    let first_ramped = Spread::of(ramped.iter().map(|round| round.first_ms)).unwrap_or_default();
    let ms = |spread: Spread| format!("{:.3} ({:.3}–{:.3})", spread.median, spread.min, spread.max);
    let row = |what: &str, value: String| vec![what.to_owned(), value];
    let rows = vec![
        row("first dispatch after the first 200, ms", ms(first)),
        row("with the ramp, first dispatch, ms", ms(first_ramped)),
        row("released, requests/s", per_second(rate)),
        row(&format!("warm, {SERVER_CONCURRENCY} clients, requests/s"), per_second(warm)),
        row("warm, all clients in turn, requests/s", per_second(wide)),
        row("released × warm", format!("{:.2} ({:.2}–{:.2})", times.median, times.min, times.max)),
        row("released × warm, all in turn", format!("{:.2}", spread(|round| round.times_wide).median)),
        row("maximum displacement in places, one at a time", latest_alone.to_string()),
        row(&format!("maximum displacement in places, {SERVER_CONCURRENCY} at a time"), latest.to_string()),
        row("with the ramp, maximum concurrency", at_a_time.to_string()),
        row("with the ramp, beyond its limit", beyond.to_string()),
        row("with the ramp, maximum displacement in places", latest_ramped.to_string()),
    ];
    let who = "anteroom, ramp off";
    let mut aims = vec![
        Criterion::at_most(who, "ms from the first 200 to the first dispatch, at most", 1.0, first.median),
        Criterion::at_most(
            "anteroom, ramp on",
            "ms from the first 200 to the first dispatch, at most",
            1.0,
            first_ramped.median,
        ),
        Criterion::at_least(who, "times the warm rate, at least", 0.8, times.median),
        Criterion::at_most("anteroom, ramp on", "requests beyond the limit, at most", 0.0, beyond as f64),
    ];
    let passed = (SERVER_CONCURRENCY - 1) as f64;
    for (who, limit, latest) in [
        ("anteroom, one at a time", 0.0, latest_alone as f64),
        ("anteroom, ramp off", passed, latest as f64),
        ("anteroom, ramp on", passed, latest_ramped as f64),
    ] {
        aims.push(Criterion::at_most(who, "places that a request arrived late, at most", limit, latest));
    }
    let mut notes: Vec<String> = note.into_iter().collect();
    if at_a_time < SERVER_CONCURRENCY {
        notes.push(format!(
            "with the ramp on, only {at_a_time} were at the model server at a time: it never got to {SERVER_CONCURRENCY}"
        ));
    }
    let (busy, busy_warm) =
        (spread(|round| round.rig_busy).median, spread(|round| round.rig_busy_warm).median);
    if busy > MAX_RIG_CORE_SHARE || busy_warm > MAX_RIG_CORE_SHARE {
        notes.push(format!(
            "the load test's own core was {:.0} % busy during the release and {:.0} % warm, so it may be the limit",
            busy * 100.0,
            busy_warm * 100.0
        ));
    }
    let others = spread(|round| round.others).max;
    notes.extend(disturbed(others));
    Findings {
        scenario: "release",
        how,
        tables: vec![Table {
            title: String::new(),
            header: ["anteroom", ""].map(str::to_owned).into(),
            rows,
            legend: Some("first 200: the model server's first successful response to a health check"),
        }],
        results: json!({ "released": released, "ramped": ramped, "one_by_one": disorder }),
        aims,
        notes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND: ReleaseRound = ReleaseRound {
        first_ms: 0.5,
        requests_per_second: 90.0,
        warm_per_second: 100.0,
        wide_per_second: 90.0,
        times_warm: 0.9,
        times_wide: 1.0,
        late: 5,
        latest: 3,
        rig_busy: 0.5,
        rig_busy_warm: 0.5,
        others: 0.0,
    };
    const RAMPED: Ramped =
        Ramped { first_ms: 0.5, seconds: 1.0, most: SERVER_CONCURRENCY, beyond: 0, late: 5, latest: 63 };
    const ORDER: Reordering = Reordering { late: 0, latest: 0 };

    fn found(round: ReleaseRound, ramped: Ramped, order: Reordering) -> (Vec<bool>, usize) {
        let found = findings("so".into(), &[round], &[ramped], &[order], None);
        (found.aims.iter().map(|aim| aim.met).collect(), found.notes.len())
    }

    #[test]
    fn each_aim_can_be_missed() {
        assert_eq!(found(ROUND, RAMPED, ORDER), (vec![true; 7], 0));
        let round = ReleaseRound { first_ms: 1.1, times_warm: 0.7, latest: 64, ..ROUND };
        let ramped = Ramped { first_ms: 1.1, beyond: 1, latest: 64, ..RAMPED };
        assert_eq!(found(round, ramped, Reordering { late: 1, latest: 1 }), (vec![false; 7], 0));
    }

    #[test]
    fn busy_rig_and_endless_ramp_are_noted() {
        let round = ReleaseRound { rig_busy_warm: 0.99, others: 0.5, ..ROUND };
        assert_eq!(found(round, Ramped { most: 63, ..RAMPED }, ORDER).1, 3);
    }
}
