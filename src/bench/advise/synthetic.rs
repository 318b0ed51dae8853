//! Generator of the synthetic request log in `docs/traces`: a week of chat of a small team. Integer arithmetic only, so
//! that the output is the same on every machine.

use super::{
    arrivals::{LoggedRequest, RequestLog},
    draw::SplitMix64,
};

const SECOND_MS: u64 = 1_000;
const MINUTE_MS: u64 = 60 * SECOND_MS;
const HOUR_MS: u64 = 60 * MINUTE_MS;
const DAY_MS: u64 = 24 * HOUR_MS;

/// 2026-11-02T00:00:00Z, a Monday, in milliseconds since the epoch.
const MONDAY_EPOCH_MS: i64 = 1_793_577_600_000;

/// Number of people.
const TEAM_SIZE: usize = 12;

/// Probability that an idle person starts a conversation within a minute, per hour of a working day, in millionths.
const WORKDAY_STARTS_PER_MILLION: [u64; 24] = [
    0, 0, 0, 0, 0, 0, 200, 2_500, 11_000, 17_000, 20_000, 18_000, 7_000, 15_000, 19_000, 17_000, 13_000,
    6_000, 2_000, 1_200, 1_500, 900, 300, 0,
];

/// The same for Saturday and Sunday.
const WEEKEND_STARTS_PER_MILLION: [u64; 24] =
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 150, 300, 300, 200, 250, 400, 400, 300, 200, 100, 200, 300, 150, 0, 0];

/// Probability of a follow-up question after an answer, in millionths.
const FOLLOW_UP_PER_MILLION: u64 = 680_000;

/// Largest number of requests in a conversation.
const MAX_CONVERSATION_REQUESTS: usize = 25;

/// Generates a week: working hours with a lunch break, two trainings in which all start at once (Tuesday and Thursday,
/// 14:00), a nightly job on working days (02:30, two requests at a time), and a quiet weekend.
pub fn office_week(seed: u64) -> RequestLog {
    let mut rng = SplitMix64::new(seed);
    let mut requests = Vec::new();
    for day in 0..7_u64 {
        let hours = if day < 5 { &WORKDAY_STARTS_PER_MILLION } else { &WEEKEND_STARTS_PER_MILLION };
        let mut busy_until = [0; TEAM_SIZE];
        for minute in 0..24 * 60 {
            let hour = usize::try_from(minute / 60).unwrap_or_default();
            let from = day * DAY_MS + minute * MINUTE_MS;
            for busy in &mut busy_until {
                if *busy <= from && rng.chance(hours[hour]) {
                    let begins = from + rng.below(MINUTE_MS);
                    *busy = conversation(&mut rng, begins, &mut requests);
                }
            }
        }
        if day == 1 || day == 3 {
            for _ in 0..TEAM_SIZE {
                let begins = day * DAY_MS + 14 * HOUR_MS + rng.below(2 * MINUTE_MS);
                conversation(&mut rng, begins, &mut requests);
            }
        }
        if day < 5 {
            nightly_job(&mut rng, day * DAY_MS + 2 * HOUR_MS + 30 * MINUTE_MS, &mut requests);
        }
    }
    requests.retain(|request: &LoggedRequest| request.at < MONDAY_EPOCH_MS + 7 * i64_of(DAY_MS));
    requests.sort_by_key(|request| (request.at, request.service));
    RequestLog { requests, from: MONDAY_EPOCH_MS, to: MONDAY_EPOCH_MS + 7 * i64_of(DAY_MS) }
}

/// Adds a conversation with pauses to read and write. Returns the end of its last answer.
fn conversation(rng: &mut SplitMix64, begins: u64, requests: &mut Vec<LoggedRequest>) -> u64 {
    let mut at = begins;
    for _ in 0..MAX_CONVERSATION_REQUESTS {
        let service = answer_duration(rng);
        requests.push(LoggedRequest { at: MONDAY_EPOCH_MS + i64_of(at), service: Some(service) });
        at += service;
        if !rng.chance(FOLLOW_UP_PER_MILLION) {
            break;
        }
        at += 12 * SECOND_MS + rng.below(50 * SECOND_MS) + rng.below(50 * SECOND_MS);
    }
    at
}

/// Draws the duration of an answer: 2 s to 14 s, triangular; 10 s to 40 s longer for one in ten.
fn answer_duration(rng: &mut SplitMix64) -> u64 {
    let usual = 2 * SECOND_MS + rng.below(6 * SECOND_MS) + rng.below(6 * SECOND_MS);
    if rng.chance(100_000) { usual + 10 * SECOND_MS + rng.below(30 * SECOND_MS) } else { usual }
}

/// Adds a job of 24 requests, two at a time.
fn nightly_job(rng: &mut SplitMix64, begins: u64, requests: &mut Vec<LoggedRequest>) {
    let mut free = [begins; 2];
    for _ in 0..24 {
        let Some(next) = free.iter_mut().min() else { return };
        let service = 8 * SECOND_MS + rng.below(12 * SECOND_MS);
        requests.push(LoggedRequest { at: MONDAY_EPOCH_MS + i64_of(*next), service: Some(service) });
        *next += service;
    }
}

fn i64_of(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}
