//! The hang-up scenario: a waiting crowd disconnects all at once, repeatedly.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use crate::clock::Instant;
use crate::descriptors::ClientLimit;
use crate::error::LoadtestError;
use crate::findings::{Criterion, Findings, Table, disturbed, thousands};
use crate::footprint::Footprint;
use crate::scene::{RouteSettings, Testbed};
use crate::setup::Setup;
use crate::spread::Spread;
use crate::target::RampSettings;

const REQUESTS_PER_STORM: usize = 20_000;
const QUICK_REQUESTS: usize = 10_000;
const FIXED_RAMP: RampSettings = RampSettings { start: 64, max: 64 };
/// Time until memory and files must be released.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum growth of the memory left behind from one storm to the next, as a share of the memory of a storm.
const MAX_LEFT_GROWTH: f64 = 0.05;

/// Maximum share of that memory that is left after the last storm.
const MAX_LEFT_SHARE: f64 = 0.1;

/// Results of one storm.
#[derive(Clone, Debug, Serialize)]
struct Storm {
    /// Time the clients took to disconnect.
    leaving_ms: f64,
    /// Requests still held according to the first query after the last disconnect, and the duration of that query.
    first_look: u64,
    first_look_ms: f64,
    /// Time from the last disconnect until a query found no held requests.
    known_ms: f64,
    /// Duration of a query while nothing changes.
    look_ms: f64,
    held: Footprint,
    after: Footprint,
    others: f64,
}

pub(crate) fn run(setup: &Setup, requests: Option<usize>) -> Result<Findings, LoadtestError> {
    let (count, note) = ClientLimit::from_raised_limit()?.fit(requests.unwrap_or(if setup.quick {
        QUICK_REQUESTS
    } else {
        REQUESTS_PER_STORM
    }));
    let storms = setup.rounds().max(2);
    let mut scene = Testbed::start(setup, RouteSettings { hold: count, ramp: FIXED_RAMP, streamed: false })?;
    scene.run_for(Duration::from_millis(200))?;
    let before = scene.footprint()?;
    let mut seen = Vec::new();
    for number in 1..=storms {
        eprintln!("hangup, storm {number} of {storms}: {count} clients");
        seen.push(storm(&mut scene, count)?);
    }
    let all = u64::from(storms) * count as u64;
    let metrics = scene.admin.metrics()?;
    let gone = metrics.sum("anteroom_requests_total", &["outcome=\"client_gone\""]);
    let ended = metrics.sum("anteroom_requests_total", &[]);
    let admitted = metrics.sum("anteroom_admitted_requests_total", &[]);
    if [gone, ended, admitted] != [all; 3] {
        return Err(LoadtestError::Wrong(format!(
            "of {all} requests it counts {admitted} admitted, {ended} ended and {gone} gone"
        )));
    }
    let how = format!(
        "{storms} storms of {} clients that had sent a POST of 2 KB each and close their connections one after the \
         other, as fast as one core can; demand is read from the admin API again and again",
        thousands(count as f64)
    );
    Ok(findings(how, before, &seen, note))
}

fn storm(scene: &mut Testbed, count: usize) -> Result<Storm, LoadtestError> {
    let files = scene.descriptors()?;
    scene.gather(count)?;
    scene.send_all()?;
    scene.await_held(count)?;
    scene.run_for(Duration::from_millis(200))?;
    let held = scene.footprint()?;
    let looks = (0..5).map(|_| query_load(scene).map(|(took, _)| took)).collect::<Result<Vec<f64>, _>>()?;
    let look_ms = Spread::of(looks).unwrap_or_default().median;

    let before = scene.read()?;
    let begin = Instant::now();
    scene.sides.crowd.hang_up();
    let last = Instant::now();
    let (first_look_ms, first_look) = query_load(scene)?;
    let mut left = first_look;
    while left > 0 {
        if last.elapsed() > Duration::from_secs(30) {
            return Err(LoadtestError::Wrong(format!(
                "{left} of {count} requests are held 30 s after their clients left"
            )));
        }
        left = query_load(scene)?.1;
    }
    let known = last.elapsed();
    let spent = before.until(&scene.read()?);
    scene.run_for(RELEASE_TIMEOUT)?;
    let after = await_released_files(scene, files)?;
    Ok(Storm {
        leaving_ms: (last - begin).as_secs_f64() * 1e3,
        first_look,
        first_look_ms,
        known_ms: known.as_secs_f64() * 1e3,
        look_ms,
        held,
        after,
        others: spent.others.as_secs_f64() / (known + (last - begin)).as_secs_f64(),
    })
}

