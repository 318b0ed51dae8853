//! Results of a benchmark run: the JSON schema `anteroom.dev/bench/v1`.
//!
//! Types only; `cost`, `samples` and `summary` compute them.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use crate::coldstart::ColdStart;

/// Schema identifier. An incompatible change gets a new one.
pub const SCHEMA: &str = "anteroom.dev/bench/v1";

/// A benchmark run. Readers ignore unknown keys.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Run {
    /// [`SCHEMA`].
    pub schema: String,
    /// Version of the program that measured.
    pub anteroom: String,
    /// Wall-clock start, RFC 3339.
    pub started_at: String,
    /// Command line, without addresses, commands and secrets; files by name only.
    pub command: Vec<String>,
    /// Label given by the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Machine of the client; also of the proxy, if the run started one.
    pub machine: Machine,
    /// Name of the route under test.
    pub route: String,
    /// Requests per cycle.
    pub burst: usize,
    /// Idle timeout of the target in seconds, if the run set it.
    pub idle_s: Option<f64>,
    /// Other settings of the run.
    pub settings: RunSettings,
    /// Set if a signal ended the run early.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub interrupted: bool,
    /// Error that ended the run early.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aborted: Option<String>,
    /// Finished cycles, oldest first.
    pub cycles: Vec<Cycle>,
    /// Statistics over the cycles.
    pub summary: Summary,
}

/// A machine, without its host name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Machine {
    /// `linux`, `macos`.
    pub os: String,
    /// `x86_64`, `aarch64`.
    pub arch: String,
    /// Available parallelism.
    pub cpus: usize,
}

/// Settings that make runs comparable: a difference in any of them may explain a difference in the times.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct RunSettings {
    /// `stand-in` (embedded default), `own` (`--config`) or `running` (`--url`).
    pub target: String,
    /// Requested number of cycles.
    pub cycles: usize,
    /// Arrival pattern of a burst: `together`, `spread=2s`, `poisson=2.5` or `file`.
    pub arrivals: String,
    /// Seed of random arrivals and of the bootstrap.
    pub seed: u64,
    /// Number of distinct prompts, used in rotation.
    pub prompts: usize,
    /// `chat` or `completions`.
    pub endpoint: String,
    /// `model` of every request.
    pub model: Option<String>,
    /// `max_tokens` of every request.
    pub max_tokens: u32,
    /// `stream` of every request.
    pub stream: bool,
    /// Pause at zero before each burst, in seconds.
    pub pause_s: f64,
    /// Set if `--stop-command` was given.
    pub stop_command: bool,
    /// Price per hour of all GPUs of the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_hour_price: Option<f64>,
    /// Currency of `gpu_hour_price`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
}

/// One cycle: idle at zero, a burst, its last answer.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Cycle {
    /// Counted from 1.
    pub number: usize,
    /// Wall-clock time of the first request, RFC 3339.
    pub started_at: String,
    /// Time from the last answer of the previous cycle until the route was at zero. Absent in the first cycle.
    pub idle_ms: Option<f64>,
    /// Classification of the cycle; only `cold` enters the statistics.
    pub verdict: CycleVerdict,
    /// Reason for any other verdict.
    pub error: Option<String>,
    /// Requests of the burst, measured by the client.
    pub requests: Vec<RequestResult>,
    /// Cold start recorded by the proxy.
    pub cold_start: Option<ColdStart>,
    /// Record compared with the client's clock. Absent without a token or a record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside_clock: Option<ClockCheck>,
    /// GPU time of the cycle. Absent unless the target became ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost>,
}

/// Classification of a cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CycleVerdict {
    /// A cold start with at least one complete answer. The only verdict that counts.
    Cold,
    /// The target was already up, or a foreign request woke it.
    NotCold,
    /// The target did not start, or no request was answered.
    Failed,
}

