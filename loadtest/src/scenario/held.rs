//! The held scenario: cost of many held requests.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use crate::descriptors::ClientLimit;
use crate::error::LoadtestError;
use crate::findings::{Criterion, Findings, Table, disturbed, thousands};
use crate::member::MEMBER_BODY_BYTES;
use crate::multiplexed::STREAMS_PER_CONNECTION;
use crate::scene::{RouteSettings, Testbed};
use crate::setup::Setup;
use crate::target::RampSettings;

const DEFAULT_HELD_REQUESTS: usize = 50_000;
const QUICK_REQUESTS: usize = 10_000;
const FIXED_RAMP: RampSettings = RampSettings { start: 64, max: 64 };
/// Duration of the measurement before the first heartbeat, which is sent after 20 s.
const QUIET_MEASUREMENT: Duration = Duration::from_secs(5);
/// Default interval between two heartbeats, in seconds.
const DEFAULT_HEARTBEAT_SECS: u64 = 10;

/// Requests of one kind, added to those already held.
#[derive(Clone, Copy, Debug, Serialize)]
struct HeldStep {
    requests: usize,
    /// Memory in bytes: before their arrival, while held, after their early responses.
    before: u64,
    held: u64,
    informed: u64,
}

/// CPU time during an interval in which requests were only held.
#[derive(Clone, Copy, Debug, Serialize)]
struct Holding {
    seconds: f64,
    heartbeats: u64,
    /// Share of a core used by Anteroom, in percent.
    percent: f64,
    /// Cores used by other processes, on our two cores.
    others: f64,
}

pub(crate) fn run(setup: &Setup, requests: Option<usize>) -> Result<Findings, LoadtestError> {
    let count = requests.unwrap_or(if setup.quick { QUICK_REQUESTS } else { DEFAULT_HELD_REQUESTS });
    let (own, note) = ClientLimit::from_raised_limit()?.fit(count);
    let seconds = setup.seconds(10, 30);
    let mut scene = Testbed::start(setup, RouteSettings { hold: count, ramp: FIXED_RAMP, streamed: true })?;
    scene.run_for(Duration::from_millis(200))?;

    eprintln!("held: {own} clients with a connection each");
    let before = scene.footprint()?.memory;
    scene.gather(own)?;
    let connected = scene.footprint()?.memory;
    scene.send_all()?;
    let waiting = wait(&mut scene, own)?;
    let still = hold(&mut scene, QUIET_MEASUREMENT)?;
    let informed = await_early_responses(&mut scene, own)?;
    let alone = HeldStep { requests: own, before, held: waiting, informed };
    let shared = if count > own {
        eprintln!("held: {} clients that share connections", count - own);
        let before = scene.footprint()?.memory;
        scene.gather_multiplexed(count - own)?;
        let held = wait(&mut scene, count)?;
        let informed = await_early_responses(&mut scene, count)?;
        Some(HeldStep { requests: count - own, before, held, informed })
    } else {
        None
    };
    eprintln!("held: measuring for {seconds} s");
    let holding = hold(&mut scene, Duration::from_secs(seconds.into()))?;
    let due = count as f64 * holding.seconds / DEFAULT_HEARTBEAT_SECS as f64;
    if (holding.heartbeats as f64) < due * 0.8 {
        let Holding { heartbeats, seconds, .. } = holding;
        return Err(LoadtestError::Wrong(format!(
            "{heartbeats} heartbeats in {seconds:.0} s, where {due:.0} were due"
        )));
    }
    scene.await_held(count)?;
    scene.sides.target.ready = true;
    scene.until("all served", |sides| sides.crowd.tally.waiting == 0)?;

    let how = match shared {
        None => {
            format!("{} streaming requests of 2 KB, each on a connection of its own", thousands(count as f64))
        }
        Some(shared) => format!(
            "{} streaming requests of 2 KB: {} on connections of their own, {} over HTTP/2, {STREAMS_PER_CONNECTION} on each connection",
            thousands(count as f64),
            thousands(own as f64),
            thousands(shared.requests as f64)
        ),
    };
    let how = format!(
        "{how}; CPU time over {seconds} s, with a heartbeat to each every {DEFAULT_HEARTBEAT_SECS} s"
    );
    let connected = (connected as f64 - before as f64) / own as f64 / 1024.0;
    Ok(findings(how, &[Some(alone), shared], connected, still, holding, note))
}

/// Waits until `count` requests are held and returns the memory.
fn wait(scene: &mut Testbed, count: usize) -> Result<u64, LoadtestError> {
    scene.await_held(count)?;
    scene.run_for(Duration::from_millis(500))?;
    Ok(scene.footprint()?.memory)
}

/// Waits until `count` requests have an early response and returns the memory.
fn await_early_responses(scene: &mut Testbed, count: usize) -> Result<u64, LoadtestError> {
    eprintln!("held: waiting for the early answers");
    scene.until("all answered early", |sides| sides.crowd.tally.begun == count)?;
    Ok(scene.footprint()?.memory)
}

