//! The body scenario: cost of finding the model name in the body, for which the body has to be buffered and read.
//!
//! Anteroom forwards bodies unbuffered if no route requires a model, so a route with models adds two costs: buffering
//! the body and scanning it. The scan alone is the difference between two rejections: of a body for a model without a
//! route, which is scanned to its end, and of a body that is not an object, where the scan ends at the first byte.
//! Both are buffered completely, and neither is forwarded.

mod findings;
mod text;

use std::sync::Arc;
use std::time::Duration;

use findings::{BodyKind, BodyRound, BodySeries};

use super::warm::accept;
use crate::contender::{Contender, InstalledContender};
use crate::error::LoadtestError;
use crate::findings::Findings;
use crate::generator::ClosedLoop;
use crate::generator::client::{ExpectedExchange, ExpectedResponse};
use crate::procfs::Meter;
use crate::rig::{MeasurementPlan, Rig};
use crate::setup::Setup;

/// Bytes of a body, and number of clients sending it: a question, a pasted document, a picture.
const SIZES: [(usize, usize); 3] = [(2 << 10, 64), (200 << 10, 16), (8 << 20, 4)];

pub(crate) fn run(setup: &Setup) -> Result<Findings, LoadtestError> {
    let (cores, rounds) = (setup.cores, setup.rounds());
    let duration = setup.duration(Duration::from_millis(250), Duration::from_millis(600));
    let warm_up = Duration::from_millis(50);
    let streaming = streaming(setup)?;
    let measured = || setup.contenders().iter().chain(&streaming);
    let mut series: Vec<BodySeries> = Vec::new();
    let mut exchanges = Vec::new();
    for (bytes, connections) in SIZES {
        for kind in [BodyKind::Forwarded, BodyKind::Scanned, BodyKind::Kept] {
            let contenders = measured().map(|each| each.contender);
            // Only Anteroom reads bodies.
            for contender in
                contenders.filter(|each| kind == BodyKind::Forwarded || *each == Contender::Anteroom)
            {
                series.push(BodySeries { contender, kind, bytes, connections, rounds: Vec::new() });
            }
            exchanges.push((bytes, kind, Arc::new(kind.exchange(bytes))));
        }
    }
    let mut rig = Rig::new(setup.stop.clone())?;
    for round in 1..=rounds {
        for each in measured() {
            let name = each.contender.name();
            eprintln!("body, round {round} of {rounds}: {name}");
            let mut running = each.start(rig.backend(), cores)?;
            rig.await_answer(name, &mut running)?;
            let meter = Meter { cores, contender: running.process.as_ref().map(|process| process.id()) };
            for series in series.iter_mut().filter(|series| series.contender == each.contender) {
                let wanted = exchanges.iter().find(|(bytes, kind, _)| (*bytes, *kind) == series.key());
                let Some((_, _, exchange)) = wanted else { continue };
                let mut load = ClosedLoop::with(
                    rig.registry(),
                    running.address,
                    series.connections,
                    Arc::clone(exchange),
                )
                .map_err(|error| LoadtestError::io("connect", error))?;
                load.start(u64::MAX);
                let plan = MeasurementPlan { connections: series.connections, warm_up, duration };
                let sample = rig
                    .measure_load(&mut load, plan, meter)
                    .and_then(|sample| accept(sample, each.contender, series.connections))
                    .map_err(|error| running.explain(name, error))?;
                series.rounds.push(BodyRound::new(&sample, each.contender));
            }
        }
    }
    let how = format!("medians of {rounds} rounds of {} s, and their spread", duration.as_secs_f64());
    Ok(findings::findings(how, &series))
}

/// Returns Anteroom without models, as a baseline for the others, unless it is measured already.
fn streaming(setup: &Setup) -> Result<Option<InstalledContender>, LoadtestError> {
    if !setup.measures(Contender::Anteroom) || setup.measures(Contender::AnteroomNoscan) {
        return Ok(None);
    }
    Ok(Some(setup.anteroom()?.like(Contender::AnteroomNoscan)))
}

// === impl BodyKind ===

impl BodyKind {
    fn exchange(self, bytes: usize) -> ExpectedExchange {
        let (first, model, expect) = match self {
            Self::Forwarded => ('{', "tiny", ExpectedResponse::Answer),
            Self::Scanned => ('{', "none", ExpectedResponse::Status(404)),
            Self::Kept => ('[', "tiny", ExpectedResponse::Status(400)),
        };
        ExpectedExchange::new(&text::body(bytes, first, model), expect)
    }
}
