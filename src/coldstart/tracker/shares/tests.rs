use proptest::prelude::*;
use tokio::time::advance;

use super::{super::FirstAnswer, *};
use crate::coldstart::ColdStarts;

fn tracker() -> Tracker {
    Tracker::new("tiny".into(), ColdStarts::new(|_| {}))
}

async fn advance_ms(ms: u64) -> Instant {
    advance(Duration::from_millis(ms)).await;
    Instant::now()
}

fn shares(tracker: &Tracker, times: &[(Instant, Instant)]) -> String {
    let shares = tracker.shares(times);
    let shares = shares.iter().map(|(phase, share)| format!("{} {}", phase.name(), share.as_millis()));
    shares.collect::<Vec<_>>().join(", ")
}

#[tokio::test(start_paused = true)]
async fn late_request_shares_the_remaining_phases() {
    let tracker = tracker();
    let first = Instant::now();
    tracker.begin(first, 1);
    advance_ms(1).await;
    tracker.mark(Phase::Signal);
    advance_ms(20).await;
    tracker.mark(Phase::Start);
    let second = advance_ms(2000).await;
    let ready = advance_ms(1000).await;
    tracker.ready(None);
    let sent = advance_ms(2).await;
    tracker.dispatched();
    let last = advance_ms(40).await;
    let whole = "signal 1, start 20, load 3000, dispatch 2";
    assert_eq!(shares(&tracker, &[(first, sent)]), whole, "while it runs");
    let id = tracker.first_byte(FirstAnswer::streamed).unwrap();
    assert_eq!(
        (Some(id), shares(&tracker, &[(first, sent)])),
        (tracker.latest_id(), whole.into()),
        "while a token is missing"
    );
    advance_ms(10).await;
    tracker.first_token(id);
    assert_eq!(
        (tracker.latest_id(), shares(&tracker, &[(first, sent)])),
        (Some(id), whole.into()),
        "when it is over"
    );
    assert_eq!(
        shares(&tracker, &[(second, last)]),
        "load 1000, dispatch 2",
        "the other 40 ms waited for room"
    );
    assert_eq!(shares(&tracker, &[(ready, sent), (sent, last)]), "dispatch 2");
    assert_eq!(shares(&tracker, &[(sent, last)]), "");

    // Two cold starts in a row.
    let again = advance_ms(100).await;
    tracker.begin(again, 1);
    advance_ms(5).await;
    tracker.mark(Phase::Signal);
    let end = advance_ms(95).await;
    tracker.ready(None);
    assert_eq!(shares(&tracker, &[(second, sent), (again, end)]), "signal 5, load 1095, dispatch 2");
}

/// The record has the phase as well.
#[tokio::test(start_paused = true)]
async fn phase_of_no_duration_has_a_share_of_zero() {
    let tracker = tracker();
    let first = Instant::now();
    tracker.begin(first, 1);
    tracker.mark(Phase::Signal);
    advance_ms(20).await;
    tracker.mark(Phase::Scale);
    tracker.mark(Phase::Create);
    let late = advance_ms(10).await;
    tracker.ready(None);
    let sent = Instant::now();
    tracker.dispatched();
    assert_eq!(shares(&tracker, &[(first, sent)]), "signal 0, scale 20, create 0, load 10, dispatch 0");
    assert_eq!(shares(&tracker, &[(late - Duration::from_millis(5), sent)]), "load 5, dispatch 0");
}

#[tokio::test(start_paused = true)]
async fn token_of_an_earlier_cold_start_is_ignored() {
    let tracker = tracker();
    let mut ids = Vec::new();
    for _ in 0..2 {
        tracker.begin(Instant::now(), 1);
        tracker.ready(None);
        tracker.dispatched();
        ids.push(tracker.first_byte(FirstAnswer::streamed).unwrap());
    }
    tracker.first_token(ids[0]);
    tracker.ended_without_token(ids[0]);
    assert_eq!(
        tracker.current().map(|record| (record.id, record.phase(Phase::FirstToken).cloned())),
        Some((ids[1], None))
    );
    tracker.first_token(ids[1]);
    assert!(tracker.current().is_none());
}

proptest! {
    /// The shares of a wait sum to no more than the wait.
    #[test]
    fn shares_fit_into_the_wait(
        phases in prop::collection::vec(0..500_u64, 6),
        (since, until) in (0..3000_u64, 0..3000_u64),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().start_paused(true).enable_time().build().unwrap();
        runtime.block_on(async {
            let tracker = tracker();
            let began = Instant::now();
            tracker.begin(began, 1);
            for (phase, ms) in Phase::ALL.into_iter().zip(phases) {
                advance_ms(ms).await;
                tracker.mark(phase);
            }
            let (since, until) = (since.min(until), since.max(until));
            let at = |ms| began + Duration::from_millis(ms);
            let sum: Duration = tracker.shares(&[(at(since), at(until))]).iter().map(|(_, share)| *share).sum();
            let total: u64 = (began.elapsed().as_millis() as u64).clamp(since, until) - since;
            // Floating-point milliseconds round by up to a nanosecond per phase.
            prop_assert!(sum.abs_diff(Duration::from_millis(total)) < Duration::from_nanos(100), "{sum:?} of {total}");
            Ok(())
        })?;
    }
}
