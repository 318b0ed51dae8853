//! Parts of the load phase, read from the log of a process.

use anteroom::{
    coldstart::{Part, Phase},
    hold::ReleaseOutcome,
};

use crate::support::{SupervisedRoute, process, sh, sim, within};

/// Tolerance for sums of milliseconds: one nanosecond.
const ROUNDING: f64 = 1e-6;

#[tokio::test]
async fn log_yields_parts_of_the_load_phase() {
    let route = SupervisedRoute::new(process(sim(&["--load-time", "500ms"])));
    let ReleaseOutcome::Dispatch(permit) = within(route.hold().released()).await else {
        panic!("not released")
    };
    route.gate.cold_starts().dispatched();
    permit.first_byte();
    let record = route.records().remove(0);
    let load = record.phase(Phase::Load).unwrap();
    let names: Vec<_> = load.parts.iter().map(|part| part.name).collect();
    assert_eq!(
        names,
        [Part::EngineStart, Part::Weights, Part::Compile, Part::Warmup, Part::ServerStart],
        "{record:?}"
    );
    let mut end = load.start_ms;
    for part in &load.parts {
        assert!(part.start_ms >= end - ROUNDING && part.duration_ms > 0.0, "{load:?}");
        end = part.start_ms + part.duration_ms;
    }
    assert!(end <= load.start_ms + load.duration_ms + ROUNDING, "{load:?}");
    assert!(record.phases.iter().all(|span| span.parts.is_empty() || span.name == Phase::Load));
    drop(permit);
    route.end().await;
}

#[tokio::test]
async fn silent_program_has_no_load_parts() {
    let route =
        SupervisedRoute::new(process(sh("exec \"$0\" \"$@\" 2>/dev/null", &sim(&["--load-time", "50ms"]))));
    let ReleaseOutcome::Dispatch(permit) = within(route.hold().released()).await else {
        panic!("not released")
    };
    route.gate.cold_starts().dispatched();
    permit.first_byte();
    let record = route.records().remove(0);
    assert!(record.phases.iter().all(|span| span.parts.is_empty()), "{record:?}");
    drop(permit);
    route.end().await;
}
