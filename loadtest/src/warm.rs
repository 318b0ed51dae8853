//! The warm scenario: every contender in turn, round after round, so that no one has the machine's
//! better minutes.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::cli;
use crate::clock::Instant;
use crate::contender::{Contender, Installed, Running};
use crate::cores::{self, Cores};
use crate::error::Error;
use crate::machine::Machine;
use crate::procfs::Meter;
use crate::report::{Report, Settings};
use crate::rig::{Plan, Rig, Sample};
use crate::stats::{Round, Series};

/// How long a contender may take to answer its first request.
const START: Duration = Duration::from_secs(20);
/// One try of it: long, as Anteroom holds it until its own health check has passed.
const FIRST_ANSWER: Duration = Duration::from_secs(5);

pub(crate) fn run(options: &cli::Warm, stop: Arc<AtomicBool>) -> Result<(), Error> {
    let cores = Cores::choose()?;
    let programs = options.programs();
    let contenders = once(&options.contenders);
    let connections: Vec<usize> = once(&options.connections).into_iter().map(usize::from).collect();
    let installed = contenders
        .iter()
        .map(|contender| Installed::find(*contender, &programs, &contenders))
        .collect::<Result<Vec<_>, _>>()?;

    cores::pin(cores.rig)?;
    let mut rig = Rig::new(stop)?;
    let mut series: Vec<Series> = connections
        .iter()
        .flat_map(|count| {
            contenders.iter().map(|contender| Series {
                contender: *contender,
                connections: *count,
                rounds: Vec::new(),
            })
        })
        .collect();
    for round in 1..=options.rounds() {
        for each in &installed {
            let name = each.contender.name();
            eprintln!("round {round} of {}: {name}", options.rounds());
            let mut running = each.start(rig.backend(), cores)?;
            await_answer(&mut rig, name, &mut running)?;
            let meter = Meter { cores, contender: running.process.as_ref().map(|process| process.id()) };
            for series in series.iter_mut().filter(|series| series.contender == each.contender) {
                let plan = Plan {
                    connections: series.connections,
                    warm_up: options.warm_up(),
                    duration: options.duration(),
                };
                let sample = rig.measure(running.address, plan, meter)?;
                accept(&sample, each.contender, series.connections)?;
                series.rounds.push(Round::new(&sample, each.contender));
            }
        }
    }

    let settings = Settings { seconds: options.duration().as_secs(), rounds: options.rounds() };
    let report = Report::new("warm", Machine::here(), settings, &installed, series);
    print!("{report}");
    if let Some(file) = &options.json {
        let what = || format!("write {}", file.display());
        let mut json = serde_json::to_vec_pretty(&report).map_err(|error| Error::io(what(), error))?;
        json.push(b'\n');
        fs::write(file, json).map_err(|error| Error::io(what(), error))?;
    }
    Ok(())
}

fn await_answer(rig: &mut Rig, contender: &'static str, running: &mut Running) -> Result<(), Error> {
    let deadline = Instant::now() + START;
    loop {
        if rig.answers(running.address, FIRST_ANSWER)? {
            return Ok(());
        }
        let log =
            |running: &Running| running.process.as_ref().map(|process| process.log()).unwrap_or_default();
        if let Some(why) = running.process.as_mut().and_then(|process| process.ended()) {
            return Err(Error::Start { contender, why, log: log(running) });
        }
        if Instant::now() >= deadline {
            let why = format!("no answer within {} s", START.as_secs());
            return Err(Error::Start { contender, why, log: log(running) });
        }
    }
}

/// Wrong or missing answers make the figures worthless.
fn accept(sample: &Sample, contender: Contender, connections: usize) -> Result<(), Error> {
    let contender = contender.name();
    if let Some(first) = &sample.first_error {
        let (errors, requests) = (sample.errors, sample.requests);
        return Err(Error::Answers { contender, connections, errors, requests, first: first.clone() });
    }
    if sample.unanswered > 0 {
        return Err(Error::Unanswered { contender, connections, missing: sample.unanswered });
    }
    if sample.requests == 0 {
        return Err(Error::Unanswered { contender, connections, missing: connections });
    }
    Ok(())
}

/// The values without repetitions, in their order.
fn once<T: Copy + PartialEq>(values: &[T]) -> Vec<T> {
    let mut seen = Vec::new();
    for value in values {
        if !seen.contains(value) {
            seen.push(*value);
        }
    }
    seen
}
