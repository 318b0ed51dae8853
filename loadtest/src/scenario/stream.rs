//! The stream scenario: many concurrent streamed responses, each event in a chunk of its own.
//!
//! First at full speed, with every event requesting the next one of its stream, then at a fixed pace with staggered
//! streams: for throughput and for the delay of events.

mod findings;

use std::time::Duration;

use findings::{Pacing, StreamRound, StreamSeries};

use crate::clock::Instant;
use crate::contender::{Contender, StartedContender};
use crate::error::LoadtestError;
use crate::findings::{Findings, thousands};
use crate::generator::streams::StreamLoad;
use crate::procfs::Meter;
use crate::rig::Rig;
use crate::setup::Setup;

/// Events per second and stream: a pace that every contender sustains, and that of a fast model.
const PACES: [u32; 2] = [10, 50];
/// Streams opened at a time; they fit into every contender's accept queue.
const STREAMS_PER_BATCH: usize = 50;
/// Timeout for the last events.
const LAST_EVENTS_TIMEOUT: Duration = Duration::from_secs(15);

/// Durations of a phase.
#[derive(Clone, Copy)]
struct StreamTimes {
    warm_up: Duration,
    duration: Duration,
}

pub(crate) fn run(setup: &Setup, streams: u16) -> Result<Findings, LoadtestError> {
    let (cores, installed, rounds) = (setup.cores, setup.contenders(), setup.rounds());
    let duration = setup.duration(Duration::from_millis(400), Duration::from_millis(1500));
    let times = StreamTimes { warm_up: Duration::from_millis(if setup.quick { 100 } else { 300 }), duration };
    let streams = usize::from(streams);
    let ways = || [Pacing::Full].into_iter().chain(PACES.map(|rate| Pacing::Paced { rate }));
    let mut series: Vec<StreamSeries> = ways()
        .flat_map(|way| {
            installed.iter().map(move |each| StreamSeries {
                contender: each.contender,
                way,
                rounds: Vec::new(),
            })
        })
        .collect();
    let mut rig = Rig::new(setup.stop.clone())?;
    for round in 1..=rounds {
        for each in installed {
            let name = each.contender.name();
            eprintln!("stream, round {round} of {rounds}: {name}");
            let mut running = each.start(rig.backend(), cores)?;
            rig.await_answer(name, &mut running)?;
            let meter = Meter { cores, contender: running.process.as_ref().map(|process| process.id()) };
            let phases =
                StreamRun::open(&mut rig, each.contender, &running, streams, meter).and_then(|mut bench| {
                    for series in series.iter_mut().filter(|series| series.contender == each.contender) {
                        series.rounds.push(bench.phase(series.way, times)?);
                    }
                    bench.end()
                });
            phases.map_err(|error| running.explain(name, error))?;
        }
    }
    let how = format!(
        "{} streams; medians of {rounds} rounds of {} s, and their spread",
        thousands(streams as f64),
        duration.as_secs_f64()
    );
    Ok(findings::findings(how, streams, &series))
}

/// Open streams through one contender.
struct StreamRun<'a> {
    rig: &'a mut Rig,
    load: StreamLoad,
    contender: Contender,
    streams: usize,
    meter: Meter,
}

// === impl StreamRun ===

impl<'a> StreamRun<'a> {
    fn open(
        rig: &'a mut Rig,
        contender: Contender,
        running: &StartedContender,
        streams: usize,
        meter: Meter,
    ) -> Result<Self, LoadtestError> {
        rig.backend_mut().stream(true);
        let mut bench = Self { rig, load: StreamLoad::new(running.address), contender, streams, meter };
        for at in 0..streams {
            bench
                .load
                .open(bench.rig.registry())
                .map_err(|error| LoadtestError::io("open a stream", error))?;
            let count = at + 1;
            if count % STREAMS_PER_BATCH == 0 || count == streams {
                bench.until(|load| load.opened() == count, |load| (count - load.opened()) as u64)?;
            }
        }
        Ok(bench)
    }

    fn phase(&mut self, way: Pacing, times: StreamTimes) -> Result<StreamRound, LoadtestError> {
        let failed = |error| LoadtestError::io("write events", error);
        let backend = self.rig.backend_mut();
        let mut warm_up = times.warm_up;
        match way {
            Pacing::Full => {
                self.load.echo(true);
                let open = backend.streams().map(|streams| streams.open.clone()).unwrap_or_default();
                for key in open {
                    backend.push(key).map_err(failed)?;
                }
            }
            Pacing::Paced { rate } => {
                let period = Duration::from_secs(1) / rate;
                warm_up = warm_up.max(period);
                if let Some(streams) = backend.streams() {
                    streams.pace(Instant::now(), period);
                }
            }
        }
        self.rig.run(Some(&mut self.load), warm_up)?;
        self.load.reset();
        if let Some(streams) = self.rig.backend_mut().streams() {
            streams.late.reset();
        }
        let window = self.rig.window(&mut self.load, times.duration, self.meter)?;
        let events = self.load.seen().events.completed;

        self.load.echo(false);
        if let Some(streams) = self.rig.backend_mut().streams() {
            streams.hold();
        }
        // Events in flight still count for the latencies, as they may be the slowest. One more turn writes the events
        // that have already been requested.
        self.rig.turn(Some(&mut self.load))?;
        let sent = self.rig.backend_mut().streams().map_or(0, |streams| streams.sent);
        self.until(|load| load.received() == sent, |load| sent - load.received())?;
        let late = self.rig.backend_mut().streams().map(|streams| streams.late.value_at_quantile(0.99));
        Ok(StreamRound::new(self.contender, events, &window, self.load.seen(), late.unwrap_or_default()))
    }

    /// Ends all streams as a model server does, and waits until every client has received the end.
    fn end(mut self) -> Result<(), LoadtestError> {
        self.rig.backend_mut().end_streams().map_err(|error| LoadtestError::io("end the streams", error))?;
        let count = self.streams;
        self.until(|load| load.ended() == count, |load| (count - load.ended()) as u64)?;
        self.rig.backend_mut().stream(false);
        Ok(())
    }

    /// Runs the loop until `done`. On timeout, fails with the error of a client or the number `missing`.
    fn until(
        &mut self,
        done: impl Fn(&StreamLoad) -> bool,
        missing: impl Fn(&StreamLoad) -> u64,
    ) -> Result<(), LoadtestError> {
        let streams = self.streams;
        let arrived = self.rig.until(&mut self.load, LAST_EVENTS_TIMEOUT, |load, _| done(load))?;
        let contender = self.contender.name();
        let seen = self.load.seen();
        if let Some(first) = &seen.events.first_error {
            let (connections, requests, errors) = (streams, self.load.received(), seen.events.errors);
            return Err(LoadtestError::Answers {
                contender,
                connections,
                errors,
                requests,
                first: first.clone(),
            });
        }
        if arrived {
            return Ok(());
        }
        Err(LoadtestError::Events { contender, streams, missing: missing(&self.load) })
    }
}
