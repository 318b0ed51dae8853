//! Runs with known times, for tests.

use super::{
    results::{
        ClockCheck, Cost, Cycle, CycleVerdict, Machine, RequestResult, Run, RunSettings, SCHEMA, Summary,
    },
    stats::Bootstrap,
};
use crate::coldstart::{ColdStart, ColdStartOutcome, Part, PartSpan, Phase, PhaseSpan};

/// Builds a completed record. The first half of a load is its part `weights`.
pub(super) fn record(phases: &[(Phase, f64)]) -> ColdStart {
    let mut start_ms = 0.0;
    let spans = phases.iter().map(|(name, duration_ms)| {
        let (name, duration_ms) = (*name, *duration_ms);
        let weights = PartSpan { name: Part::Weights, start_ms, duration_ms: duration_ms / 2.0 };
        let parts = if name == Phase::Load { vec![weights] } else { Vec::new() };
        let span = PhaseSpan { name, start_ms, duration_ms, early_ms: None, unfinished: false, parts };
        start_ms += duration_ms;
        span
    });
    let spans = spans.collect();
    let until = |last: Phase| phases.iter().filter(|(name, _)| *name <= last).map(|(_, ms)| ms).sum::<f64>();
    let ready = until(Phase::Propagate);
    ColdStart {
        id: 1,
        outcome: Some(ColdStartOutcome::Completed),
        started_at: "2026-01-02T03:04:05.000Z".to_owned(),
        total_ms: start_ms,
        phases: spans,
        t_actuation_ms: Some(ready),
        t_first_token_ms: Some(start_ms - ready),
        t_e2e_ms: Some(start_ms),
        held_peak: 1,
        released: 1,
        ..ColdStart::default()
    }
}

/// Builds a counted cycle. The client receives the first token 2 ms after the proxy, and the end 100 ms later.
pub(super) fn cycle(number: usize, record: ColdStart) -> Cycle {
    let ttft = record.total_ms + 2.0;
    let requests = vec![RequestResult {
        sent_ms: 0.0,
        ttft_ms: Some(ttft),
        total_ms: ttft + 100.0,
        status: Some(200),
        error: None,
        request_id: Some(format!("bench-{number}-1")),
    }];
    Cycle {
        number,
        started_at: record.started_at.clone(),
        idle_ms: (number > 1).then_some(1500.0),
        verdict: CycleVerdict::Cold,
        error: None,
        outside_clock: ClockCheck::of(&requests, &record),
        cost: Cost::of(&record, ttft + 100.0).map(|cost| Cost { idle_s: Some(1.5), ..cost }),
        cold_start: Some(record),
        requests,
    }
}

/// Builds a failed cycle.
pub(super) fn failed(number: usize, why: &str) -> Cycle {
    let request = RequestResult {
        sent_ms: 0.0,
        ttft_ms: None,
        total_ms: 50.0,
        status: Some(503),
        error: Some(why.to_owned()),
        request_id: None,
    };
    Cycle {
        number,
        started_at: "2026-01-02T03:04:05.000Z".to_owned(),
        idle_ms: None,
        verdict: CycleVerdict::Failed,
        error: Some(why.to_owned()),
        requests: vec![request],
        cold_start: None,
        outside_clock: None,
        cost: None,
    }
}

/// Builds a run.
pub(super) fn run(cycles: Vec<Cycle>) -> Run {
    let mut run = Run {
        schema: SCHEMA.to_owned(),
        anteroom: "0.1.0".to_owned(),
        started_at: "2026-01-02T03:04:05.000Z".to_owned(),
        command: ["anteroom", "bench", "cold-start"].map(str::to_owned).into(),
        label: None,
        machine: Machine { os: "linux".to_owned(), arch: "x86_64".to_owned(), cpus: 2 },
        route: "tiny".to_owned(),
        burst: 1,
        idle_s: Some(1.0),
        settings: RunSettings {
            target: "own".to_owned(),
            cycles: cycles.len(),
            arrivals: "together".to_owned(),
            seed: 1,
            prompts: 4,
            endpoint: "chat".to_owned(),
            model: Some("tiny".to_owned()),
            max_tokens: 16,
            stream: true,
            pause_s: 0.0,
            stop_command: false,
            gpu_hour_price: Some(3.6),
            currency: Some("EUR".to_owned()),
        },
        interrupted: false,
        aborted: None,
        cycles,
        summary: Summary::default(),
    };
    run.summary = Summary::of(&run, &Bootstrap::default());
    run
}

/// Builds a run of cold starts that differ only in their load time, in milliseconds.
pub(super) fn loads(times: &[f64]) -> Run {
    let cycles = times.iter().enumerate().map(|(index, load)| {
        let phases =
            [(Phase::Signal, 1.0), (Phase::Start, 20.0), (Phase::Load, *load), (Phase::FirstToken, 50.0)];
        cycle(index + 1, record(&phases))
    });
    run(cycles.collect())
}