/// One request, timed by the client's clock.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct RequestResult {
    /// Send time, relative to the first request of the burst.
    pub sent_ms: f64,
    /// Time to first token. Absent for answers that were not streamed or had no token.
    pub ttft_ms: Option<f64>,
    /// Time from sending until the end of the answer, complete or not.
    pub total_ms: f64,
    /// HTTP status.
    pub status: Option<u16>,
    /// Error of the request, if it failed.
    pub error: Option<String>,
    /// `x-request-id`.
    pub request_id: Option<String>,
}

/// The record of the proxy compared with the client's clock, which the proxy has no access to.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct ClockCheck {
    /// First request sent until first token received, by the client's clock.
    pub client_ms: f64,
    /// Sum of the phases of the record.
    pub record_ms: f64,
    /// `client_ms - record_ms`, in percent of `client_ms`.
    pub difference_percent: f64,
}

/// GPU seconds of one cycle. The three intervals are adjacent.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Cost {
    /// From the allocation of the GPU (node assigned, or process started) until ready.
    pub cold_s: f64,
    /// From ready until the end of the last answer.
    pub serving_s: f64,
    /// From the end of the last answer until the route is at zero. Set by the next cycle.
    pub idle_s: Option<f64>,
}

/// Median GPU seconds of a run and their price.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct CostSummary {
    /// Median of [`Cost::cold_s`].
    pub cold_s: f64,
    /// Median of [`Cost::serving_s`].
    pub serving_s: f64,
    /// Median of [`Cost::idle_s`].
    pub idle_s: Option<f64>,
    /// Price of `cold_s`. Absent, like the prices below, without [`RunSettings::gpu_hour_price`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_start_money: Option<f64>,
    /// Price of `idle_s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_money: Option<f64>,
    /// Price of the sum of all three.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cycle_money: Option<f64>,
}

/// Statistics over the cycles of a run.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Summary {
    /// All finished cycles.
    pub cycles: usize,
    /// Cycles with [`CycleVerdict::Cold`].
    pub counted: usize,
    /// Cycles with [`CycleVerdict::NotCold`].
    pub not_cold: usize,
    /// Cycles with [`CycleVerdict::Failed`].
    pub failed: usize,
    /// Requests of all cycles.
    pub requests: usize,
    /// Requests without a complete answer.
    pub requests_failed: usize,
    /// Parameters of the confidence intervals.
    pub bootstrap: BootstrapParameters,
    /// Distribution of each phase, in order of time.
    pub phases: Vec<Distribution>,
    /// Distribution of the known parts of phases, named `phase.part`.
    pub parts: Vec<Distribution>,
    /// `t_actuation`, `t_first_token` and `t_e2e` of the records, `ttft` and `total` of the clients.
    pub totals: Vec<Distribution>,
    /// Largest absolute value of [`ClockCheck::difference_percent`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside_clock_max_percent: Option<f64>,
    /// GPU time and money.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<CostSummary>,
}

/// Parameters of the confidence intervals.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct BootstrapParameters {
    /// `percentile`.
    pub method: String,
    /// Number of bootstrap samples.
    pub resamples: u32,
    /// Seed of the random numbers.
    pub seed: u64,
    /// 0.95.
    pub confidence: f64,
}

/// Distribution of one metric over the counted cycles.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Distribution {
    /// Name of the metric.
    pub name: String,
    /// Number of values.
    pub n: usize,
    /// Median.
    pub median_ms: f64,
    /// Confidence interval of the median. Absent with fewer than two cycles.
    pub ci_ms: Option<[f64; 2]>,
    /// 90th percentile.
    pub p90_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// Minimum.
    pub min_ms: f64,
    /// Maximum.
    pub max_ms: f64,
}

// === impl Run ===

