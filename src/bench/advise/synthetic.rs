//! A week of a small team's chat, made up: the trace that ships with the documents, and how it is made.
//!
//! Whole numbers only, so that it is the same on every machine.

use super::{
    arrivals::{Logged, Trace},
    draw::Rng,
};

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// 2026-11-02T00:00:00Z, a Monday, in milliseconds since the epoch.
const MONDAY: i64 = 1_793_577_600_000;

/// People in the team.
const PEOPLE: usize = 12;

/// How likely it is in each hour of a working day that somebody who is not in a conversation begins one in the next
/// minute, in millionths: early birds, a rise to eleven, lunch, the afternoon, a few in the evening.
const WORKDAY: [u64; 24] = [
    0, 0, 0, 0, 0, 0, 200, 2_500, 11_000, 17_000, 20_000, 18_000, 7_000, 15_000, 19_000, 17_000, 13_000,
    6_000, 2_000, 1_200, 1_500, 900, 300, 0,
];

/// The same of Saturday and Sunday.
const WEEKEND: [u64; 24] =
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 150, 300, 300, 200, 250, 400, 400, 300, 200, 100, 200, 300, 150, 0, 0];

/// A conversation goes on after an answer with this chance, in millionths.
const GOES_ON: u64 = 680_000;

/// The longest conversation.
const LONGEST: usize = 25;

/// A week of a team of twelve: day and night, lunch, two trainings in which everybody begins at once (Tuesday and
/// Thursday, 14:00), a nightly job on working days (02:30, two at a time), and a weekend that is nearly empty.
pub fn office_week(seed: u64) -> Trace {
    let mut rng = Rng::new(seed);
    let mut requests = Vec::new();
    for day in 0..7_u64 {
        let hours = if day < 5 { &WORKDAY } else { &WEEKEND };
        let mut busy_until = [0; PEOPLE];
        for minute in 0..24 * 60 {
            let hour = usize::try_from(minute / 60).unwrap_or_default();
            let from = day * DAY + minute * MINUTE;
            for busy in &mut busy_until {
                if *busy <= from && rng.chance(hours[hour]) {
                    let begins = from + rng.below(MINUTE);
                    *busy = conversation(&mut rng, begins, &mut requests);
                }
            }
        }
        if day == 1 || day == 3 {
            for _ in 0..PEOPLE {
                let begins = day * DAY + 14 * HOUR + rng.below(2 * MINUTE);
                conversation(&mut rng, begins, &mut requests);
            }
        }
        if day < 5 {
            job(&mut rng, day * DAY + 2 * HOUR + 30 * MINUTE, &mut requests);
        }
    }
    requests.retain(|request: &Logged| request.at < MONDAY + 7 * i64_of(DAY));
    requests.sort_by_key(|request| (request.at, request.service));
    Trace { requests, from: MONDAY, to: MONDAY + 7 * i64_of(DAY) }
}

/// Questions and answers, with time to read and write between them. Says when the last answer ended.
fn conversation(rng: &mut Rng, begins: u64, requests: &mut Vec<Logged>) -> u64 {
    let mut at = begins;
    for _ in 0..LONGEST {
        let service = answer(rng);
        requests.push(Logged { at: MONDAY + i64_of(at), service: Some(service) });
        at += service;
        if !rng.chance(GOES_ON) {
            break;
        }
        at += 12 * SECOND + rng.below(50 * SECOND) + rng.below(50 * SECOND);
    }
    at
}

/// How long an answer takes: 2 s to 14 s, most of them in the middle, and one in ten is long.
fn answer(rng: &mut Rng) -> u64 {
    let usual = 2 * SECOND + rng.below(6 * SECOND) + rng.below(6 * SECOND);
    if rng.chance(100_000) { usual + 10 * SECOND + rng.below(30 * SECOND) } else { usual }
}

/// 24 documents, two at a time.
fn job(rng: &mut Rng, begins: u64, requests: &mut Vec<Logged>) {
    let mut free = [begins; 2];
    for _ in 0..24 {
        let Some(next) = free.iter_mut().min() else { return };
        let service = 8 * SECOND + rng.below(12 * SECOND);
        requests.push(Logged { at: MONDAY + i64_of(*next), service: Some(service) });
        *next += service;
    }
}

/// A time within a week.
fn i64_of(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}
