//! The tracker on the paused clock.

use std::time::Duration;

use tokio::time::advance;

use super::{super::Part, *};
use crate::{coldstart::ColdStart, state::Stamp};

fn tracker() -> (Arc<ColdStarts>, Tracker) {
    let store = ColdStarts::new(|_| {});
    (store.clone(), Tracker::new("tiny".into(), store))
}

#[tokio::test(start_paused = true)]
async fn phases_sum_to_the_total() {
    let (store, tracker) = tracker();
    tracker.begin(Instant::now(), 1);
    for (phase, ms) in [(Phase::Signal, 1), (Phase::Start, 20), (Phase::Load, 3000), (Phase::Dispatch, 2)] {
        advance(Duration::from_millis(ms)).await;
        tracker.mark(phase);
    }
    tracker.mark(Phase::Start);
    tracker.record_held(8);
    tracker.record_leave(LeaveReason::Released);
    advance(Duration::from_millis(50)).await;
    tracker.first_byte(FirstAnswer::whole);
    tracker.record_leave(LeaveReason::Released);
    let [record] = store.recent(Some("tiny"), 10).try_into().unwrap();
    assert_eq!(record.outcome, Some(ColdStartOutcome::Completed));
    assert_eq!(record.total_ms, 3073.0, "1 + 20 + 3000 + 2 + 50");
    assert_eq!(record.phases.iter().map(|span| span.duration_ms).sum::<f64>(), record.total_ms);
    assert_eq!(
        record.phases.iter().map(|span| span.start_ms).collect::<Vec<_>>(),
        [0.0, 1.0, 21.0, 3021.0, 3023.0]
    );
    assert_eq!((record.held_peak, record.released), (8, 2), "one left after the end");
    assert_eq!(tracker.estimates().map(|all| all.until_ready.median_ms), Some(3021.0));
    assert!(tracker.current().is_none());
}

#[tokio::test(start_paused = true)]
async fn push_before_or_after_the_start_ends_the_signal() {
    let (store, tracker) = tracker();
    tracker.expect_push(true);
    // This push belongs to an earlier demand.
    tracker.record_push(Instant::now());
    advance(Duration::from_secs(9)).await;
    let began = Instant::now();
    for (push_first, signal) in [(false, None), (true, Some(3.0)), (false, Some(5.0))] {
        let began = if signal.is_some() { Instant::now() } else { began };
        if push_first {
            advance(Duration::from_millis(3)).await;
            tracker.record_push(began);
        }
        advance(Duration::from_millis(2)).await;
        if push_first {
            // This push is sent on another stream.
            tracker.record_push(began);
        }
        tracker.begin(began, 1);
        tracker.signal_acknowledged();
        advance(Duration::from_millis(3)).await;
        if signal.is_some() {
            tracker.record_push(began);
        }
        tracker.ready(None);
        tracker.abandoned();
        let [record] = store.recent(None, 1).try_into().unwrap();
        let span = record.phases.iter().find(|span| span.name == Phase::Signal);
        assert_eq!(span.map(|span| span.duration_ms), signal, "{push_first}");
        assert_eq!(record.phases.last().map(|span| span.name), Some(Phase::Load));
    }
}

#[tokio::test(start_paused = true)]
async fn push_while_a_token_is_awaited_is_for_the_next() {
    let (store, tracker) = tracker();
    tracker.expect_push(true);
    tracker.begin(Instant::now(), 1);
    tracker.ready(None);
    tracker.dispatched();
    tracker.first_byte(FirstAnswer::streamed);
    let began = Instant::now();
    advance(Duration::from_millis(4)).await;
    tracker.record_push(began);
    advance(Duration::from_millis(2)).await;
    tracker.begin(began, 1);
    tracker.failed("no GPU".into(), Vec::new());
    assert_eq!(names(&store.recent(None, 1)[0])[0], "signal 4");
}

#[tokio::test(start_paused = true)]
async fn first_byte_ends_it_only_after_the_dispatch() {
    let (store, tracker) = tracker();
    tracker.begin(Instant::now(), 1);
    tracker.mark(Phase::Signal);
    tracker.first_byte(FirstAnswer::whole);
    assert!(store.recent(None, 10).is_empty(), "an answer of an earlier endpoint");
    advance(Duration::from_secs(7)).await;
    tracker.ready(None);
    advance(Duration::from_secs(1)).await;
    tracker.first_byte(FirstAnswer::whole);
    assert!(store.recent(None, 10).is_empty(), "nothing was dispatched to the new one");
    tracker.dispatched();
    tracker.first_byte(FirstAnswer::whole);
    let [record] = store.recent(None, 10).try_into().unwrap();
    assert_eq!((record.outcome, record.total_ms), (Some(ColdStartOutcome::Completed), 8000.0), "7 + 1");
}

