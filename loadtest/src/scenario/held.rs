//! The held scenario: what it takes to have many wait.

use std::time::Duration;

use serde_json::json;

use crate::descriptors::Room;
use crate::error::Error;
use crate::findings::{Aim, Findings, NOISE, Table, thousands};
use crate::member::BODY;
use crate::scene::{Bounds, Scene};
use crate::setup::Setup;
use crate::target::Ramp;

const REQUESTS: usize = 50_000;
const QUICK: usize = 10_000;
const RAMP: Ramp = Ramp { start: 64, max: 64 };
/// Between two heartbeats, by default.
const INTERVAL: u64 = 10;

pub(crate) fn run(setup: &Setup, requests: Option<usize>) -> Result<Findings, Error> {
    let wanted = requests.unwrap_or(if setup.quick { QUICK } else { REQUESTS });
    let (count, note) = Room::make()?.fit(wanted);
    let mut scene = Scene::start(setup, Bounds { hold: count, ramp: RAMP, streamed: true })?;
    eprintln!("held: {count} clients send");
    scene.gather(0)?;
    let empty = scene.footprint()?;
    scene.gather(count)?;
    let connected = scene.footprint()?;
    scene.send_all()?;
    scene.await_held(count)?;
    scene.stay(Duration::from_millis(500))?;
    let held = scene.footprint()?;
    eprintln!("held: waiting for the early answers");
    scene.until("all answered early", |sides| sides.crowd.tally.begun == count)?;
    let begun = scene.footprint()?;
    let seconds = setup.seconds(10, 30);
    eprintln!("held: measuring for {seconds} s");
    let (heartbeats, before) = (scene.sides.crowd.tally.heartbeats, scene.read()?);
    let passed = scene.stay(Duration::from_secs(seconds.into()))?;
    let spent = before.until(&scene.read()?);
    let heartbeats = scene.sides.crowd.tally.heartbeats - heartbeats;
    let last = scene.footprint()?;
    scene.await_held(count)?;
    scene.sides.target.ready = true;
    scene.until("all served", |sides| sides.crowd.tally.waiting == 0)?;

    let elapsed = passed.elapsed.as_secs_f64();
    let due = count as f64 * (elapsed / INTERVAL as f64);
    if (heartbeats as f64) < due * 0.8 {
        return Err(Error::Wrong(format!(
            "{heartbeats} heartbeats in {elapsed:.0} s, where {due:.0} were due"
        )));
    }
    let each = |memory: u64, body: usize| {
        (memory as f64 - empty.memory as f64) / count as f64 / 1024.0 - body as f64 / 1024.0
    };
    let (idle, waiting) = (each(connected.memory, 0), each(held.memory, BODY));
    let informed = each(begun.memory.max(last.memory), BODY);
    let cpu = spent.contender.as_secs_f64() / elapsed * 100.0;
    let row = |what: &str, value: String| vec![what.to_owned(), value];
    let rows = vec![
        row("held requests", thousands(count as f64)),
        row("KiB each, connected, nothing sent", format!("{idle:.2}")),
        row("KiB each beyond the body, held", format!("{waiting:.2}")),
        row("KiB each beyond the body, answered early", format!("{informed:.2}")),
        row("heartbeats/s", thousands(heartbeats as f64 / elapsed)),
        row("CPU while holding, % of a core", format!("{cpu:.2}")),
        row(
            "CPU for a heartbeat, µs",
            format!("{:.1}", spent.contender.as_secs_f64() * 1e6 / heartbeats as f64),
        ),
    ];
    let who = format!("anteroom, {} held", thousands(count as f64));
    let aims = vec![
        Aim::at_most(who.clone(), "KiB each beyond the body, at most", 12.0, informed),
        Aim::at_most(who.clone(), "KiB each beyond the body, stretch, at most", 6.0, informed),
        Aim::at_most(who, "% of a core while holding, at most", 5.0, cpu),
    ];
    let mut notes: Vec<String> = note.into_iter().collect();
    let others = spent.others.as_secs_f64() / elapsed;
    if others > NOISE {
        notes.push(format!("other processes used {:.0} % of a core, so CPU time is noisy", others * 100.0));
    }
    Ok(Findings {
        scenario: "held",
        how: format!(
            "{} streaming requests of 2 KB, each on a connection of its own; CPU time over {seconds} s, with a \
             heartbeat to each every {INTERVAL} s",
            thousands(count as f64)
        ),
        tables: vec![Table {
            title: String::new(),
            header: ["anteroom", ""].map(str::to_owned).into(),
            rows,
            legend: Some(
                "KiB: resident memory of the process, not what the kernel keeps for its connections",
            ),
        }],
        results: json!({
            "requests": count, "body_bytes": BODY, "empty": empty, "connected": connected, "held": held, "begun": begun,
            "last": last, "connected_kib_each": idle, "held_kib_each": waiting, "begun_kib_each": informed,
            "seconds": elapsed, "heartbeats": heartbeats, "cpu_percent": cpu, "others": others,
        }),
        aims,
        notes,
    })
}
