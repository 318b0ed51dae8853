//! History on a paused clock.

use std::time::Duration;

use http::Method;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::time::{Instant, advance};

use super::*;

fn begin(history: &RequestHistory, id: &str) -> Arc<Story> {
    let asked = RequestInfo::new(&Method::POST, "/v1/chat/completions", Some("tiny"));
    history.begin(ArrivedRequest::new(&"tiny".into(), id, Instant::now()), Some(asked))
}

fn record(story: &Story, event: Event) {
    story.record(Instant::now(), event);
}

const HELD: Event = Event::Held { position: 1, why: HoldReason::NothingReady };
const COMPLETED: Ending = Ending { outcome: "completed", admitted: true, status: Some(200), failed: false };
const SATURATED: Ending = Ending { outcome: "saturated", admitted: false, status: Some(429), failed: true };

fn ids(found: &[Sequence]) -> Vec<&str> {
    found.iter().map(|sequence| sequence.request_id.as_str()).collect()
}

#[tokio::test(start_paused = true)]
async fn sequence_has_events_with_their_times() {
    let history = RequestHistory::new(10);
    let story = begin(&history, "mine");
    advance(Duration::from_millis(2)).await;
    record(&story, Event::Held { position: 3, why: HoldReason::NothingReady });
    advance(Duration::from_secs(20)).await;
    record(&story, Event::EarlyAnswer);
    record(&story, Event::Heartbeat);
    advance(Duration::from_secs(10)).await;
    record(&story, Event::Heartbeat);
    let now: Value = serde_json::to_value(history.find("mine")).unwrap();
    assert_eq!(
        (&now[0]["total_ms"], now[0].get("outcome")),
        (&json!(30002.0), None),
        "it can be found while it waits"
    );
    record(&story, Event::Dequeued { cold_start: Some(7) });
    record(&story, Event::dispatched("10.0.0.1:8000"));
    advance(Duration::from_millis(5)).await;
    record(&story, Event::dispatch_failed("10.0.0.1:8000", "cannot connect"));
    record(&story, HELD);
    advance(Duration::from_millis(50)).await;
    record(&story, Event::Dequeued { cold_start: None });
    record(&story, Event::dispatched("10.0.0.2:8000"));
    advance(Duration::from_millis(40)).await;
    record(&story, Event::FirstByte { status: 200 });
    record(&story, Event::FirstToken);
    let waits = story.waits();
    assert_eq!(
        waits.iter().map(|(since, until)| *until - *since).sum::<Duration>(),
        Duration::from_millis(30_050)
    );
    advance(Duration::from_millis(3)).await;
    history.end(story, COMPLETED);
    let [sequence] = history.find("mine").try_into().unwrap();
    let mut document = serde_json::to_value(&sequence).unwrap();
    document["arrived_at"].take();
    assert_eq!(
        document,
        json!({
            "request_id": "mine", "route": "tiny", "method": "POST", "path": "/v1/chat/completions", "model": "tiny",
            "cold_start": 7, "arrived_at": null, "admitted": true, "outcome": "completed", "status": 200,
            "total_ms": 30100.0, "heartbeats": {"count": 2, "last_ms": 30002.0},
            "events": [
                {"at_ms": 0.0, "event": "arrived"},
                {"at_ms": 2.0, "event": "held", "position": 3, "why": "nothing_ready"},
                {"at_ms": 20002.0, "event": "early_answer"},
                {"at_ms": 30002.0, "event": "dispatched", "endpoint": "10.0.0.1:8000"},
                {"at_ms": 30007.0, "event": "dispatch_failed", "endpoint": "10.0.0.1:8000", "reason": "cannot connect"},
                {"at_ms": 30007.0, "event": "held", "position": 1, "why": "dispatch_failed"},
                {"at_ms": 30057.0, "event": "dispatched", "endpoint": "10.0.0.2:8000"},
                {"at_ms": 30097.0, "event": "first_byte", "status": 200},
                {"at_ms": 30097.0, "event": "first_token"},
                {"at_ms": 30100.0, "event": "ended", "outcome": "completed", "status": 200},
            ],
        }),
        "2 + 20,000 + 10,000 + 5 + 50 + 40 + 3"
    );
}