/// Waits until at most `files` files are open and returns the footprint. A health check opens one from time to time.
fn await_released_files(scene: &mut Testbed, files: u64) -> Result<Footprint, LoadtestError> {
    let begin = Instant::now();
    loop {
        let after = scene.footprint()?;
        if after.descriptors <= files {
            return Ok(after);
        }
        if begin.elapsed() > RELEASE_TIMEOUT {
            let (more, after) = (after.descriptors - files, 2 * RELEASE_TIMEOUT);
            return Err(LoadtestError::Wrong(format!(
                "{more} files are still open {} s after a storm",
                after.as_secs()
            )));
        }
        scene.run_for(Duration::from_millis(5))?;
    }
}

/// Returns the duration of the query in ms and the number of requests held or in flight.
fn query_load(scene: &mut Testbed) -> Result<(f64, u64), LoadtestError> {
    let begin = Instant::now();
    let demand = scene.admin.query_only_route_load()?;
    Ok((begin.elapsed().as_secs_f64() * 1e3, demand.held + demand.in_flight))
}

fn findings(how: String, before: Footprint, storms: &[Storm], note: Option<String>) -> Findings {
    let spread = |figure: fn(&Storm) -> f64| Spread::of(storms.iter().map(figure)).unwrap_or_default();
    let ms = |spread: Spread| format!("{:.1} ({:.1}–{:.1})", spread.median, spread.min, spread.max);
    let (known, look) = (spread(|storm| storm.known_ms), spread(|storm| storm.look_ms));
    let row = |what: &str, value: String| vec![what.to_owned(), value];
    let mut rows = vec![
        row("ms until all have disconnected", ms(spread(|storm| storm.leaving_ms))),
        row(
            "still held according to the first query",
            thousands(spread(|storm| storm.first_look as f64).median),
        ),
        row("ms from the last disconnect until demand is correct", ms(known)),
        row("ms per query, while idle", format!("{:.2}", look.median)),
        row("MB before", mb(before.memory)),
    ];
    for (at, storm) in storms.iter().enumerate() {
        let number = at + 1;
        rows.push(row(
            &format!("MB in storm {number} / after it"),
            format!("{} / {}", mb(storm.held.memory), mb(storm.after.memory)),
        ));
    }
    let mut aims =
        vec![Criterion::at_most("anteroom", "ms until demand is correct, at most", 10.0, known.median)];
    if let [first, .., last] = storms {
        let took = first.held.memory as f64 - before.memory as f64;
        let left = (last.after.memory as f64 - first.after.memory as f64) / (storms.len() - 1) as f64 / took;
        aims.push(Criterion::at_most(
            "anteroom",
            "of a storm's memory left by each storm after the first, at most",
            MAX_LEFT_GROWTH,
            left,
        ));
        let kept = (last.after.memory as f64 - before.memory as f64) / took;
        aims.push(Criterion::at_most(
            "anteroom",
            "of a storm's memory not given back after the last, at most",
            MAX_LEFT_SHARE,
            kept,
        ));
        let files = last.after.descriptors as f64 - before.descriptors as f64;
        aims.push(Criterion::at_most("anteroom", "files left open, at most", 0.0, files));
    }
    let mut notes: Vec<String> = note.into_iter().collect();
    let others = spread(|storm| storm.others).max;
    notes.extend(disturbed(others));
    Findings {
        scenario: "hangup",
        how,
        tables: vec![Table {
            title: String::new(),
            header: ["anteroom", ""].map(str::to_owned).into(),
            rows,
            legend: Some(
                "query: GET /api/v1/routes; demand is correct at the first query that finds no held requests",
            ),
        }],
        results: json!({ "before": before, "storms": storms }),
        aims,
        notes,
    }
}

fn mb(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storm(known_ms: f64, after: u64, descriptors: u64) -> Storm {
        Storm {
            leaving_ms: 50.0,
            first_look: 10,
            first_look_ms: 1.0,
            known_ms,
            look_ms: 0.1,
            held: Footprint { memory: 1100, descriptors: 1010 },
            after: Footprint { memory: after, descriptors },
            others: 0.0,
        }
    }

    #[test]
    fn leaks_are_distinguished_from_first_growth() {
        let before = Footprint { memory: 100, descriptors: 10 };
        let aims = |storms: &[Storm]| -> Vec<_> {
            let found = findings("so".into(), before, storms, None);
            found.aims.iter().map(|aim| (aim.measured, aim.met)).collect()
        };
        // 50 of 1,000 bytes stay, without growing from storm to storm.
        let good = [(9.0, true), (0.0, true), (0.05, true), (0.0, true)];
        assert_eq!(aims(&[storm(8.0, 150, 10), storm(9.0, 150, 10), storm(10.0, 150, 10)]), good);
        // Each storm leaves 100 bytes more than the one before, and the last one a file.
        let bad = [(11.0, false), (0.1, false), (0.25, false), (1.0, false)];
        assert_eq!(aims(&[storm(11.0, 150, 10), storm(11.0, 250, 10), storm(11.0, 350, 11)]), bad);
    }
}
