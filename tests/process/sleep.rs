//! vLLM's sleep mode, with stand-ins for vLLM as processes.

use anteroom::{
    coldstart::{ColdStart, ColdStartKind, ColdStartOutcome, Phase},
    domain::{Period, Target, WhenIdle},
    hold::ReleaseOutcome,
    state::Status,
};
use rustix::process::{Signal, kill_process};

use crate::support::{Pids, SupervisedRoute, alive, process, settings, sh, sim, within};

/// Returns a route whose server sleeps as soon as it is idle, and the process ids of its servers.
fn sleeper(arguments: &[&str]) -> (SupervisedRoute, Pids) {
    let pids = Pids::new();
    let arguments = [&["--enable-sleep-mode"], arguments].concat();
    let route = SupervisedRoute::new(target(&pids, &arguments));
    (route, pids)
}

fn target(pids: &Pids, arguments: &[&str]) -> Target {
    let mut target = process(sh(&pids.then("exec \"$0\" \"$@\""), &sim(arguments)));
    let Target::Process(process) = &mut target else { unreachable!() };
    process.when_idle = WhenIdle::Sleep;
    process.idle_timeout = Period::from_millis(20);
    target
}

/// Completes one request: held, dispatched, first byte received.
async fn answered(route: &SupervisedRoute) {
    let mut ticket = route.hold();
    let ReleaseOutcome::Dispatch(permit) = within(ticket.released()).await else { panic!("not released") };
    route.gate.cold_starts().dispatched();
    permit.first_byte();
}

/// Returns the kinds of the recorded cold starts, oldest first.
fn kinds(route: &SupervisedRoute) -> Vec<ColdStartKind> {
    route.records().iter().rev().map(|record| record.kind).collect()
}

fn phases(record: &ColdStart) -> Vec<Phase> {
    record.phases.iter().map(|span| span.name).collect()
}

#[tokio::test]
async fn idle_server_sleeps_and_wakes_again() {
    let (route, pids) = sleeper(&["--load-time", "300ms"]);
    for wakes in 0..3 {
        answered(&route).await;
        route.status("sleeping").await;
        assert!(pids.all().len() == 1 && alive(pids.all()[0]), "{wakes}: the same server");
        let endpoints = route.gate.target().endpoints().clone();
        assert!(endpoints.len() == 1 && !endpoints[0].is_ready(), "{endpoints:?}");
    }
    assert_eq!(kinds(&route), [ColdStartKind::ColdStart, ColdStartKind::Wake, ColdStartKind::Wake]);
    let [wake, _, start] = route.records().try_into().unwrap();
    assert_eq!(wake.outcome, Some(ColdStartOutcome::Completed));
    assert_eq!(phases(&wake), [Phase::Signal, Phase::Load, Phase::Dispatch, Phase::FirstByte]);
    assert_eq!(phases(&start), [Phase::Signal, Phase::Start, Phase::Load, Phase::Dispatch, Phase::FirstByte]);
    // The estimate for the next wake uses past wakes only, not starts.
    let wakes = route.gate.cold_starts().estimates().unwrap();
    assert_eq!(wakes.count, 2);
    assert_eq!(
        wakes.until_ready.p90_ms,
        route.records()[..2].iter().filter_map(|wake| wake.t_actuation_ms).fold(0.0, f64::max)
    );
    route.gate.cold_starts().set_kind(ColdStartKind::ColdStart);
    assert_eq!(route.gate.cold_starts().estimates().unwrap().count, 1);
    route.end().await;
    assert!(!alive(pids.all()[0]), "a server that sleeps is stopped, too");
}

#[tokio::test]
async fn request_while_falling_asleep_waits_for_the_wake() {
    let (route, pids) = sleeper(&["--sleep-time", "300ms"]);
    answered(&route).await;
    route.status("stopping").await;
    answered(&route).await;
    assert_eq!((kinds(&route), pids.all().len()), (vec![ColdStartKind::ColdStart, ColdStartKind::Wake], 1));
    route.end().await;
}

#[tokio::test]
async fn a_server_that_cannot_sleep_is_stopped() {
    let pids = Pids::new();
    let route = SupervisedRoute::new(target(&pids, &[]));
    for starts in 1..=2 {
        answered(&route).await;
        route.status("idle").await;
        assert!(pids.all().len() == starts && !alive(pids.all()[starts - 1]));
    }
    assert_eq!(kinds(&route), [ColdStartKind::ColdStart; 2]);
    route.end().await;
}

