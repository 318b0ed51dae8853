//! Command-line arguments of the simulated model server.

use clap::{Args, Parser};
use http::StatusCode;
use std::{net::IpAddr, time::Duration};

/// Arguments of `anteroom sim`: load, answers and injected failures.
///
/// Durations are written as `90s`, `1m30s` or `250ms`, rates as numbers from 0 (never) to 1 (always). Injected failures
/// depend only on the seed and the request number, counted from 0 over all generation and embedding requests in the order
/// in which their bodies were received.
#[derive(Clone, Debug, Args)]
pub struct SimArgs {
    /// TCP port to listen on; 0 chooses a free one
    #[arg(long, default_value_t = 8000)]
    pub port: u16,

    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,

    /// Served model name; may be repeated (a LoRA adapter is another name)
    ///
    /// By default any name is accepted and `/v1/models` lists `sim`.
    #[arg(long = "model", value_name = "NAME")]
    pub models: Vec<String>,

    /// Seed of answers, ids and injected failures
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Time from the start until ready
    ///
    /// The port is closed during this time. --closed-time and --unready-time divide it: either one leaves the rest to the
    /// other, both together replace --load-time.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub load_time: Duration,

    /// Time from the start during which connections are refused
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub closed_time: Option<Duration>,

    /// Subsequent time during which the port is open and every path returns 503
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub unready_time: Option<Duration>,

    /// Fail halfway through the load, with a traceback and this exit code [default without a value: 1]
    #[arg(long, value_name = "CODE", num_args = 0..=1, require_equals = true, default_missing_value = "1",
          value_parser = clap::value_parser!(u8).range(1..))]
    pub fail_load: Option<u8>,

    /// Never become ready; hang at the end of the load
    #[arg(long)]
    pub hang_load: bool,

    /// Enable `/sleep`, `/wake_up` and `/is_sleeping`
    ///
    /// vLLM also needs VLLM_SERVER_DEV_MODE=1.
    #[arg(long)]
    pub enable_sleep_mode: bool,

    /// Duration of `/sleep`
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub sleep_time: Duration,

    /// Duration of `/wake_up`
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub wake_time: Duration,

    /// Return 500 from `/wake_up` and stay asleep
    #[arg(long)]
    pub fail_wake: bool,

    /// Time from leaving the queue to the first token
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub time_to_first_token: Duration,

    /// Time between tokens
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub inter_token_time: Duration,

    /// Tokens per answer, unless the request has a lower limit
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..))]
    pub tokens: u64,

    /// Concurrent requests; further ones wait in FIFO order
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_running: u32,

    /// Share of requests whose connection is reset before the response
    #[arg(long, value_name = "RATE", default_value_t = 0.0, value_parser = rate)]
    pub reset_before_head: f64,

    /// Share of requests whose connection is reset within the response body
    #[arg(long, value_name = "RATE", default_value_t = 0.0, value_parser = rate)]
    pub reset_mid_stream: f64,

    /// Share of requests that fail with --error-status
    #[arg(long, value_name = "RATE", default_value_t = 0.0, value_parser = rate)]
    pub error_rate: f64,

    /// Status of the errors injected by --error-rate
    #[arg(long, value_name = "CODE", default_value = "500", value_parser = status)]
    pub error_status: StatusCode,

    /// Crash with exit code 1 when this many requests have been received; the last one gets no answer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub exit_after: Option<u64>,

    /// Time for requests in flight to finish after SIGTERM or SIGINT; 0 closes them immediately, like vLLM
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub shutdown_timeout: Duration,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.0..=1.0).contains(&rate) => Ok(rate),
        _ => Err("expected a number from 0 to 1".to_owned()),
    }
}

fn status(text: &str) -> Result<StatusCode, String> {
    match text.parse::<StatusCode>() {
        Ok(status) if status.is_client_error() || status.is_server_error() => Ok(status),
        _ => Err("expected a status from 400 to 599".to_owned()),
    }
}

// === impl SimArgs ===

impl Default for SimArgs {
    /// Returns the defaults of the command line.
    fn default() -> Self {
        #[derive(Parser)]
        struct SimCli {
            #[command(flatten)]
            args: SimArgs,
        }
        SimCli::parse_from(["sim"]).args
    }
}

impl SimArgs {
    /// Returns the time with a closed port, and the following time with 503.
    pub(super) fn load_phases(&self) -> (Duration, Duration) {
        match (self.closed_time, self.unready_time) {
            (None, None) => (self.load_time, Duration::ZERO),
            (Some(closed), None) => (closed, self.load_time.saturating_sub(closed)),
            (None, Some(unready)) => (self.load_time.saturating_sub(unready), unready),
            (Some(closed), Some(unready)) => (closed, unready),
        }
    }

    /// Returns the model name used as the metric label: like vLLM, the first one.
    pub(super) fn first_model(&self) -> &str {
        self.models.first().map_or("sim", String::as_str)
    }

    pub(super) fn serves(&self, model: &str) -> bool {
        self.models.is_empty() || self.models.iter().any(|name| name == model)
    }
}
