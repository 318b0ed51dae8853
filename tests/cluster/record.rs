//! A cold-start record as users get it, and the questions of whether it is well made and whether it is true.

use std::time::{Duration, SystemTime};

use serde_json::Value;

/// The names of phases, in their order.
const PHASES: [&str; 11] = [
    "signal",
    "scale",
    "create",
    "schedule",
    "pull",
    "start",
    "load",
    "propagate",
    "dispatch",
    "first_byte",
    "first_token",
];
/// Of a start that is written down in whole milliseconds.
const ROUNDED: Duration = Duration::from_millis(2);
/// Milliseconds that sums of floats may be off: a microsecond.
const NOTHING: f64 = 0.001;

/// A record.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) value: Value,
    /// The first request, by the record.
    pub(crate) began: SystemTime,
    pub(crate) spans: Vec<Span>,
}

/// A phase of it.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) name: String,
    pub(crate) start: f64,
    pub(crate) duration: f64,
    /// By how much the end may have been earlier.
    pub(crate) early: Option<f64>,
    pub(crate) unfinished: bool,
    pub(crate) parts: Vec<Span>,
}

/// When something really happened: not before the one, and not after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Truth(pub(crate) SystemTime, pub(crate) SystemTime);

// === impl Truth ===

impl Truth {
    /// What was written in whole seconds, and was known at `seen`.
    pub(crate) fn written(stamp: SystemTime, seen: SystemTime) -> Self {
        Self(stamp, seen.min(stamp + Duration::from_secs(1)).max(stamp))
    }
}

impl From<SystemTime> for Truth {
    fn from(at: SystemTime) -> Self {
        Self(at, at)
    }
}

// === impl Record ===

impl Record {
    /// One that is well made: whatever it tells, phases follow each other, and sum to the total.
    pub(crate) fn read(value: Value) -> Self {
        let began = humantime::parse_rfc3339(value["started_at"].as_str().unwrap()).unwrap();
        let spans = value["phases"].as_array().unwrap().iter().map(Span::read).collect();
        let record = Self { value, began, spans };
        record.is_well_made();
        record
    }

    fn is_well_made(&self) {
        let text = &self.value;
        let order = self.spans.iter().map(|span| PHASES.iter().position(|name| *name == span.name).unwrap());
        assert!(order.is_sorted_by(|a, b| a < b), "in order, and each once: {text}");
        let mut cursor = 0.0;
        for span in &self.spans {
            assert!(
                (span.start - cursor).abs() <= NOTHING,
                "{} begins where the last one ends: {text}",
                span.name
            );
            assert!(span.duration >= 0.0, "{} takes its time: {text}", span.name);
            cursor = span.end();
            let mut inner = span.start;
            for part in &span.parts {
                assert!(part.start >= inner - NOTHING, "{} overlaps: {text}", part.name);
                assert!(part.duration > 0.0, "{} takes no time: {text}", part.name);
                inner = part.end();
            }
            assert!(inner <= span.end() + NOTHING, "parts leave {}: {text}", span.name);
        }
        let sum: f64 = self.spans.iter().map(|span| span.duration).sum();
        assert!((sum - self.total()).abs() <= NOTHING, "the phases sum to {sum}: {text}");
        assert!(self.spans.iter().rev().skip(1).all(|span| !span.unfinished), "only the last one: {text}");
    }

    pub(crate) fn total(&self) -> f64 {
        self.value["total_ms"].as_f64().unwrap()
    }

    /// The names of what is over.
    pub(crate) fn over(&self) -> Vec<&str> {
        self.spans.iter().filter(|span| !span.unfinished).map(|span| span.name.as_str()).collect()
    }

    pub(crate) fn span(&self, name: &str) -> &Span {
        let found = self.spans.iter().find(|span| span.name == name);
        found.unwrap_or_else(|| panic!("no {name} in {}", self.value))
    }

    /// The end of a phase, at the latest.
    pub(crate) fn end(&self, name: &str) -> SystemTime {
        self.moment(self.span(name).end())
    }

    fn moment(&self, ms: f64) -> SystemTime {
        self.began + Duration::from_secs_f64(ms / 1e3)
    }

    /// Whether the end of a phase is told as it was: where the record says that it can have been, and no later than
    /// `lag` after it.
    pub(crate) fn tells(&self, phase: &str, truth: impl Into<Truth>, lag: Duration) {
        let (span, truth) = (self.span(phase), truth.into());
        let latest = self.moment(span.end());
        let earliest = self.moment(span.end() - span.early.unwrap_or_default());
        let says = format!(
            "{phase} ended from {} to {}, and is told as from {} to {}: {}",
            time(truth.0),
            time(truth.1),
            time(earliest),
            time(latest),
            self.value
        );
        assert!(truth.0 <= latest + ROUNDED, "told too early: {says}");
        assert!(latest <= truth.1 + lag, "told more than {lag:?} late: {says}");
        // Of a phase that ends by our own doing it is no question how early it may have been.
        assert!(
            span.early.is_none() || earliest <= truth.1 + ROUNDED,
            "it was earlier than is admitted: {says}"
        );
    }

    /// The same of a part.
    pub(crate) fn tells_part(&self, phase: &str, part: &str, truth: impl Into<Truth>, lag: Duration) {
        let (found, truth) = (self.span(phase).part(part), truth.into());
        let end = self.moment(found.end());
        let says = format!("{part} ended from {} to {}: {}", time(truth.0), time(truth.1), self.value);
        assert!(truth.0 <= end + ROUNDED && end <= truth.1 + lag, "{says}");
    }
}

// === impl Span ===

impl Span {
    fn read(value: &Value) -> Self {
        let number = |name: &str| value[name].as_f64();
        Self {
            name: value["name"].as_str().unwrap().to_owned(),
            start: number("start_ms").unwrap(),
            duration: number("duration_ms").unwrap(),
            early: number("early_ms"),
            unfinished: value["unfinished"] == true,
            parts: value["parts"].as_array().into_iter().flatten().map(Self::read).collect(),
        }
    }

    pub(crate) fn end(&self) -> f64 {
        self.start + self.duration
    }

    pub(crate) fn part(&self, name: &str) -> &Self {
        let found = self.parts.iter().find(|part| part.name == name);
        found.unwrap_or_else(|| panic!("no {name} in {self:?}"))
    }
}

fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_micros(at).to_string()
}
