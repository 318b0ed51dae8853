use proptest::prelude::*;

use super::*;

/// One replica at the most, that goes after 10 s without a request, 2 requests at a time, 3 held for 60 s.
const ONE: Settings = Settings {
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

fn of(list: &[(u64, u64)], window: u64, settings: &Settings, start_up: u64) -> Replayed {
    replay(&arrivals(list), window, settings, |_, _| start_up)
}

#[test]
fn one_request_from_zero_by_hand() {
    // It comes at 5 s and waits 20 s; served for 3 s, until 28 s; idle for 10 s, until 38 s.
    let replayed = of(&[(5_000, 3_000)], 100_000, &ONE, 20_000);
    assert_eq!(replayed.fates, [Fate::Served(20_000)]);
    assert_eq!(replayed.gpu, GpuTime { serving: 3_000, idle: 10_000, cold: 20_000 });
    assert_eq!((replayed.cold_starts, replayed.met_cold, replayed.held_peak), (1, 1, 1));
    // Of a window of 30 s, of the 10 s only those from 28 s on.
    let replayed = of(&[(5_000, 3_000)], 30_000, &ONE, 20_000);
    assert_eq!(replayed.gpu, GpuTime { serving: 3_000, idle: 2_000, cold: 20_000 });
}

#[test]
fn the_idle_time_counts_from_the_end_of_the_last_answer() {
    // Ready at 20 s, answered at 23 s, gone at 33 s. Who comes at 32.999 s or at 33 s finds it up; 33.001 s is too late.
    for (second, starts) in [(32_999, 1), (33_000, 1), (33_001, 2)] {
        let replayed = of(&[(0, 3_000), (second, 1_000)], 100_000, &ONE, 20_000);
        assert_eq!(replayed.cold_starts, starts, "{second}");
        assert_eq!(replayed.fates[1], Fate::Served(if starts == 2 { 20_000 } else { 0 }), "{second}");
    }
    // With polls every 15 s it goes at 45 s, the first multiple of 15 from 33 s on.
    let polled = Settings { poll: 15_000, ..ONE };
    for (second, starts) in [(45_000, 1), (45_001, 2)] {
        assert_eq!(of(&[(0, 3_000), (second, 1)], 100_000, &polled, 20_000).cold_starts, starts, "{second}");
    }
}

#[test]
fn what_a_replica_does_not_take_waits_for_room_in_its_order() {
    // Ready at 20 s: the first two go, and the third when the first ends at 21 s.
    let list = [(0, 1_000), (1_000, 2_000), (2_000, 5_000)];
    let replayed = of(&list, 100_000, &ONE, 20_000);
    assert_eq!(replayed.fates, [Fate::Served(20_000), Fate::Served(19_000), Fate::Served(19_000)]);
    // The third from 21 s to 26 s: so the replica serves from 20 s to 26 s, whatever the number of requests.
    assert_eq!(replayed.gpu, GpuTime { serving: 6_000, idle: 10_000, cold: 20_000 });
    assert_eq!((replayed.held_peak, replayed.met_cold), (3, 3));
}

#[test]
fn both_bounds_of_holding_hold() {
    // The fourth is refused, since three are held.
    let list = [(0, 1), (1, 1), (2, 1), (3, 1)];
    let replayed = of(&list, 100_000, &ONE, 20_000);
    assert_eq!(replayed.fates[3], Fate::Refused);
    assert_eq!(replayed.held_peak, 3);
    // Those who wait for 15 s are gone at 20 s; the start is seen through, and idles from 20 s to 30 s.
    let impatient = Settings { hold: 15_000, ..ONE };
    let replayed = of(&[(0, 1), (4_000, 1), (5_001, 1)], 100_000, &impatient, 20_000);
    assert_eq!(replayed.fates, [Fate::TimedOut, Fate::TimedOut, Fate::Served(14_999)]);
    let replayed = of(&[(0, 1)], 100_000, &impatient, 20_000);
    assert_eq!(replayed.gpu, GpuTime { serving: 0, idle: 10_000, cold: 20_000 });
    assert_eq!((replayed.cold_starts, &replayed.fates[..]), (1, &[Fate::TimedOut][..]));
}

#[test]
fn a_floor_is_up_from_the_beginning_to_the_end_and_nobody_waits() {
    let floor = Settings { floor: 2, max_replicas: 2, ..ONE };
    let replayed = of(&[(0, 4_000), (1_000, 4_000)], 60_000, &floor, 20_000);
    assert_eq!(replayed.fates, [Fate::Served(0), Fate::Served(0)]);
    // One request each: 4 + 4 s of 2 × 60 s.
    assert_eq!(replayed.gpu, GpuTime { serving: 8_000, idle: 112_000, cold: 0 });
    assert_eq!((replayed.cold_starts, replayed.met_cold), (0, 0));
}

#[test]
fn who_waits_has_more_replicas_started_and_five_minutes_later_they_go() {
    // All take 100 s, one at a time. 1 in flight and 10 held are 5 + 10 = 15, which is 3 replicas of 5.
    let wide =
        Settings { floor: 1, max_replicas: 4, concurrency: 1, hold_requests: 100, hold: 900_000, ..ONE };
    let replayed = of(&[(1, 100_000); 11], 1_000_000, &wide, 20_000);
    // The first look after 1 ms is at 15 s: two more, which a minute allows, are ready at 35 s. 3 in flight and 8 held
    // are 15 + 8 = 23, 4.6 replicas, at most 4: the fourth is asked for at 75 s, and ready at 95 s.
    let waits = |fates: &[Fate]| {
        fates.iter().map(|fate| if let Fate::Served(ms) = fate { *ms } else { u64::MAX }).collect::<Vec<_>>()
    };
    // From then on they end at 100 s, 135 s, 195 s and every 100 s after.
    assert_eq!(
        waits(&replayed.fates),
        [0, 34_999, 34_999, 94_999, 100_000, 134_999, 134_999, 194_999, 200_000, 234_999, 234_999]
    );
    assert_eq!((replayed.replicas_peak, replayed.cold_starts, replayed.met_cold), (4, 0, 0));
    // The last four begin at 195 s, 200.001 s and twice at 235 s. So four were asked for last at 285 s, three at 300 s,
    // two at 330 s: the first goes 300 s after 285 s, and then one a minute, at 645 s and 705 s. The youngest go first.
    let first = 1_000_000;
    let starting = 3 * 20_000;
    let ready = (585_000 - 95_000) + (645_000 - 35_000) + (705_000 - 35_000);
    assert_eq!(replayed.gpu.total(), first + starting + ready);
    assert_eq!((replayed.gpu.serving, replayed.gpu.cold), (11 * 100_000, starting));
}

#[test]
fn every_step_at_one_moment_has_its_order() {
    // At 20 s it is ready, and the one who has waited 20 s gives up: served.
    let patient = Settings { hold: 20_000, ..ONE };
    assert_eq!(of(&[(0, 1)], 100_000, &patient, 20_000).fates, [Fate::Served(20_000)]);
    assert_eq!(of(&[(0, 1)], 100_000, &patient, 20_001).fates, [Fate::TimedOut]);
    // A service that takes no time makes room for the next one at once.
    let single = Settings { concurrency: 1, ..ONE };
    assert_eq!(of(&[(0, 0), (0, 0), (0, 0)], 100_000, &single, 5).fates, [Fate::Served(5); 3]);
    assert!(of(&[], 100_000, &ONE, 5).fates.is_empty());
    assert_eq!(of(&[], 100_000, &ONE, 5).gpu, GpuTime::default());
}

#[test]
fn a_start_up_is_asked_for_by_its_moment() {
    let mut asked = Vec::new();
    let wide = Settings { floor: 1, max_replicas: 4, concurrency: 1, hold_requests: 100, ..ONE };
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
    ) -> Settings {
        Settings {
            floor, max_replicas: (floor + more).max(1), idle, poll, concurrency, hold_requests, hold, target: 2,
        }
    }
}

