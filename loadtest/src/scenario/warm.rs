//! The warm scenario: contenders take turns, round by round, so that none benefits from quieter minutes of the machine.

mod findings;
mod series;

use std::net::SocketAddr;
use std::time::Duration;

use series::{LoadMode, WarmRound, WarmSeries};

use crate::contender::{Contender, StartedContender};
use crate::error::LoadtestError;
use crate::findings::Findings;
use crate::generator::h2::H2;
use crate::generator::open::OpenLoop;
use crate::procfs::Meter;
use crate::rig::{Measurement, MeasurementPlan, Rig};
use crate::setup::Setup;

/// Default numbers of clients.
pub(crate) const DEFAULT_CONNECTIONS: [u16; 2] = [1, 64];
/// Connections shared by the open loop.
const OPEN_LOOP_CONNECTIONS: usize = 64;
/// HTTP/2 connections; each has [`H2_STREAMS`] streams.
const H2_CONNECTIONS: usize = 4;
const H2_STREAMS: usize = 16;

pub(crate) fn run(setup: &Setup, connections: &[u16], rate: u32) -> Result<Findings, LoadtestError> {
    let (cores, installed) = (setup.cores, setup.contenders());
    let rounds = setup.rounds();
    let duration = setup.duration(Duration::from_millis(500), Duration::from_secs(4));
    let warm_up = Duration::from_millis(if setup.quick { 150 } else { 1000 });
    let mut rig = Rig::new(setup.stop.clone())?;
    let mut series: Vec<WarmSeries> = ways(connections, rate)
        .into_iter()
        .flat_map(|(way, connections)| {
            installed.iter().map(move |each| WarmSeries {
                contender: each.contender,
                way,
                connections,
                rounds: Vec::new(),
            })
        })
        // The backend speaks only HTTP/1.1.
        .filter(|series| {
            !(series.contender == Contender::Direct && matches!(series.way, LoadMode::H2 { .. }))
        })
        .collect();
    for round in 1..=rounds {
        for each in installed {
            let name = each.contender.name();
            eprintln!("warm, round {round} of {rounds}: {name}");
            let mut running = each.start(rig.backend(), cores)?;
            rig.await_answer(name, &mut running)?;
            for series in series.iter_mut().filter(|series| series.contender == each.contender) {
                let plan = MeasurementPlan { connections: series.connections, warm_up, duration };
                let meter = Meter { cores, contender: running.process.as_ref().map(|process| process.id()) };
                let sample = measure(&mut rig, &running, series.way, plan, meter)
                    .and_then(|sample| accept(sample, each.contender, series.connections))
                    .map_err(|error| running.explain(name, error))?;
                series.rounds.push(WarmRound::new(&sample, each.contender));
            }
        }
    }
    let how = format!("medians of {rounds} rounds of {} s, and their spread", duration.as_secs_f64());
    Ok(findings::findings(how, &series))
}

/// Returns the ways to send requests, each with its number of connections.
fn ways(connections: &[u16], rate: u32) -> Vec<(LoadMode, usize)> {
    let mut ways: Vec<_> =
        once(connections).into_iter().map(|count| (LoadMode::Closed, usize::from(count))).collect();
    ways.push((LoadMode::Open { rate }, OPEN_LOOP_CONNECTIONS));
    ways.push((LoadMode::H2 { streams: H2_STREAMS }, H2_CONNECTIONS));
    ways
}

fn measure(
    rig: &mut Rig,
    running: &StartedContender,
    way: LoadMode,
    plan: MeasurementPlan,
    meter: Meter,
) -> Result<Measurement, LoadtestError> {
    let failed = |error| LoadtestError::io("connect", error);
    let address: SocketAddr = running.address;
    match way {
        LoadMode::Closed => rig.measure(address, plan, meter),
        LoadMode::Open { rate } => {
            let mut load =
                OpenLoop::connect(rig.registry(), address, plan.connections, rate).map_err(failed)?;
            rig.measure_load(&mut load, plan, meter)
        }
        LoadMode::H2 { streams } => {
            let mut load =
                H2::connect(rig.registry(), running.h2, plan.connections, streams).map_err(failed)?;
            rig.measure_load(&mut load, plan, meter)
        }
    }
}

/// Fails on wrong or missing responses, which invalidate the figures.
pub(super) fn accept(
    sample: Measurement,
    contender: Contender,
    connections: usize,
) -> Result<Measurement, LoadtestError> {
    let contender = contender.name();
    if let Some(first) = &sample.first_error {
        let (errors, requests) = (sample.errors, sample.requests);
        return Err(LoadtestError::Answers {
            contender,
            connections,
            errors,
            requests,
            first: first.clone(),
        });
    }
    if sample.unanswered > 0 {
        return Err(LoadtestError::Unanswered { contender, connections, missing: sample.unanswered });
    }
    if sample.requests == 0 {
        return Err(LoadtestError::Unanswered { contender, connections, missing: connections });
    }
    Ok(sample)
}

/// Returns the values without repetitions, in their order.
fn once<T: Copy + PartialEq>(values: &[T]) -> Vec<T> {
    let mut seen = Vec::new();
    for value in values {
        if !seen.contains(value) {
            seen.push(*value);
        }
    }
    seen
}
