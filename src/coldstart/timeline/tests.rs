//! Timelines from clocks that disagree.

use proptest::prelude::*;

use super::*;

const CLOCKS: [&str; 2] = ["control-plane", "node-0"];

/// An event at `at`, observed `lag` later, with the stamp of a clock.
#[derive(Clone, Debug)]
struct StampedEvent {
    phase: Phase,
    at: u64,
    lag: u64,
    clock: Option<(usize, u64)>,
}

struct TimelineTest {
    began: Instant,
    wall: SystemTime,
}

impl TimelineTest {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            wall: SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_123),
        }
    }

    fn ms(&self, ms: u64) -> Instant {
        self.began + Duration::from_millis(ms)
    }

    /// Stamps an event by a clock that is `ahead` milliseconds.
    fn stamp(&self, clock: &str, at: u64, ahead: i64, resolution: u64) -> Stamp {
        let written = (1_800_000_000_123 + at).checked_add_signed(ahead).unwrap() / resolution * resolution;
        Stamp {
            time: SystemTime::UNIX_EPOCH + Duration::from_millis(written),
            resolution: Duration::from_millis(resolution),
            clock: clock.into(),
        }
    }

    fn spans(&self, ours: &[(Phase, Instant)], seen: &[(Phase, Observation)]) -> Vec<PhaseSpan> {
        let observed = seen.iter().map(|(phase, seen)| (*phase, seen)).collect();
        Timeline {
            began: self.began,
            wall: self.wall,
            own_marks: ours,
            observed,
            parts: Vec::new(),
            running: None,
        }
        .spans()
    }
}

