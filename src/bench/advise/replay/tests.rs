use proptest::prelude::*;

use super::*;

/// At most one replica, 2 requests at a time, idle time 10 s, up to 3 requests held for 60 s.
const ONE: ReplaySettings = ReplaySettings {
    floor: 0,
    max_replicas: 1,
    idle: 10_000,
    poll: 1,
    concurrency: 2,
    hold_requests: 3,
    hold: 60_000,
    target: 5,
};

fn arrivals(list: &[(u64, u64)]) -> Vec<Arrival> {
    list.iter().map(|(at, service)| Arrival { at: *at, service: *service }).collect()
}

fn of(list: &[(u64, u64)], window: u64, settings: &ReplaySettings, start_up: u64) -> ReplayOutcome {
    replay(&arrivals(list), window, settings, |_, _| start_up)
}

#[test]
fn single_request_from_zero() {
    // Arrives at 5 s, waits 20 s for the start, is served until 28 s; the replica idles until 38 s.
    let replayed = of(&[(5_000, 3_000)], 100_000, &ONE, 20_000);
    assert_eq!(replayed.fates, [RequestFate::Served(20_000)]);
    assert_eq!(replayed.gpu, GpuTime { serving: 3_000, idle: 10_000, cold: 20_000 });
    assert_eq!((replayed.cold_starts, replayed.met_cold, replayed.held_peak), (1, 1, 1));
    // A window of 30 s contains only 2 s of the idle time.
    let replayed = of(&[(5_000, 3_000)], 30_000, &ONE, 20_000);
    assert_eq!(replayed.gpu, GpuTime { serving: 3_000, idle: 2_000, cold: 20_000 });
}

#[test]
fn idle_time_starts_at_the_end_of_the_answer() {
    // Ready at 20 s, answered at 23 s, stopped at 33 s. An arrival at 33 s is processed before the stop.
    for (second, starts) in [(32_999, 1), (33_000, 1), (33_001, 2)] {
        let replayed = of(&[(0, 3_000), (second, 1_000)], 100_000, &ONE, 20_000);
        assert_eq!(replayed.cold_starts, starts, "{second}");
        assert_eq!(replayed.fates[1], RequestFate::Served(if starts == 2 { 20_000 } else { 0 }), "{second}");
    }
    // With polls every 15 s the replica stops at 45 s, the first multiple of 15 s after 33 s.
    let polled = ReplaySettings { poll: 15_000, ..ONE };
    for (second, starts) in [(45_000, 1), (45_001, 2)] {
        assert_eq!(of(&[(0, 3_000), (second, 1)], 100_000, &polled, 20_000).cold_starts, starts, "{second}");
    }
}

#[test]
fn requests_beyond_concurrency_wait_in_order() {
    // Ready at 20 s: dispatches two requests, and the third when the first ends at 21 s.
    let list = [(0, 1_000), (1_000, 2_000), (2_000, 5_000)];
    let replayed = of(&list, 100_000, &ONE, 20_000);
    assert_eq!(
        replayed.fates,
        [RequestFate::Served(20_000), RequestFate::Served(19_000), RequestFate::Served(19_000)]
    );
    // The third runs from 21 s to 26 s: the replica serves from 20 s to 26 s.
    assert_eq!(replayed.gpu, GpuTime { serving: 6_000, idle: 10_000, cold: 20_000 });
    assert_eq!((replayed.held_peak, replayed.met_cold), (3, 3));
}

#[test]
fn hold_limits_reject_and_time_out() {
    // The fourth is rejected: three are held.
    let list = [(0, 1), (1, 1), (2, 1), (3, 1)];
    let replayed = of(&list, 100_000, &ONE, 20_000);
    assert_eq!(replayed.fates[3], RequestFate::Rejected);
    assert_eq!(replayed.held_peak, 3);
    // With a hold timeout of 15 s the first two requests are lost at 20 s. The start completes; without requests, the
    // replica idles from 20 s to 30 s.
    let short_hold = ReplaySettings { hold: 15_000, ..ONE };
    let replayed = of(&[(0, 1), (4_000, 1), (5_001, 1)], 100_000, &short_hold, 20_000);
    assert_eq!(replayed.fates, [RequestFate::TimedOut, RequestFate::TimedOut, RequestFate::Served(14_999)]);
    let replayed = of(&[(0, 1)], 100_000, &short_hold, 20_000);
    assert_eq!(replayed.gpu, GpuTime { serving: 0, idle: 10_000, cold: 20_000 });
    assert_eq!((replayed.cold_starts, &replayed.fates[..]), (1, &[RequestFate::TimedOut][..]));
}

