//! Spans of the cold-start phases that a held request waited for.
//!
//! Taken from the record of the cold start and clipped to the hold, so that every held request has them. The request
//! that caused the cold start may belong to another trace.

use std::time::Duration;

use tokio::time::Instant;

use super::describe::fail;
use crate::{
    coldstart::{ColdStart, ColdStartOutcome, Phase, Tracker},
    telemetry::traces::{Span, SpanDirection, names},
};

/// Returns spans of the phases that overlap with `hold`, and of their parts. Phases after the first dispatch belong to the
/// dispatched request and are omitted.
pub(super) fn of(tracker: &Tracker, hold: &mut Span) -> Vec<Span> {
    let mut spans = Vec::new();
    for (began, record) in tracker.last_two() {
        let before = spans.len();
        add(&mut spans, hold, began, &record);
        if spans.len() > before {
            hold.set(names::COLD_START_ID, i64::try_from(record.id).unwrap_or(i64::MAX));
            if let Some(trace) = &record.trace_id {
                hold.set(names::COLD_START_TRACE, trace.to_string());
            }
            if let Some(pod) = &record.pod {
                hold.set(names::POD, pod.to_string());
            }
        }
    }
    spans
}

fn add(spans: &mut Vec<Span>, hold: &Span, began: Instant, record: &ColdStart) {
    let until_sent = record.phases.iter().filter(|phase| phase.name <= Phase::Dispatch);
    for phase in until_sent {
        let bounds = (hold.start, hold.end);
        let name = format!("{}.{}", names::PHASE, phase.name.name());
        let Some(mut span) = within(bounds, began, (phase.start_ms, phase.duration_ms), name, hold.id) else {
            continue;
        };
        if let Some(early) = phase.early_ms {
            span.set(names::EARLY_MS, early);
        }
        if phase.unfinished && record.outcome == Some(ColdStartOutcome::Failed) {
            fail(&mut span, "cold_start_failed");
        }
        let bounds = (span.start, span.end);
        let parts = phase.parts.iter().filter_map(|part| {
            let name = format!("{}.{}", span.name, part.name.name());
            within(bounds, began, (part.start_ms, part.duration_ms), name, span.id)
        });
        let parts: Vec<_> = parts.collect();
        spans.push(span);
        spans.extend(parts);
    }
}

/// Clips a phase to bounds. Returns `None` if the overlap is empty.
fn within(
    (start, end): (Instant, Instant),
    began: Instant,
    (from_ms, took_ms): (f64, f64),
    name: String,
    parent: u64,
) -> Option<Span> {
    let at = |ms: f64| began + Duration::from_secs_f64(ms.max(0.0) / 1e3);
    let (from, to) = (at(from_ms), at(from_ms + took_ms));
    if to < start || from > end || (from < to && (to == start || from == end)) {
        return None;
    }
    let mut span = Span::new(name.into(), SpanDirection::Internal, parent, from.max(start));
    span.end = to.min(end);
    Some(span)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::{
        coldstart::{ColdStarts, FirstAnswer, Part},
        state::PartObservation,
    };

    fn names(spans: &[Span]) -> Vec<String> {
        spans.iter().map(|span| span.name.to_string()).collect()
    }

    /// 1 s signal, 2 s start, 10 s load with 3 s of weights 1 s into it, dispatched at once; its answer after 5 s.
    async fn cold_start(tracker: &Tracker) -> Instant {
        let second = |count| advance(Duration::from_secs(count));
        let began = Instant::now();
        tracker.begin(began, 1);
        second(1).await;
        tracker.mark(Phase::Signal);
        second(2).await;
        tracker.mark(Phase::Start);
        second(1).await;
        let start = Some(Instant::now());
        second(3).await;
        tracker.record_part(PartObservation { part: Part::Weights, start, end: Instant::now() });
        second(6).await;
        tracker.ready(None);
        tracker.dispatched();
        second(5).await;
        tracker.first_byte(FirstAnswer::whole);
        began
    }

    fn held(from: Instant, to: Instant) -> Span {
        let mut hold = Span::new(names::HOLD.into(), SpanDirection::Internal, 1, from);
        hold.end = to;
        hold
    }

    #[tokio::test(start_paused = true)]
    async fn phase_spans_lie_within_the_hold() {
        let tracker = Tracker::new("tiny".into(), ColdStarts::new(|_| {}));
        let began = cold_start(&tracker).await;
        let at = |seconds| began + Duration::from_secs(seconds);

        let mut whole = held(began, at(13));
        let spans = of(&tracker, &mut whole);
        let expected = [
            "cold_start.signal",
            "cold_start.start",
            "cold_start.load",
            "cold_start.load.weights",
            "cold_start.dispatch",
        ];
        assert_eq!(names(&spans), expected, "the first byte is of the one that was sent");
        let times: Vec<_> = spans.iter().map(|span| (span.start - began, span.end - began)).collect();
        let seconds = |from, to| (Duration::from_secs(from), Duration::from_secs(to));
        assert_eq!(times, [(0, 1), (1, 3), (3, 13), (4, 7), (13, 13)].map(|(from, to)| seconds(from, to)));
        assert!(spans.iter().all(|span| (span.parent == whole.id) != span.name.ends_with("weights")));
        assert_eq!(spans[3].parent, spans[2].id);
        assert!(whole.has_attribute(names::COLD_START_ID));

        // A request that arrived and disconnected while weights were read.
        let mut late = held(at(5), at(6));
        let spans = of(&tracker, &mut late);
        assert_eq!(names(&spans), ["cold_start.load", "cold_start.load.weights"]);
        assert!(spans.iter().all(|span| (span.start, span.end) == (at(5), at(6))));

        // A request held beyond the first dispatch; then requests held only after it.
        assert_eq!(
            names(&of(&tracker, &mut held(at(12), at(17)))),
            ["cold_start.load", "cold_start.dispatch"]
        );
        assert!(of(&tracker, &mut held(at(14), at(17))).is_empty());
        assert!(of(&tracker, &mut held(at(19), at(20))).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn running_and_failed_cold_starts_are_shown() {
        let tracker = Tracker::new("tiny".into(), ColdStarts::new(|_| {}));
        let began = Instant::now();
        tracker.begin(began, 1);
        advance(Duration::from_secs(1)).await;
        tracker.mark(Phase::Signal);
        advance(Duration::from_secs(2)).await;
        let mut left = held(began, Instant::now());
        let spans = of(&tracker, &mut left);
        assert_eq!(spans.len(), 2);
        assert_eq!(spans[1].end - spans[1].start, Duration::from_secs(2), "it has lasted so long");
        assert!(!spans[1].has_attribute(names::ERROR_TYPE));
        tracker.failed("no GPU".into(), Vec::new());
        let spans = of(&tracker, &mut left);
        assert!(spans[1].has_attribute(names::ERROR_TYPE));
    }
}