fn ends(spans: &[PhaseSpan]) -> Vec<(Phase, f64, f64)> {
    spans
        .iter()
        .map(|span| (span.name, span.start_ms + span.duration_ms, span.early_ms.unwrap_or_default()))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn stamps_narrow_late_observations() {
    let scene = TimelineTest::new();
    let seen = |phase, at, seen: u64| {
        (phase, Observation { at: scene.ms(seen), stamp: Some(scene.stamp("node-0", at, 5000, 1)) })
    };
    let ours = [(Phase::Signal, scene.ms(100)), (Phase::Load, scene.ms(9000))];
    // The clock is 5 s ahead. The start was observed at once, which bounds the offset; the pull, 2 s late.
    let spans = scene.spans(&ours, &[seen(Phase::Pull, 4000, 6000), seen(Phase::Start, 7000, 7000)]);
    // Nothing precedes the signal at 100, so the offset is at most 9001 - 100: the start is after 12000 - 8901.
    let expected = [
        (Phase::Signal, 100.0, 0.0),
        (Phase::Pull, 4001.0, 3901.0),
        (Phase::Start, 7000.0, 3901.0),
        (Phase::Load, 9000.0, 0.0),
    ];
    assert_eq!(ends(&spans), expected);
}

#[tokio::test(start_paused = true)]
async fn inconsistent_clock_is_ignored() {
    let scene = TimelineTest::new();
    let seen = |phase, at, ahead| {
        (phase, Observation { at: scene.ms(at), stamp: Some(scene.stamp("node-0", at, ahead, 1)) })
    };
    // The clock was set back by 50 s between the two.
    let spans = scene.spans(&[], &[seen(Phase::Pull, 1000, 0), seen(Phase::Start, 2000, -50_000)]);
    assert_eq!(ends(&spans), [(Phase::Pull, 1000.0, 1000.0), (Phase::Start, 2000.0, 2000.0)]);
}

fn truths() -> impl Strategy<Value = Vec<StampedEvent>> {
    let phases = proptest::sample::subsequence(Phase::ALL.to_vec(), 1..=Phase::ALL.len());
    phases.prop_flat_map(|phases| {
        let one = (
            0..9000u64,
            0..4000u64,
            prop::option::of((0..CLOCKS.len(), prop::sample::select(vec![1, 1000]))),
        );
        let all = proptest::collection::vec(one, phases.len());
        all.prop_map(move |mut all| {
            let mut times: Vec<_> = all.iter().map(|(at, ..)| *at).collect();
            times.sort_unstable();
            let all = all.drain(..).zip(times).zip(phases.clone());
            all.map(|(((_, lag, clock), at), phase)| StampedEvent { phase, at, lag, clock }).collect()
        })
    })
}

proptest! {
    #[test]
    fn phases_contain_the_true_ends(
        truths in truths(), ahead in [-9000..9000i64, -9000..9000i64], exact in any::<u16>()
    ) {
        let scene = TimelineTest::new();
        let (mut ours, mut seen) = (Vec::new(), Vec::new());
        for (index, truth) in truths.iter().enumerate() {
            if exact & (1 << index) != 0 {
                ours.push((truth.phase, scene.ms(truth.at)));
                continue;
            }
            let stamp = truth.clock.map(|(clock, resolution)| {
                scene.stamp(CLOCKS[clock], truth.at, ahead[clock], resolution)
            });
            seen.push((truth.phase, Observation { at: scene.ms(truth.at + truth.lag), stamp }));
        }
        let spans = scene.spans(&ours, &seen);
        prop_assert_eq!(spans.len(), truths.len(), "each known phase once");
        let mut end = 0.0;
        for (span, truth) in spans.iter().zip(&truths) {
            prop_assert_eq!(span.name, truth.phase);
            prop_assert!((span.start_ms - end).abs() < 1e-6 && span.duration_ms >= 0.0, "{:?}", spans);
            end = span.start_ms + span.duration_ms;
            let early = span.early_ms.unwrap_or_default();
            prop_assert!(early >= 0.0);
            // The true end is within the reported interval.
            prop_assert!(
                truth.at as f64 <= end + 1e-6 && end - early <= truth.at as f64 + 1e-6,
                "{} at {} is not in {}..{}: {:?}", span.name.name(), truth.at, end - early, end, spans
            );
        }
        let sum: f64 = spans.iter().map(|span| span.duration_ms).sum();
        prop_assert!((sum - end).abs() < 1e-6);
    }

    #[test]
    fn arbitrary_events_give_consecutive_phases(
        ours in proptest::collection::vec((0..11usize, 0..9000u64), 0..11),
        seen in proptest::collection::vec((0..11usize, 0..9000u64, prop::option::of((0..2usize, -99_000..99_000i64))), 0..20),
        parts in proptest::collection::vec((0..8usize, prop::option::of(0..9000u64), 0..9000u64), 0..8),
        until in 0..9000u64,
    ) {
        let scene = TimelineTest::new();
        let ours: BTreeMap<_, _> = ours.into_iter().map(|(phase, ms)| (Phase::ALL[phase], scene.ms(ms))).collect();
        let ours: Vec<_> = ours.into_iter().collect();
        let seen: Vec<_> = seen.into_iter().map(|(phase, ms, stamp)| {
            let stamp = stamp.map(|(clock, ahead)| scene.stamp(CLOCKS[clock], 99_000, ahead, 1000));
            (Phase::ALL[phase], Observation { at: scene.ms(ms), stamp })
        }).collect();
        let parts: Vec<_> = parts.into_iter().map(|(part, start, end)| PartObservation {
            part: super::super::Part::ALL[part],
            start: start.map(|ms| scene.ms(ms)),
            end: scene.ms(end),
        }).collect();
        let spans = Timeline {
            began: scene.began,
            wall: scene.wall,
            own_marks: &ours,
            observed: seen.iter().map(|(phase, seen)| (*phase, seen)).collect(),
            parts: parts.iter().collect(),
            running: Some((Phase::FirstToken, scene.ms(until))),
        }.spans();
        let mut end = 0.0;
        for span in &spans {
            prop_assert!((span.start_ms - end).abs() < 1e-6 && span.duration_ms >= 0.0, "{:?}", spans);
            let mut inside = span.start_ms;
            end = span.start_ms + span.duration_ms;
            for part in &span.parts {
                prop_assert!(part.start_ms >= inside - 1e-6 && part.duration_ms > 0.0, "{:?}", spans);
                inside = part.start_ms + part.duration_ms;
            }
            prop_assert!(inside <= end + 1e-6);
        }
    }
}
