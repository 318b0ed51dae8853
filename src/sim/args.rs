//! Command-line arguments of the simulated model server.

use clap::{Args, Parser};
use http::StatusCode;
use std::{net::IpAddr, time::Duration};

/// What `anteroom sim` can be told: how it loads, how it answers, and how it fails.
///
/// Durations are written as `90s`, `1m30s` or `250ms`. Rates go from 0 (never) to 1 (always). Whether a
/// request fails depends on the seed and on its number alone, counted from 0 over the requests that ask for a
/// generation or an embedding, in the order in which their bodies were complete.
#[derive(Clone, Debug, Args)]
pub struct SimArgs {
    /// TCP port to listen on; 0 takes any free one
    #[arg(long, default_value_t = 8000)]
    pub port: u16,

    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,

    /// Model name to answer for and to list, may be repeated (a LoRA adapter is one more name)
    ///
    /// Without it any name is answered, and `/v1/models` lists `sim`.
    #[arg(long = "model", value_name = "NAME")]
    pub models: Vec<String>,

    /// Seed of the answers' words, the ids and the injected failures
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Time from the start until ready
    ///
    /// The port is closed all the while, unless --closed-time or --unready-time says how to divide it: one of
    /// them leaves the rest to the other, and both together replace it.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub load_time: Duration,

    /// Time from the start in which connections are refused
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub closed_time: Option<Duration>,

    /// Time after that in which the port is open, and every path answers 503
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub unready_time: Option<Duration>,

    /// Die halfway through the load, with a traceback and this exit code (1 when none is given)
    #[arg(long, value_name = "CODE", num_args = 0..=1, require_equals = true, default_missing_value = "1",
          value_parser = clap::value_parser!(u8).range(1..))]
    pub fail_load: Option<u8>,

    /// Never become ready: stay in the last phase of the load
    #[arg(long)]
    pub hang_load: bool,

    /// Answer `/sleep`, `/wake_up` and `/is_sleeping`
    ///
    /// vLLM has them with VLLM_SERVER_DEV_MODE=1, and frees memory with this flag.
    #[arg(long)]
    pub enable_sleep_mode: bool,

    /// Time that it takes to fall asleep
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub sleep_time: Duration,

    /// Time that it takes to wake up
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub wake_time: Duration,

    /// Answer `/wake_up` with 500, and sleep on
    #[arg(long)]
    pub fail_wake: bool,

    /// Time from leaving the waiting queue to the first token
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub time_to_first_token: Duration,

    /// Time from one token to the next
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub inter_token_time: Duration,

    /// Tokens of an answer; the request's own limit wins where it is lower
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..))]
    pub tokens: u64,

    /// Requests that run at the same time; more wait, first come, first served
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_running: u32,

    /// Share of requests whose connection is reset after the request was read, before the response starts
    #[arg(long, value_name = "RATE", default_value_t = 0.0, value_parser = rate)]
    pub reset_before_head: f64,

    /// Share of requests whose connection is reset in the middle of the response's body
    #[arg(long, value_name = "RATE", default_value_t = 0.0, value_parser = rate)]
    pub reset_mid_stream: f64,

    /// Share of requests that are answered with --error-status
    #[arg(long, value_name = "RATE", default_value_t = 0.0, value_parser = rate)]
    pub error_rate: f64,

    /// Status of the answers that --error-rate asks for
    #[arg(long, value_name = "CODE", default_value = "500", value_parser = status)]
    pub error_status: StatusCode,

    /// Crash with exit code 1 as soon as this many requests have been read; the last gets no answer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub exit_after: Option<u64>,

    /// Time that answers under way are given at SIGTERM or SIGINT; with none they are cut at once, as in vLLM
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub shutdown_timeout: Duration,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.0..=1.0).contains(&rate) => Ok(rate),
        _ => Err("a rate is a number from 0 to 1".to_owned()),
    }
}

fn status(text: &str) -> Result<StatusCode, String> {
    match text.parse::<StatusCode>() {
        Ok(status) if status.is_client_error() || status.is_server_error() => Ok(status),
        _ => Err("an error status is a number from 400 to 599".to_owned()),
    }
}

// === impl SimArgs ===

impl Default for SimArgs {
    /// The defaults of the command line, so that there is one set of them.
    fn default() -> Self {
        #[derive(Parser)]
        struct Flags {
            #[command(flatten)]
            args: SimArgs,
        }
        Flags::parse_from(["sim"]).args
    }
}

impl SimArgs {
    /// How long the port is closed, and how long it then answers 503.
    pub(super) fn load_phases(&self) -> (Duration, Duration) {
        match (self.closed_time, self.unready_time) {
            (None, None) => (self.load_time, Duration::ZERO),
            (Some(closed), None) => (closed, self.load_time.saturating_sub(closed)),
            (None, Some(unready)) => (self.load_time.saturating_sub(unready), unready),
            (Some(closed), Some(unready)) => (closed, unready),
        }
    }

    /// The name that labels the metrics, as in vLLM the first one served.
    pub(super) fn first_model(&self) -> &str {
        self.models.first().map_or("sim", String::as_str)
    }

    pub(super) fn serves(&self, model: &str) -> bool {
        self.models.is_empty() || self.models.iter().any(|name| name == model)
    }
}
