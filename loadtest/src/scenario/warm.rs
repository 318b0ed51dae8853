//! The warm scenario: every contender in turn, round after round, so that no one has the machine's
//! better minutes.

mod findings;
mod series;

use std::time::Duration;

use series::{Round, Series};

use crate::contender::Contender;
use crate::error::Error;
use crate::findings::Findings;
use crate::procfs::Meter;
use crate::rig::{Plan, Rig, Sample};
use crate::setup::Setup;

/// How many clients there are, unless the command line says so.
pub(crate) const CONNECTIONS: [u16; 2] = [1, 64];
pub(crate) fn run(setup: &Setup, connections: &[u16]) -> Result<Findings, Error> {
    let (cores, installed) = (setup.cores, setup.contenders());
    let (rounds, seconds) = (setup.rounds(), setup.seconds(1, 5));
    let connections: Vec<usize> = once(connections).into_iter().map(usize::from).collect();
    let warm_up = Duration::from_millis(if setup.quick { 300 } else { 1000 });
    let mut rig = Rig::new(setup.stop.clone())?;
    let mut series: Vec<Series> = connections
        .iter()
        .flat_map(|count| {
            installed.iter().map(|each| Series {
                contender: each.contender,
                connections: *count,
                rounds: Vec::new(),
            })
        })
        .collect();
    for round in 1..=rounds {
        for each in installed {
            let name = each.contender.name();
            eprintln!("warm, round {round} of {rounds}: {name}");
            let mut running = each.start(rig.backend(), cores)?;
            rig.await_answer(name, &mut running)?;
            let meter = Meter { cores, contender: running.process.as_ref().map(|process| process.id()) };
            for series in series.iter_mut().filter(|series| series.contender == each.contender) {
                let duration = Duration::from_secs(seconds.into());
                let plan = Plan { connections: series.connections, warm_up, duration };
                let sample = rig.measure(running.address, plan, meter)?;
                accept(&sample, each.contender, series.connections)?;
                series.rounds.push(Round::new(&sample, each.contender));
            }
        }
    }
    let how = format!("medians of {rounds} rounds of {seconds} s, and their spread");
    Ok(findings::findings(how, &series))
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