#[tokio::test(start_paused = true)]
async fn failure_names_the_unfinished_phase() {
    let (store, tracker) = tracker();
    tracker.set_target_kind(TargetKind::Process);
    tracker.begin(Instant::now(), 1);
    tracker.signal_acknowledged();
    advance(Duration::from_secs(5)).await;
    tracker.failed("no GPU".into(), vec!["last words".into()]);
    let [record] = store.recent(None, 10).try_into().unwrap();
    assert_eq!(names(&record), ["signal 0", "start 5000 unfinished"]);
    assert_eq!((record.total_ms, record.t_actuation_ms), (5000.0, None));
    assert_eq!(record.reason.as_deref(), Some("no GPU"));
    assert_eq!(tracker.estimates(), None, "failures do not count");
}

#[tokio::test(start_paused = true)]
async fn streamed_answer_ends_it_with_its_first_token() {
    let (store, tracker) = tracker();
    for (has_token, then) in [(true, 30), (false, 0)] {
        tracker.begin(Instant::now(), 1);
        advance(Duration::from_millis(400)).await;
        tracker.ready(None);
        tracker.dispatched();
        advance(Duration::from_millis(20)).await;
        let id = tracker.first_byte(FirstAnswer::streamed).expect("awaits its token");
        assert_eq!(tracker.first_byte(FirstAnswer::streamed), None, "only the first answer counts");
        assert!(tracker.current().is_some() && tracker.phase().is_none(), "held requests wait for room");
        advance(Duration::from_millis(30)).await;
        if has_token {
            tracker.first_token(id);
        }
        tracker.ended_without_token(id);
        let record = store.recent(None, 1).remove(0);
        assert_eq!(record.outcome, Some(ColdStartOutcome::Completed));
        assert_eq!(record.total_ms, f64::from(420 + then));
        assert_eq!(record.t_actuation_ms, Some(400.0));
        assert_eq!(
            (record.t_first_token_ms, record.t_e2e_ms),
            match has_token {
                true => (Some(50.0), Some(450.0)),
                false => (None, None),
            }
        );
    }
    // A missing token does not block the next cold start.
    tracker.begin(Instant::now(), 1);
    tracker.ready(None);
    tracker.dispatched();
    tracker.first_byte(FirstAnswer::streamed);
    tracker.failed("the server died".into(), Vec::new());
    assert_eq!(store.recent(None, 1)[0].outcome, Some(ColdStartOutcome::Completed), "an answer had begun");
}

#[tokio::test(start_paused = true)]
async fn record_names_the_first_ready_pod() {
    let (store, tracker) = tracker();
    tracker.set_target_kind(TargetKind::Cluster);
    tracker.expect_push(true);
    let began = Instant::now();
    advance(Duration::from_millis(2)).await;
    // The push precedes the start of the cold start.
    tracker.record_push(began);
    advance(Duration::from_millis(8)).await;
    tracker.observe(Phase::Scale, Observation::now());
    tracker.begin(began, 1);
    assert_eq!(tracker.phase().map(|(phase, _)| phase), Some(Phase::Create));
    let at = |ms| Observation { at: began + Duration::from_millis(ms), stamp: None };
    let pod = |name: &str, moments: &[(Phase, u64)]| PodStart {
        name: name.into(),
        address: Some(format!("{name}:8000").into()),
        moments: moments.iter().map(|(phase, ms)| (*phase, at(*ms))).collect(),
        ..PodStart::default()
    };
    let slow =
        pod("slow", &[(Phase::Create, 20), (Phase::Schedule, 25), (Phase::Pull, 900), (Phase::Start, 950)]);
    let fast = pod("fast", &[(Phase::Create, 30), (Phase::Schedule, 40), (Phase::Start, 90)]);
    advance(Duration::from_millis(40)).await;
    tracker.observe_pods([PodStart {
        is_pulling: true,
        ..pod("slow", &[(Phase::Create, 20), (Phase::Schedule, 25)])
    }]);
    assert_eq!(tracker.phase().map(|(phase, _)| phase), Some(Phase::Pull));
    tracker.observe_pods([pod("slow", &[(Phase::Create, 20), (Phase::Schedule, 25)])]);
    assert_eq!(tracker.phase().map(|(phase, _)| phase), Some(Phase::Start), "no image is pulled");
    advance(Duration::from_millis(950)).await;
    tracker.observe_pods([slow, fast]);
    assert_eq!(
        tracker.current().and_then(|record| record.pod).as_deref(),
        Some("fast"),
        "both have started; its start came later"
    );
    tracker.mark(Phase::Load);
    advance(Duration::from_millis(7)).await;
    tracker.ready(Some("fast:8000"));
    tracker.dispatched();
    tracker.first_byte(FirstAnswer::whole);
    let [record] = store.recent(None, 10).try_into().unwrap();
    let expected = [
        "signal 2",
        "scale 8",
        "create 20",
        "schedule 10",
        "start 50",
        "load 910",
        "propagate 7",
        "dispatch 0",
        "first_byte 0",
    ];
    assert_eq!(names(&record), expected, "2 + 8 + 20 + 10 + 50 + 910 = 1000");
    assert_eq!((record.total_ms, record.t_actuation_ms), (1007.0, Some(1007.0)));
}