#[test]
fn floor_is_always_up_without_waits() {
    let floor = ReplaySettings { floor: 2, max_replicas: 2, ..ONE };
    let replayed = of(&[(0, 4_000), (1_000, 4_000)], 60_000, &floor, 20_000);
    assert_eq!(replayed.fates, [RequestFate::Served(0), RequestFate::Served(0)]);
    // One request per replica: 4 s + 4 s of 2 × 60 s.
    assert_eq!(replayed.gpu, GpuTime { serving: 8_000, idle: 112_000, cold: 0 });
    assert_eq!((replayed.cold_starts, replayed.met_cold), (0, 0));
}

#[test]
fn hpa_scales_up_and_down_after_stabilization() {
    // Each takes 100 s, one per replica. 1 in flight and 10 held: 5 + 10 = 15, which is 3 replicas at target 5.
    let wide = ReplaySettings {
        floor: 1,
        max_replicas: 4,
        concurrency: 1,
        hold_requests: 100,
        hold: 900_000,
        ..ONE
    };
    let replayed = of(&[(1, 100_000); 11], 1_000_000, &wide, 20_000);
    // First sync at 15 s: two more (the limit per minute), ready at 35 s. 3 in flight and 8 held: 15 + 8 = 23, which is 4.6
    // replicas, capped at 4: the fourth is started at 75 s and ready at 95 s.
    let waits = |fates: &[RequestFate]| {
        fates
            .iter()
            .map(|fate| if let RequestFate::Served(ms) = fate { *ms } else { u64::MAX })
            .collect::<Vec<_>>()
    };
    // Requests end at 100 s, 135 s, 195 s and every 100 s after.
    assert_eq!(
        waits(&replayed.fates),
        [0, 34_999, 34_999, 94_999, 100_000, 134_999, 134_999, 194_999, 200_000, 234_999, 234_999]
    );
    assert_eq!((replayed.replicas_peak, replayed.cold_starts, replayed.met_cold), (4, 0, 0));
    // The last four start at 195 s, 200.001 s and twice at 235 s. The last recommendation of four replicas is at 285 s, of
    // three at 300 s, of two at 330 s. So the first stops 300 s after 285 s, then one per minute, at 645 s and 705 s,
    // youngest first.
    let first = 1_000_000;
    let starting = 3 * 20_000;
    let ready = (585_000 - 95_000) + (645_000 - 35_000) + (705_000 - 35_000);
    assert_eq!(replayed.gpu.total(), first + starting + ready);
    assert_eq!((replayed.gpu.serving, replayed.gpu.cold), (11 * 100_000, starting));
}

#[test]
fn simultaneous_events_are_ordered() {
    // Ready and hold timeout, both at 20 s: served.
    let hold_20s = ReplaySettings { hold: 20_000, ..ONE };
    assert_eq!(of(&[(0, 1)], 100_000, &hold_20s, 20_000).fates, [RequestFate::Served(20_000)]);
    assert_eq!(of(&[(0, 1)], 100_000, &hold_20s, 20_001).fates, [RequestFate::TimedOut]);
    // A request of zero duration frees its slot immediately.
    let single = ReplaySettings { concurrency: 1, ..ONE };
    assert_eq!(of(&[(0, 0), (0, 0), (0, 0)], 100_000, &single, 5).fates, [RequestFate::Served(5); 3]);
    assert!(of(&[], 100_000, &ONE, 5).fates.is_empty());
    assert_eq!(of(&[], 100_000, &ONE, 5).gpu, GpuTime::default());
}

#[test]
fn start_up_gets_time_and_index() {
    let mut asked = Vec::new();
    let wide = ReplaySettings { floor: 1, max_replicas: 4, concurrency: 1, hold_requests: 100, ..ONE };
    replay(&arrivals(&[(1, 100_000); 11]), 1_000, &wide, |at, nth| {
        asked.push((at, nth));
        20_000
    });
    assert_eq!(asked[..2], [(15_000, 0), (15_000, 1)]);
}

