//! What `anteroom bench cold-start` writes as JSON, and `bench compare` reads: schema `anteroom.dev/bench/v1`.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use super::{cost::Cost, summary::Summary};
use crate::coldstart::ColdStart;

/// The name of the schema. A later one that reads differently has another name.
pub const SCHEMA: &str = "anteroom.dev/bench/v1";

/// A run. Readers skip what they do not know.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Run {
    /// [`SCHEMA`].
    pub schema: String,
    /// The version of the program that measured.
    pub anteroom: String,
    /// Wall-clock time of the beginning, RFC 3339.
    pub started_at: String,
    /// What it was started with: of files the name alone, of addresses and commands nothing.
    pub command: Vec<String>,
    /// What the user calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// What measured, and if the proxy was started here, was measured.
    pub machine: Machine,
    /// The route that was woken.
    pub route: String,
    /// Requests a cycle.
    pub burst: usize,
    /// The idle timeout that was set, where the target is ours; in seconds.
    pub idle_s: Option<f64>,
    /// What else was asked for.
    pub settings: Settings,
    /// Somebody stopped it before all cycles were there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub interrupted: bool,
    /// Why it ended before all cycles were there, if nobody stopped it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aborted: Option<String>,
    /// The cycles, in order.
    pub cycles: Vec<Cycle>,
    /// What they come to.
    pub summary: Summary,
}

/// A machine, without its name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Machine {
    /// `linux`, `macos`.
    pub os: String,
    /// `x86_64`, `aarch64`.
    pub arch: String,
    /// How many threads it runs at once.
    pub cpus: usize,
}

/// How it was measured: two runs that differ in one of these may differ for that reason.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Settings {
    /// What was woken: `stand-in` (the embedded default), `own` (of `--config`), `running` (of `--url`).
    pub target: String,
    /// How many cycles were asked for.
    pub cycles: usize,
    /// How the requests of a burst followed each other: `together`, `spread=2s`, `poisson=2.5`, `file`.
    pub arrivals: String,
    /// Of random arrivals.
    pub seed: u64,
    /// How many prompts were asked in turn.
    pub prompts: usize,
    /// `chat` or `completions`.
    pub endpoint: String,
    /// The model that was asked for.
    pub model: Option<String>,
    /// At most so many tokens an answer.
    pub max_tokens: u32,
    /// Whether answers were streamed.
    pub stream: bool,
    /// How long it stayed at zero before each burst, in seconds.
    pub pause_s: f64,
    /// Whether it was stopped by a command of the user's.
    pub stop_command: bool,
    /// The price of an hour of all its GPUs, if one was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_hour_price: Option<f64>,
    /// Of what.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
}

/// From zero, through a burst, to its last answer.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Cycle {
    /// From 1.
    pub number: usize,
    /// Wall-clock time of the first request, RFC 3339.
    pub started_at: String,
    /// From the last answer of the cycle before until the target was seen to be at zero. Absent of the first.
    pub idle_ms: Option<f64>,
    /// Whether it counts.
    pub verdict: Verdict,
    /// Why it does not.
    pub error: Option<String>,
    /// What the clients saw.
    pub requests: Vec<Request>,
    /// The record of the proxy.
    pub cold_start: Option<ColdStart>,
    /// The record beside our own clock. Absent without a token or a record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside_clock: Option<OutsideClock>,
    /// What was paid for. Absent without a record of a cold start that got ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost>,
}

/// What a cycle is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A cold start that somebody was answered after: it counts.
    Cold,
    /// It was up already, or somebody else's request woke it.
    NotCold,
    /// The target did not come up, or nobody was answered.
    Failed,
}

/// A request on the client's clock.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Request {
    /// When it was sent, from the first request of the burst.
    pub sent_ms: f64,
    /// From then until its first token. Absent where the answer was not streamed, or had none.
    pub ttft_ms: Option<f64>,
    /// From then until its answer had ended, for good or bad.
    pub total_ms: f64,
    /// The status of the answer.
    pub status: Option<u16>,
    /// What went wrong with it.
    pub error: Option<String>,
    /// Its `x-request-id`.
    pub request_id: Option<String>,
}

/// The sum of the record's phases beside a clock that the proxy does not know of.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct OutsideClock {
    /// From the first request sent to the first token seen, by the client's clock.
    pub client_ms: f64,
    /// The sum of the record's phases.
    pub record_ms: f64,
    /// How much the record has less than the client, in percent of the client's.
    pub difference_percent: f64,
}