/// Measures the CPU time of holding.
fn hold(scene: &mut Testbed, duration: Duration) -> Result<Holding, LoadtestError> {
    let (heartbeats, before) = (scene.sides.crowd.tally.heartbeats, scene.read()?);
    let seconds = scene.run_for(duration)?.elapsed.as_secs_f64();
    let spent = before.until(&scene.read()?);
    Ok(Holding {
        seconds,
        heartbeats: scene.sides.crowd.tally.heartbeats - heartbeats,
        percent: spent.contender.as_secs_f64() / seconds * 100.0,
        others: spent.others.as_secs_f64() / seconds,
    })
}

// === impl HeldStep ===

impl HeldStep {
    /// Returns the memory per request in KiB, without the body, from the `memory` in bytes of the process.
    fn kib_per_request(self, memory: u64) -> f64 {
        (memory as f64 - self.before as f64) / self.requests as f64 / 1024.0
            - MEMBER_BODY_BYTES as f64 / 1024.0
    }
}

fn findings(
    how: String,
    parts: &[Option<HeldStep>; 2],
    connected: f64,
    still: Holding,
    holding: Holding,
    note: Option<String>,
) -> Findings {
    let parts = || {
        ["connection of its own", "HTTP/2"]
            .into_iter()
            .zip(parts.iter())
            .filter_map(|(name, part)| Some((name, (*part)?)))
    };
    let count: usize = parts().map(|(_, part)| part.requests).sum();
    let row = |what: &str, value: String| vec![what.to_owned(), value];
    let mut rows = vec![row("KiB each, connected, nothing sent", format!("{connected:.2}"))];
    for (name, part) in parts() {
        rows.push(row(
            &format!("KiB each beyond the body, held, {name}"),
            format!("{:.2}", part.kib_per_request(part.held)),
        ));
        rows.push(row(
            &format!("KiB each beyond the body, answered early, {name}"),
            format!("{:.2}", part.kib_per_request(part.informed)),
        ));
    }
    let each = holding.percent * 1e4 * holding.seconds / holding.heartbeats as f64;
    rows.extend([
        row("heartbeats/s", thousands(holding.heartbeats as f64 / holding.seconds)),
        row("CPU while holding, % of a core", format!("{:.2}", holding.percent)),
        row("CPU before the first heartbeat, % of a core", format!("{:.2}", still.percent)),
        row("CPU per heartbeat, including all other work, µs", format!("{each:.1}")),
    ]);
    let mut aims = Vec::new();
    for (name, part) in parts() {
        let who = format!("anteroom, {} held, {name}", thousands(part.requests as f64));
        let most = part.kib_per_request(part.held.max(part.informed));
        aims.push(Criterion::at_most(who.clone(), "KiB each beyond the body, at most", 12.0, most));
        aims.push(Criterion::at_most(who, "KiB each beyond the body, stretch, at most", 6.0, most));
    }
    let who = format!("anteroom, {} held", thousands(count as f64));
    aims.push(Criterion::at_most(who, "% of a core while holding, at most", 5.0, holding.percent));
    let mut notes: Vec<String> = note.into_iter().collect();
    notes.extend(disturbed(holding.others));
    let results: Vec<_> = parts()
        .map(|(name, part)| {
            json!({
                "connections": name, "part": part,
                "held_kib_each": part.kib_per_request(part.held), "informed_kib_each": part.kib_per_request(part.informed),
            })
        })
        .collect();
    Findings {
        scenario: "held",
        how,
        tables: vec![Table {
            title: String::new(),
            header: ["anteroom", ""].map(str::to_owned).into(),
            rows,
            legend: Some(
                "KiB: resident memory of the process, not what the kernel keeps for its connections",
            ),
        }],
        results: json!({
            "requests": count, "body_bytes": MEMBER_BODY_BYTES, "connected_kib_each": connected, "parts": results,
            "before_heartbeats": still, "holding": holding,
        }),
        aims,
        notes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_per_client_excludes_the_body() {
        let part = HeldStep {
            requests: 10,
            before: 1000,
            held: 1000 + 10 * 5 * 1024,
            informed: 1000 + 10 * 15 * 1024,
        };
        let holding = |heartbeats, percent| Holding { seconds: 10.0, heartbeats, percent, others: 0.0 };
        let found = findings("so".into(), &[Some(part), None], 1.0, holding(0, 0.5), holding(10, 6.0), None);
        let measured: Vec<_> = found.aims.iter().map(|aim| (aim.measured, aim.met)).collect();
        assert_eq!(measured, [(13.0, false), (13.0, false), (6.0, false)]);
        assert_eq!(found.results["parts"][0]["held_kib_each"], 3.0);
        // 6 % of a core over 10 s is 600 ms, for ten heartbeats.
        assert!(found.to_string().contains("60000.0"), "{found}");
    }
}