/// A start-up that depends on its moment, as draws do.
fn varying(at: u64, nth: u64) -> u64 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).wrapping_add(nth * 777) % 45_000
}

proptest! {
    /// Every request has one fate, nobody waits longer than may be, and no more are held than may be.
    #[test]
    fn every_request_has_one_fate(log in logs(), settings in settings(), window in 0..3_000_000_u64) {
        let replayed = replay(&log, window, &settings, varying);
        prop_assert_eq!(replayed.fates.len(), log.len());
        for fate in &replayed.fates {
            if let Fate::Served(waited) = fate {
                prop_assert!(*waited <= settings.hold);
            }
        }
        prop_assert!(replayed.held_peak <= settings.hold_requests);
        prop_assert!(replayed.replicas_peak <= settings.max_replicas);
        prop_assert!(replayed.gpu.total() >= u64::from(settings.floor) * window);
        // A replica that leaves is not in the number, but still up: at most one a minute does.
        prop_assert!(replayed.met_cold >= replayed.cold_starts);
        prop_assert_eq!(replay(&log, window, &settings, varying), replayed, "the same every time");
    }

    /// Work is neither lost nor done twice: with one request at a time, serving takes what the served requests take.
    #[test]
    fn serving_takes_what_the_served_requests_take(log in logs(), settings in settings()) {
        let one_at_a_time = Settings { concurrency: 1, ..settings };
        let replayed = replay(&log, u64::MAX / 2, &Settings { floor: 0, ..one_at_a_time }, varying);
        let served = log.iter().zip(&replayed.fates).filter(|(_, fate)| matches!(fate, Fate::Served(_)));
        let work: u64 = served.map(|(arrival, _)| arrival.service).sum();
        prop_assert_eq!(replayed.gpu.serving, work);
    }

    /// A longer idle time never has more cold starts, nor less GPU time but for the cold starts that it spares, as long
    /// as one replica serves all and nobody gives up. (With several replicas, or requests that are lost, it can: what
    /// was lost keeps nothing up.)
    #[test]
    fn a_longer_idle_time_never_has_more_cold_starts(
        log in logs(),
        settings in settings(),
        longer in 0..60_000_u64,
        start_up in 0..90_000_u64,
    ) {
        let base = Settings { floor: 0, max_replicas: 1, hold: u64::MAX, hold_requests: usize::MAX, ..settings };
        let window = 10_000_000;
        let short = replay(&log, window, &base, |_, _| start_up);
        let long = replay(&log, window, &Settings { idle: base.idle + longer, ..base }, |_, _| start_up);
        prop_assert!(long.cold_starts <= short.cold_starts);
        prop_assert!(long.gpu.cold <= short.gpu.cold);
        prop_assert_eq!(short.gpu.cold, short.cold_starts as u64 * start_up);
    }

    /// More room to hold never refuses more, and more patience never lets fewer be served, from one cold start.
    #[test]
    fn more_room_to_hold_never_refuses_more(log in logs(), settings in settings(), more in 0..5_usize) {
        let base = Settings { floor: 0, max_replicas: 1, hold: u64::MAX, idle: u64::MAX, ..settings };
        let refused = |settings: &Settings| {
            replay(&log, 0, settings, |_, _| 30_000).fates.iter().filter(|fate| **fate == Fate::Refused).count()
        };
        let roomier = Settings { hold_requests: base.hold_requests + more, ..base };
        prop_assert!(refused(&roomier) <= refused(&base));
    }

    /// A floor of one is never at zero: nobody meets a cold start.
    #[test]
    fn with_a_floor_nobody_meets_a_cold_start(log in logs(), settings in settings()) {
        let floor = Settings { floor: settings.floor.max(1), ..settings };
        let replayed = replay(&log, 0, &floor, varying);
        prop_assert_eq!((replayed.met_cold, replayed.cold_starts), (0, 0));
    }
}