#[tokio::test]
async fn sleeping_server_is_stopped_after_timeout() {
    let pids = Pids::new();
    let mut target = target(&pids, &["--enable-sleep-mode"]);
    let Target::Process(process) = &mut target else { unreachable!() };
    process.stop_after = Some(Period::from_millis(20));
    let route = SupervisedRoute::new(target);
    answered(&route).await;
    route.status("idle").await;
    assert!(!alive(pids.all()[0]) && route.gate.target().endpoints().is_empty());
    answered(&route).await;
    assert_eq!(kinds(&route), [ColdStartKind::ColdStart; 2]);
    route.end().await;
}

#[tokio::test]
async fn server_that_dies_asleep_is_restarted() {
    let (route, pids) = sleeper(&[]);
    answered(&route).await;
    route.status("sleeping").await;
    kill_process(pids.all()[0], Signal::KILL).unwrap();
    route.status("idle").await;
    assert!(route.gate.target().endpoints().is_empty());
    answered(&route).await;
    assert_eq!((kinds(&route), pids.all().len()), (vec![ColdStartKind::ColdStart; 2], 2));
    route.end().await;
}

#[tokio::test]
async fn server_that_cannot_wake_is_restarted() {
    let (route, pids) = sleeper(&["--fail-wake"]);
    answered(&route).await;
    route.status("sleeping").await;
    let mut other = route.hold();
    answered(&route).await;
    assert!(matches!(within(other.released()).await, ReleaseOutcome::Dispatch(_)));
    assert_eq!((kinds(&route), pids.all().len()), (vec![ColdStartKind::ColdStart; 2], 2));
    assert!(!alive(pids.all()[0]), "two might not fit");
    let record = route.records().remove(0);
    assert_eq!((record.outcome, record.failed), (Some(ColdStartOutcome::Completed), 0));
    assert_eq!(
        record.reason.as_deref(),
        Some("the target did not wake: /wake_up was answered with status 500")
    );
    assert_eq!(
        phases(&record),
        [Phase::Signal, Phase::Start, Phase::Load, Phase::Dispatch, Phase::FirstByte],
        "one activation, and what the wake took is in the start"
    );
    route.end().await;
}

#[tokio::test]
async fn server_that_dies_waking_is_restarted() {
    for dies in [false, true] {
        let pids = Pids::new();
        let mut settings = settings();
        if !dies {
            // The timeout also applies to the start, which takes less even on a slow machine.
            settings.readiness.activation_timeout = Period::from_secs(5);
        }
        let target = target(&pids, &["--enable-sleep-mode", "--wake-time", "1h"]);
        let route = SupervisedRoute::with(target, settings);
        answered(&route).await;
        route.status("sleeping").await;
        let mut held = route.hold();
        route.status("starting").await;
        assert_eq!(route.gate.cold_starts().phase().unwrap().0, Phase::Load, "it runs already");
        if dies {
            kill_process(pids.all()[0], Signal::KILL).unwrap();
        }
        let ReleaseOutcome::Dispatch(permit) = within(held.released()).await else { panic!("failed") };
        assert_eq!(pids.all().len(), 2);
        route.gate.cold_starts().dispatched();
        permit.first_byte();
        let reason = route.records()[0].reason.clone().unwrap();
        let expected = if dies {
            "the command was killed by SIGKILL while waking"
        } else {
            "the target was not awake within 5s"
        };
        assert!(reason.starts_with(expected), "{reason}");
        assert_eq!(kinds(&route), [ColdStartKind::ColdStart; 2]);
        drop(permit);
        route.end().await;
    }
}

#[tokio::test]
async fn abandoned_wake_goes_back_to_sleep() {
    let (route, pids) = sleeper(&["--wake-time", "50ms"]);
    answered(&route).await;
    route.status("sleeping").await;
    let mut ended = route.store.changed();
    drop(route.hold());
    within(ended.changed()).await.unwrap();
    let record = route.records().remove(0);
    assert_eq!((record.kind, record.outcome), (ColdStartKind::Wake, Some(ColdStartOutcome::Abandoned)));
    route.status("sleeping").await;
    assert_eq!((route.gate.target().status(), pids.all().len()), (Status::Sleeping, 1));
    route.end().await;
}

#[tokio::test]
async fn replaced_target_stops_its_sleeping_server() {
    let (route, pids) = sleeper(&[]);
    answered(&route).await;
    route.status("sleeping").await;
    route.targets.send_replace(process(sim(&[])));
    answered(&route).await;
    assert!(!alive(pids.all()[0]));
    route.end().await;
}