prop_compose! {
    fn logs()(gaps in prop::collection::vec((0..40_000_u64, 0..8_000_u64), 0..120)) -> Vec<Arrival> {
        let mut at = 0;
        let arrival = |(gap, service)| {
            at += gap;
            Arrival { at, service }
        };
        gaps.into_iter().map(arrival).collect()
    }
}

prop_compose! {
    fn settings()(
        (floor, more) in (0..3_u32, 0..3_u32),
        idle in 0..60_000_u64,
        poll in prop::sample::select(vec![1, 15_000_u64]),
        concurrency in 1..4_u32,
        hold_requests in 1..8_usize,
        hold in 0..60_000_u64,
    ) -> ReplaySettings {
        ReplaySettings {
            floor, max_replicas: (floor + more).max(1), idle, poll, concurrency, hold_requests, hold, target: 2,
        }
    }
}

/// Pseudo-random start-up time that depends on `at` and `nth`, like draws.
fn varying(at: u64, nth: u64) -> u64 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).wrapping_add(nth * 777) % 45_000
}

proptest! {
    #[test]
    fn every_request_has_one_fate_within_limits(log in logs(), settings in settings(), window in 0..3_000_000_u64) {
        let replayed = replay(&log, window, &settings, varying);
        prop_assert_eq!(replayed.fates.len(), log.len());
        for fate in &replayed.fates {
            if let RequestFate::Served(waited) = fate {
                prop_assert!(*waited <= settings.hold);
            }
        }
        prop_assert!(replayed.held_peak <= settings.hold_requests);
        prop_assert!(replayed.replicas_peak <= settings.max_replicas);
        prop_assert!(replayed.gpu.total() >= u64::from(settings.floor) * window);
        prop_assert!(replayed.met_cold >= replayed.cold_starts);
        prop_assert_eq!(replay(&log, window, &settings, varying), replayed, "deterministic");
    }

    /// With a concurrency of 1, serving time equals the sum of the durations of served requests.
    #[test]
    fn serving_time_is_the_work_of_served_requests(log in logs(), settings in settings()) {
        let one_at_a_time = ReplaySettings { concurrency: 1, ..settings };
        let replayed = replay(&log, u64::MAX / 2, &ReplaySettings { floor: 0, ..one_at_a_time }, varying);
        let served = log.iter().zip(&replayed.fates).filter(|(_, fate)| matches!(fate, RequestFate::Served(_)));
        let work: u64 = served.map(|(arrival, _)| arrival.service).sum();
        prop_assert_eq!(replayed.gpu.serving, work);
    }

    /// Holds for one replica without lost requests: a lost request does not keep a replica up.
    #[test]
    fn longer_idle_time_never_adds_cold_starts(
        log in logs(),
        settings in settings(),
        longer in 0..60_000_u64,
        start_up in 0..90_000_u64,
    ) {
        let base = ReplaySettings { floor: 0, max_replicas: 1, hold: u64::MAX, hold_requests: usize::MAX, ..settings };
        let window = 10_000_000;
        let short = replay(&log, window, &base, |_, _| start_up);
        let long = replay(&log, window, &ReplaySettings { idle: base.idle + longer, ..base }, |_, _| start_up);
        prop_assert!(long.cold_starts <= short.cold_starts);
        prop_assert!(long.gpu.cold <= short.gpu.cold);
        prop_assert_eq!(short.gpu.cold, short.cold_starts as u64 * start_up);
    }

    #[test]
    fn larger_hold_queue_never_rejects_more(log in logs(), settings in settings(), more in 0..5_usize) {
        let base = ReplaySettings { floor: 0, max_replicas: 1, hold: u64::MAX, idle: u64::MAX, ..settings };
        let rejected = |settings: &ReplaySettings| {
            replay(&log, 0, settings, |_, _| 30_000).fates.iter().filter(|fate| **fate == RequestFate::Rejected).count()
        };
        let larger = ReplaySettings { hold_requests: base.hold_requests + more, ..base };
        prop_assert!(rejected(&larger) <= rejected(&base));
    }

    #[test]
    fn floor_prevents_cold_starts(log in logs(), settings in settings()) {
        let floor = ReplaySettings { floor: settings.floor.max(1), ..settings };
        let replayed = replay(&log, 0, &floor, varying);
        prop_assert_eq!((replayed.met_cold, replayed.cold_starts), (0, 0));
    }
}