// === impl Run ===

impl Run {
    /// Reads a file.
    ///
    /// # Errors
    /// A sentence that names the file and the way out.
    pub fn read(path: &Path) -> Result<Self, String> {
        let name = path.display();
        let text = fs::read(path).map_err(|error| format!("cannot read {name}: {error}"))?;
        let schema = serde_json::from_slice::<serde_json::Value>(&text).map_err(|error| {
            format!("{name} is not JSON: {error}; it is to be what `bench cold-start --json` wrote")
        })?;
        match schema["schema"].as_str() {
            Some(SCHEMA) => {}
            Some(other) => {
                return Err(format!(
                    "{name} has the schema {other}, and this program reads {SCHEMA}: measure again with this version"
                ));
            }
            None => {
                return Err(format!(
                    "{name} has no \"schema\": it is to be what `bench cold-start --json` wrote"
                ));
            }
        }
        // From the text, so that an error names its place.
        serde_json::from_slice(&text).map_err(|error| format!("{name} is no result of a benchmark: {error}"))
    }

    /// The cycles that count.
    pub fn counted(&self) -> impl Iterator<Item = &Cycle> {
        self.cycles.iter().filter(|cycle| cycle.verdict == Verdict::Cold)
    }
}

// === impl Machine ===

impl Machine {
    /// This one.
    pub fn this() -> Self {
        Self {
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        }
    }
}

// === impl Verdict ===

impl Verdict {
    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::NotCold => "not cold",
            Self::Failed => "failed",
        }
    }
}

// === impl OutsideClock ===

impl OutsideClock {
    /// Of a burst and its record.
    pub fn of(requests: &[Request], record: &ColdStart) -> Option<Self> {
        let tokens = requests.iter().filter_map(|request| Some(request.sent_ms + request.ttft_ms?));
        let client_ms = tokens.reduce(f64::min)?;
        // Without a token of its own the record ends before.
        record.t_e2e_ms?;
        let record_ms = record.phases.iter().map(|phase| phase.duration_ms).sum();
        Some(Self { client_ms, record_ms, difference_percent: 100.0 * (client_ms - record_ms) / client_ms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::fixture::{cycle, failed, loads, record, run};
    use crate::coldstart::Phase;

    #[test]
    fn a_run_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.json");
        let mut written = loads(&[3000.0, 3100.0, 3050.0]);
        written.cycles.push(failed(4, "exit code 1"));
        fs::write(&file, serde_json::to_vec(&written).unwrap()).unwrap();
        assert_eq!(Run::read(&file).unwrap(), written);
        // Of a later program that writes more.
        let mut more = serde_json::to_value(&written).unwrap();
        more["news"] = 1.into();
        more["cycles"][0]["news"] = 1.into();
        fs::write(&file, more.to_string()).unwrap();
        assert_eq!(Run::read(&file).unwrap(), written);
    }

    #[test]
    fn a_file_that_is_no_run_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.json");
        let error = Run::read(&file).unwrap_err();
        assert!(error.starts_with("cannot read ") && error.contains("run.json"), "{error}");
        for (text, expected) in [
            ("no", "run.json is not JSON"),
            ("{}", "has no \"schema\""),
            (
                r#"{"schema": "anteroom.dev/bench/v2"}"#,
                "has the schema anteroom.dev/bench/v2, and this program reads",
            ),
            (r#"{"schema": "anteroom.dev/bench/v1"}"#, "missing field `anteroom`"),
        ] {
            fs::write(&file, text).unwrap();
            let error = Run::read(&file).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_record_stands_beside_the_clients_clock() {
        let mut burst = cycle(1, record(&[(Phase::Load, 998.0)])).requests;
        let later = Request { sent_ms: 500.0, ttft_ms: Some(400.0), ..burst[0].clone() };
        burst.push(later);
        // The second request was sent later, and saw its token first: 900 ms after the first was sent.
        let record = record(&[(Phase::Load, 891.0)]);
        let clock = OutsideClock::of(&burst, &record).unwrap();
        assert_eq!((clock.client_ms, clock.record_ms), (900.0, 891.0));
        assert!((clock.difference_percent - 1.0).abs() < 1e-9);
        let tokenless = ColdStart { t_e2e_ms: None, ..record };
        assert_eq!(OutsideClock::of(&burst, &tokenless), None);
        assert_eq!(run(Vec::new()).summary.outside_clock_max_percent, None);
    }
}
