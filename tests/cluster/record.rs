//! Checks of cold-start records, as users get them: well-formed and accurate.

use std::time::{Duration, SystemTime};

use serde_json::Value;

/// Names of the phases, in order.
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
/// Error of a start time that is written in whole milliseconds.
const ROUNDING_TOLERANCE: Duration = Duration::from_millis(2);
/// Tolerance for sums of floats, in milliseconds.
const SUM_TOLERANCE_MS: f64 = 0.001;

/// Cold-start record.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) value: Value,
    /// Time of the first request according to the record.
    pub(crate) began: SystemTime,
    pub(crate) spans: Vec<RecordSpan>,
}

/// Phase of a record, or a part of one. Times are in milliseconds.
#[derive(Clone, Debug)]
pub(crate) struct RecordSpan {
    pub(crate) name: String,
    pub(crate) start: f64,
    pub(crate) duration: f64,
    /// The end may have been up to this much earlier.
    pub(crate) early: Option<f64>,
    pub(crate) unfinished: bool,
    pub(crate) parts: Vec<RecordSpan>,
}

/// Actual time of an event: at the earliest and at the latest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimeRange(pub(crate) SystemTime, pub(crate) SystemTime);

// === impl TimeRange ===

impl TimeRange {
    /// Interval of a time that is written in whole seconds and was known at `seen`.
    pub(crate) fn written(stamp: SystemTime, seen: SystemTime) -> Self {
        Self(stamp, seen.min(stamp + Duration::from_secs(1)).max(stamp))
    }
}

impl From<SystemTime> for TimeRange {
    fn from(at: SystemTime) -> Self {
        Self(at, at)
    }
}

// === impl Record ===

impl Record {
    /// Parses a record and asserts that it is well-formed: phases follow each other and sum to the total.
    pub(crate) fn read(value: Value) -> Self {
        let began = humantime::parse_rfc3339(value["started_at"].as_str().unwrap()).unwrap();
        let spans = value["phases"].as_array().unwrap().iter().map(RecordSpan::read).collect();
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
                (span.start - cursor).abs() <= SUM_TOLERANCE_MS,
                "{} begins where the last one ends: {text}",
                span.name
            );
            assert!(span.duration >= 0.0, "{} takes its time: {text}", span.name);
            cursor = span.end();
            let mut inner = span.start;
            for part in &span.parts {
                assert!(part.start >= inner - SUM_TOLERANCE_MS, "{} overlaps: {text}", part.name);
                assert!(part.duration > 0.0, "{} takes no time: {text}", part.name);
                inner = part.end();
            }
            assert!(inner <= span.end() + SUM_TOLERANCE_MS, "parts leave {}: {text}", span.name);
        }
        let sum: f64 = self.spans.iter().map(|span| span.duration).sum();
        assert!((sum - self.total()).abs() <= SUM_TOLERANCE_MS, "the phases sum to {sum}: {text}");
        assert!(self.spans.iter().rev().skip(1).all(|span| !span.unfinished), "only the last one: {text}");
    }

    pub(crate) fn total(&self) -> f64 {
        self.value["total_ms"].as_f64().unwrap()
    }

    /// Returns the names of the finished phases.
    pub(crate) fn ended_phase_names(&self) -> Vec<&str> {
        self.spans.iter().filter(|span| !span.unfinished).map(|span| span.name.as_str()).collect()
    }

    pub(crate) fn span(&self, name: &str) -> &RecordSpan {
        let found = self.spans.iter().find(|span| span.name == name);
        found.unwrap_or_else(|| panic!("no {name} in {}", self.value))
    }

    /// Returns the latest possible end of a phase.
    pub(crate) fn end(&self, name: &str) -> SystemTime {
        self.moment(self.span(name).end())
    }

    fn moment(&self, ms: f64) -> SystemTime {
        self.began + Duration::from_secs_f64(ms / 1e3)
    }

    /// Asserts that the end of a phase is accurate: within the interval given by the record, and recorded at most `lag`
    /// late.
    pub(crate) fn assert_phase_end(&self, phase: &str, truth: impl Into<TimeRange>, lag: Duration) {
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
        assert!(truth.0 <= latest + ROUNDING_TOLERANCE, "told too early: {says}");
        assert!(latest <= truth.1 + lag, "told more than {lag:?} late: {says}");
        // Phases that end by Anteroom's own action have no such uncertainty.
        assert!(
            span.early.is_none() || earliest <= truth.1 + ROUNDING_TOLERANCE,
            "it was earlier than is admitted: {says}"
        );
    }

    /// Same as [`Self::assert_phase_end`], for a part of a phase.
    pub(crate) fn assert_part_end(
        &self,
        phase: &str,
        part: &str,
        truth: impl Into<TimeRange>,
        lag: Duration,
    ) {
        let (found, truth) = (self.span(phase).part(part), truth.into());
        let end = self.moment(found.end());
        let says = format!("{part} ended from {} to {}: {}", time(truth.0), time(truth.1), self.value);
        assert!(truth.0 <= end + ROUNDING_TOLERANCE && end <= truth.1 + lag, "{says}");
    }
}

// === impl RecordSpan ===

impl RecordSpan {
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