#[tokio::test(start_paused = true)]
async fn events_before_the_first_request_are_ignored() {
    let (store, tracker) = tracker();
    tracker.set_target_kind(TargetKind::Cluster);
    tracker.observe(Phase::Scale, Observation::now());
    let created = Observation::now();
    advance(Duration::from_secs(9)).await;
    tracker.begin(Instant::now(), 1);
    tracker.signal_acknowledged();
    advance(Duration::from_secs(1)).await;
    let stamp = Stamp {
        time: SystemTime::now() - Duration::from_secs(3600),
        resolution: Duration::from_secs(1),
        clock: "node".into(),
    };
    let start = Observation { at: Instant::now(), stamp: Some(stamp) };
    tracker.observe_pods([PodStart {
        name: "a".into(),
        moments: vec![(Phase::Create, created), (Phase::Start, start)],
        ..PodStart::default()
    }]);
    tracker.ready(None);
    tracker.abandoned();
    let [record] = store.recent(None, 10).try_into().unwrap();
    assert_eq!(names(&record), ["signal 0", "load 1000"], "the pod had been running for an hour");
}

#[tokio::test(start_paused = true)]
async fn kinds_have_their_own_estimates() {
    let (_, tracker) = tracker();
    for (kind, seconds) in [(ColdStartKind::ColdStart, 30), (ColdStartKind::Wake, 1)] {
        tracker.set_kind(kind);
        tracker.begin(Instant::now(), 0);
        tracker.signal_acknowledged();
        advance(Duration::from_secs(seconds)).await;
        tracker.ready(None);
        tracker.abandoned();
        assert_eq!(
            tracker.estimates().map(|all| (all.count, all.until_ready.median_ms)),
            Some((1, seconds as f64 * 1e3))
        );
    }
    tracker.set_kind(ColdStartKind::ColdStart);
    assert_eq!(tracker.time_left(), Some(Duration::from_secs(30)));
    tracker.begin(Instant::now(), 0);
    tracker.signal_acknowledged();
    advance(Duration::from_secs(20)).await;
    assert_eq!(tracker.time_left(), Some(Duration::from_secs(10)), "30 - 20");
    advance(Duration::from_secs(20)).await;
    assert_eq!(tracker.time_left(), None, "longer than any in the sample");
}

#[tokio::test(start_paused = true)]
async fn parts_are_within_their_phase() {
    let (store, tracker) = tracker();
    tracker.set_target_kind(TargetKind::Process);
    tracker.begin(Instant::now(), 0);
    tracker.mark(Phase::Signal);
    advance(Duration::from_secs(1)).await;
    tracker.mark(Phase::Start);
    advance(Duration::from_secs(4)).await;
    let now = Instant::now();
    let since = |seconds| Some(now - Duration::from_secs(seconds));
    tracker.record_part(PartObservation { part: Part::Weights, start: since(1), end: now });
    tracker.record_part(PartObservation { part: Part::Weights, start: since(9), end: now });
    advance(Duration::from_secs(2)).await;
    tracker.record_part(PartObservation { part: Part::Warmup, start: None, end: Instant::now() });
    tracker.ready(None);
    tracker.abandoned();
    let [record] = store.recent(None, 10).try_into().unwrap();
    let parts = record.phase(Phase::Load).unwrap().parts.iter();
    let parts: Vec<_> = parts.map(|part| (part.name, part.start_ms, part.duration_ms)).collect();
    assert_eq!(parts, [(Part::Weights, 1000.0, 4000.0), (Part::Warmup, 5000.0, 2000.0)]);
}

#[test]
fn records_in_memory_are_bounded() {
    let (store, tracker) = tracker();
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
        for _ in 0..ColdStarts::MAX_RECORDS + 10 {
            tracker.begin(Instant::now(), 0);
            tracker.abandoned();
        }
    });
    assert_eq!(store.recent(None, usize::MAX).len(), ColdStarts::MAX_RECORDS);
}

fn names(record: &ColdStart) -> Vec<String> {
    assert_eq!(record.phases.iter().map(|span| span.duration_ms).sum::<f64>(), record.total_ms);
    let word = |unfinished| if unfinished { " unfinished" } else { "" };
    record
        .phases
        .iter()
        .map(|span| format!("{} {}{}", span.name.name(), span.duration_ms, word(span.unfinished)))
        .collect()
}