impl Run {
    /// Reads the output of `bench cold-start --json`.
    ///
    /// # Errors
    /// Names the file and the remedy.
    pub fn read(path: &Path) -> Result<Self, String> {
        let name = path.display();
        let text = fs::read(path).map_err(|error| format!("cannot read {name}: {error}"))?;
        let schema = serde_json::from_slice::<serde_json::Value>(&text).map_err(|error| {
            format!("{name} is not JSON: {error}; expected the output of `bench cold-start --json`")
        })?;
        match schema["schema"].as_str() {
            Some(SCHEMA) => {}
            Some(other) => {
                return Err(format!(
                    "{name} has schema {other}, but this version reads {SCHEMA}: repeat the measurement with this version"
                ));
            }
            None => {
                return Err(format!(
                    "{name} has no \"schema\"; expected the output of `bench cold-start --json`"
                ));
            }
        }
        // Parsed from the text again: an error then has a line and a column.
        serde_json::from_slice(&text)
            .map_err(|error| format!("{name} is not a valid benchmark result: {error}"))
    }

    /// Returns the cycles with [`CycleVerdict::Cold`].
    pub fn counted(&self) -> impl Iterator<Item = &Cycle> {
        self.cycles.iter().filter(|cycle| cycle.verdict == CycleVerdict::Cold)
    }
}

// === impl Machine ===

impl Machine {
    /// Describes the current machine.
    pub(super) fn of_this_host() -> Self {
        Self {
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        }
    }
}

// === impl CycleVerdict ===

impl CycleVerdict {
    /// Returns the text for tables and error messages.
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::NotCold => "not cold",
            Self::Failed => "failed",
        }
    }
}

// === impl ClockCheck ===

impl ClockCheck {
    /// Compares a burst with its record. Returns `None` if the clients or the record have no first token.
    pub(super) fn of(requests: &[RequestResult], record: &ColdStart) -> Option<Self> {
        let tokens = requests.iter().filter_map(|request| Some(request.sent_ms + request.ttft_ms?));
        let client_ms = tokens.reduce(f64::min)?;
        // A record without a first token ends earlier than the client's measurement.
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
    fn run_written_as_json_reads_back_equal() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.json");
        let mut written = loads(&[3000.0, 3100.0, 3050.0]);
        written.cycles.push(failed(4, "exit code 1"));
        fs::write(&file, serde_json::to_vec(&written).unwrap()).unwrap();
        assert_eq!(Run::read(&file).unwrap(), written);
        // Keys that a later version may add are ignored.
        let mut more = serde_json::to_value(&written).unwrap();
        more["unknown"] = 1.into();
        more["cycles"][0]["unknown"] = 1.into();
        fs::write(&file, more.to_string()).unwrap();
        assert_eq!(Run::read(&file).unwrap(), written);
    }

    #[test]
    fn invalid_file_error_names_the_problem() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.json");
        let error = Run::read(&file).unwrap_err();
        assert!(error.starts_with("cannot read ") && error.contains("run.json"), "{error}");
        for (text, expected) in [
            ("no", "run.json is not JSON"),
            ("{}", "has no \"schema\""),
            (
                r#"{"schema": "anteroom.dev/bench/v2"}"#,
                "has schema anteroom.dev/bench/v2, but this version reads",
            ),
            (r#"{"schema": "anteroom.dev/bench/v1"}"#, "missing field `anteroom`"),
        ] {
            fs::write(&file, text).unwrap();
            let error = Run::read(&file).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn clock_check_uses_the_earliest_token() {
        let mut burst = cycle(1, record(&[(Phase::Load, 998.0)])).requests;
        let later = RequestResult { sent_ms: 500.0, ttft_ms: Some(400.0), ..burst[0].clone() };
        burst.push(later);
        // The second request is sent at 500 ms and gets the first token of the burst at 500 + 400 = 900 ms.
        let record = record(&[(Phase::Load, 891.0)]);
        let clock = ClockCheck::of(&burst, &record).unwrap();
        assert_eq!((clock.client_ms, clock.record_ms), (900.0, 891.0));
        assert!((clock.difference_percent - 1.0).abs() < 1e-9);
        let tokenless = ColdStart { t_e2e_ms: None, ..record };
        assert_eq!(ClockCheck::of(&burst, &tokenless), None);
        assert_eq!(run(Vec::new()).summary.outside_clock_max_percent, None);
    }
}