#[tokio::test(start_paused = true)]
async fn refusals_evict_no_request_that_waited() {
    let history = RequestHistory::new(3);
    for id in ["a", "b", "c", "d"] {
        let story = begin(&history, id);
        record(&story, HELD);
        history.end(story, COMPLETED);
        advance(Duration::from_secs(1)).await;
    }
    for _ in 0..100 {
        history.end(begin(&history, "flood"), SATURATED);
    }
    let running = begin(&history, "d");
    assert_eq!(ids(&history.recent(Query::default(), 4)), ["flood", "flood", "flood", "d"]);
    let ended = |outcome| ids(&history.recent(Query { outcome: Some(outcome), route: None }, 9)).join(" ");
    let outcomes = ["completed", "saturated", "failed", "running", "client_gone"].map(ended);
    assert_eq!(outcomes, ["d c b", "flood flood flood", "flood flood flood", "d", ""]);
    assert!(history.recent(Query { route: Some("other"), outcome: None }, 9).is_empty());
    assert_eq!(
        history.find("d").iter().map(|found| found.outcome).collect::<Vec<_>>(),
        [None, Some("completed")]
    );
    assert!(history.find("a").is_empty());
    let kept = history.kept();
    assert_eq!((kept.running, kept.waited.count, kept.at_once.count), (1, 3, 3));
    assert!(kept.explain().contains("the last 3 that waited (now 3, since "), "{}", kept.explain());
    history.end(running, COMPLETED);
    history.set_max(1);
    assert_eq!(
        ids(&history.recent(Query::default(), 9)),
        ["d", "d"],
        "one that waited, and one that did not"
    );
    history.set_max(0);
    history.end(begin(&history, "x"), SATURATED);
    begin(&history, "y");
    assert_eq!((history.kept().running, history.bytes()), (0, 0));
    assert!(history.kept().explain().contains("`history.requests` is 0"));
}

#[tokio::test(start_paused = true)]
async fn texts_of_clients_are_bounded() {
    let history = RequestHistory::new(100);
    let long = "ü".repeat(5000);
    let asked = RequestInfo::new(&Method::from_bytes(&[b'X'; 5000]).unwrap(), &long, Some(&long));
    let story = history.begin(ArrivedRequest::new(&"tiny".into(), &long, Instant::now()), Some(asked));
    story.set_reason(&long);
    for _ in 0..1000 {
        record(&story, HELD);
        record(&story, Event::Dequeued { cold_start: None });
        record(&story, Event::dispatch_failed(&long, &long));
    }
    assert!(story.waits().len() <= 16);
    history.end(story, SATURATED);
    let [sequence] = history.find(&long).try_into().unwrap();
    assert_eq!((sequence.events.len(), sequence.left_out), (1 + 24 + 1, 2000 - 24));
    assert_eq!(sequence.events[1].event, HELD, "the first are kept");
    assert!(
        history.bytes() < 5 * RequestHistory::MEAN_STORY_BYTES,
        "the largest possible story: {}",
        history.bytes()
    );
}

proptest! {
    /// Each ring stays within its bounds, in number and in bytes, and counts its bytes correctly.
    #[test]
    fn memory_of_the_history_is_bounded(
        max in 0..20_usize,
        lives in prop::collection::vec((0..40_usize, any::<bool>(), 0..600_usize), 0..120),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().start_paused(true).enable_time().build().unwrap();
        runtime.block_on(async {
            let history = RequestHistory::new(max);
            for (events, waits, text) in lives {
                let story = begin(&history, &"i".repeat(text));
                for _ in 0..events {
                    record(&story, Event::dispatch_failed(&"e".repeat(text), &"r".repeat(text)));
                }
                if waits {
                    record(&story, HELD);
                }
                history.end(story, COMPLETED);
                let kept = history.kept();
                prop_assert!(kept.waited.count <= max && kept.at_once.count <= max);
                prop_assert!(history.bytes() <= 2 * max * RequestHistory::MEAN_STORY_BYTES);
                let there: usize = history.all(|_| true).iter().map(|story| story.bytes()).sum();
                prop_assert_eq!(history.bytes(), there);
                prop_assert_eq!(kept.running, 0);
            }
            Ok(())
        })?;
    }
}

#[tokio::test(start_paused = true)]
async fn missing_reason_is_derived_from_the_events() {
    let history = RequestHistory::new(100);
    let reason_of = |outcome, status, happened: &[Event]| {
        let story = begin(&history, "x");
        happened.iter().for_each(|event| record(&story, event.clone()));
        history.end(story, Ending { outcome, admitted: true, status, failed: true });
        history.find("x")[0].reason.clone().unwrap_or_default()
    };
    let sent = Event::Dispatched { endpoint: "e".into() };
    let first_byte = Event::FirstByte { status: 200 };
    for (outcome, status, happened, reason) in [
        ("client_gone", None, vec![HELD], "The client disconnected while the request was held."),
        (
            "client_gone",
            Some(200),
            vec![HELD, Event::EarlyAnswer],
            "The client disconnected while the request was held.",
        ),
        ("client_gone", None, vec![HELD, sent.clone()], "The client disconnected before the answer began."),
        ("client_gone", Some(200), vec![sent, first_byte], "The client disconnected during the answer."),
        ("client_gone", None, vec![], "The client disconnected before the answer began."),
        ("draining", Some(200), vec![], "This replica stopped during the answer."),
        ("completed", Some(503), vec![], "The model server answered 503."),
    ] {
        assert_eq!(reason_of(outcome, status, &happened), reason);
    }
}
