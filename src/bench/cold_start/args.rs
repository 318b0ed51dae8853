//! Arguments of `anteroom bench cold-start`.

use std::path::PathBuf;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{arrivals::Arrivals, prompts::BenchEndpoint};
use crate::{bench::http::BaseUrl, domain::Period};

/// Cycles that show a slowdown of 20 % in `bench compare`.
///
/// The stand-in has 16 metrics, so with the failures Holm's correction multiplies the smallest p-value by 17; alpha is
/// 0.05. Runs of 5 cycles never reach it: 17 × 2/C(10, 5) = 0.13. Runs of 6 do only if every time of one is below every
/// time of the other: 17 × 2/C(12, 6) = 0.04. Of the 64 pairs of two runs of 8, 4 may be in the wrong order (12 ways to
/// have at most 4): 17 × 2 × 12/C(16, 8) = 0.03. A normal spread has one pair in 16 in the wrong order if the slowdown is
/// 2.2 standard deviations, so 20 % shows with a standard deviation of up to 9 %.
pub(in crate::bench) const DEFAULT_CYCLES: u16 = 8;

/// Measures cold starts: repeatedly waits for zero, sends a burst of requests and reports the time of each phase.
///
/// Without --config and --url, measures the real proxy with an embedded stand-in for vLLM. Exits 0 if every cycle was a cold
/// start and every request was answered, 1 otherwise, 2 if nothing could be measured, and 130 after Ctrl-C, which still
/// writes the finished cycles.
#[derive(Clone, Debug, clap::Args)]
pub struct ColdStartArgs {
    /// Number of cold starts to measure
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CYCLES, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub cycles: u16,

    /// Start a proxy with this configuration on this machine and measure it
    #[arg(long, value_name = "FILE", conflicts_with = "url", help_heading = "What is measured")]
    pub config: Option<PathBuf>,

    /// Measure a running proxy at this URL, such as http://127.0.0.1:8080
    #[arg(long, value_name = "URL", requires = "admin", help_heading = "What is measured")]
    pub url: Option<BaseUrl>,

    /// Admin URL of the running proxy, such as http://127.0.0.1:8081; once per replica
    #[arg(long, value_name = "URL", requires = "url", help_heading = "What is measured")]
    pub admin: Vec<BaseUrl>,

    /// Route to measure, in a cluster NAMESPACE/NAME; required if there are several
    #[arg(long, value_name = "NAME", help_heading = "What is measured")]
    pub route: Option<String>,

    /// Load time of the stand-in
    #[arg(long, value_name = "DURATION", default_value = "3s", conflicts_with_all = ["config", "url"],
          help_heading = "What is measured")]
    pub load_time: Period,

    /// Idle timeout of a process started by this command [default: 1s]
    #[arg(long, value_name = "DURATION", conflicts_with = "url", help_heading = "Between the bursts")]
    pub idle: Option<Period>,

    /// Shell command that stops the target, run before a burst if the route is not at zero
    #[arg(long, value_name = "COMMAND", help_heading = "Between the bursts")]
    pub stop_command: Option<String>,

    /// Pause at zero before each burst
    #[arg(long, value_name = "DURATION", default_value = "0s", help_heading = "Between the bursts")]
    pub pause: Period,

    /// Time limit for reaching zero, and again for the answers of the burst
    #[arg(long, value_name = "DURATION", default_value = "30m", help_heading = "Between the bursts")]
    pub timeout: Period,

    /// Requests per burst [default: 1, or the number of times in the --arrivals file]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=5000), help_heading = "Requests")]
    pub burst: Option<u16>,

    /// Arrival pattern of a burst: together, spread=2s, poisson=2.5 (requests per second), or a file with one time in
    /// seconds per line
    #[arg(long, value_name = "PATTERN", default_value = "together", help_heading = "Requests")]
    pub arrivals: Arrivals,

    /// Prompt; may be repeated, used in rotation
    #[arg(long, value_name = "TEXT", help_heading = "Requests")]
    pub prompt: Vec<String>,

    /// File with one prompt per line; a line that is a JSON object is used as the request body
    #[arg(long, value_name = "FILE", help_heading = "Requests")]
    pub prompts: Option<PathBuf>,

    /// Model to request [default: the first of the route, or the first that the proxy lists]
    #[arg(long, value_name = "NAME", help_heading = "Requests")]
    pub model: Option<String>,

    /// API to call
    #[arg(long, value_enum, default_value_t, help_heading = "Requests")]
    pub endpoint: BenchEndpoint,

    /// `max_tokens` of each request
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..),
          help_heading = "Requests")]
    pub max_tokens: u32,

    /// Request answers without streaming; there is no time to first token then
    #[arg(long, help_heading = "Requests")]
    pub no_stream: bool,

    /// Header of every request, such as "Authorization: Bearer ..."; its value is not written to any file
    #[arg(long, value_name = "NAME: VALUE", value_parser = header, help_heading = "Requests")]
    pub header: Vec<(HeaderName, HeaderValue)>,

    /// Seed of random arrivals and of the confidence intervals
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Label of this run in reports and comparisons
    #[arg(long, value_name = "TEXT", help_heading = "Output")]
    pub label: Option<String>,

    /// Price per hour of all GPUs of the target
    #[arg(long, value_name = "PRICE", value_parser = price, help_heading = "Output")]
    pub gpu_hour_price: Option<f64>,

    /// Currency of the price
    #[arg(long, value_name = "TEXT", requires = "gpu_hour_price", help_heading = "Output")]
    pub currency: Option<String>,

    /// Write the results to this file as JSON, for `bench compare`
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub json: Option<PathBuf>,

    /// Write a self-contained HTML report to this file
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub html: Option<PathBuf>,
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let invalid = || "expected NAME: VALUE, such as \"Authorization: Bearer abc\"".to_owned();
    let (name, value) = text.split_once(':').ok_or_else(invalid)?;
    let (name, value) = (name.trim().parse(), HeaderValue::from_str(value.trim()));
    Ok((name.map_err(|_| invalid())?, value.map_err(|_| invalid())?))
}

fn price(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(price) if price >= 0.0 && f64::is_finite(price) => Ok(price),
        _ => Err("expected a number, such as 2.49".to_owned()),
    }
}

// === impl ColdStartArgs ===

impl ColdStartArgs {
    /// Returns the headers of every request.
    pub(super) fn headers(&self) -> HeaderMap {
        self.header.iter().cloned().collect()
    }

    /// Returns the idle timeout of a process that this command starts.
    pub(super) fn idle_timeout(&self) -> Period {
        self.idle.unwrap_or(Period::from_secs(1))
    }

    /// Returns the command line for publication: addresses, commands and header values are replaced, paths reduced to the
    /// file name.
    pub(super) fn command(&self) -> Vec<String> {
        let name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let mut words = vec!["anteroom".to_owned(), "bench".to_owned(), "cold-start".to_owned()];
        let mut add = |flag: &str, value: Option<String>| {
            if let Some(value) = value {
                words.extend([format!("--{flag}"), value]);
            }
        };
        add("cycles", Some(self.cycles.to_string()));
        add("config", self.config.as_ref().and_then(name));
        add("url", self.url.as_ref().map(|_| "URL".to_owned()));
        self.admin.iter().for_each(|_| add("admin", Some("URL".to_owned())));
        add("route", self.route.clone());
        let stand_in = self.config.is_none() && self.url.is_none();
        add("load-time", stand_in.then(|| self.load_time.to_string()));
        add("idle", self.idle.map(|idle| idle.to_string()));
        add("stop-command", self.stop_command.as_ref().map(|_| "COMMAND".to_owned()));
        add("pause", (self.pause != Period::ZERO).then(|| self.pause.to_string()));
        add("timeout", (self.timeout != Period::from_secs(1800)).then(|| self.timeout.to_string()));
        add("burst", self.burst.map(|burst| burst.to_string()));
        add(
            "arrivals",
            match &self.arrivals {
                Arrivals::Together => None,
                Arrivals::File(path) => name(path),
                other => Some(other.pattern()),
            },
        );
        self.prompt.iter().for_each(|text| add("prompt", Some(text.clone())));
        add("prompts", self.prompts.as_ref().and_then(name));
        add("model", self.model.clone());
        add("endpoint", (self.endpoint != BenchEndpoint::default()).then(|| self.endpoint.name().to_owned()));
        add("max-tokens", (self.max_tokens != 16).then(|| self.max_tokens.to_string()));
        self.header.iter().for_each(|(name, _)| add("header", Some(format!("{name}: ..."))));
        add("seed", (self.seed != 1).then(|| self.seed.to_string()));
        add("label", self.label.clone());
        add("gpu-hour-price", self.gpu_hour_price.map(|price| price.to_string()));
        add("currency", self.currency.clone());
        add("json", self.json.as_ref().and_then(name));
        add("html", self.html.as_ref().and_then(name));
        if self.no_stream {
            words.push("--no-stream".to_owned());
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct ColdStartCli {
        #[command(flatten)]
        args: ColdStartArgs,
    }

    #[test]
    fn published_command_has_no_secrets() {
        let line = "x --cycles 3 --url http://10.0.0.1:8080 --admin http://10.0.0.1:8081 --admin http://10.0.0.2:8081 \
                    --route models/tiny --prompts /home/me/prompts.txt --stop-command kubectl --json /home/me/a.json \
                    --no-stream --header Authorization:secret";
        let args = ColdStartCli::parse_from(line.split_whitespace()).args;
        assert_eq!(
            args.command().join(" "),
            "anteroom bench cold-start --cycles 3 --url URL --admin URL --admin URL --route models/tiny --stop-command \
             COMMAND --prompts prompts.txt --header authorization: ... --json a.json --no-stream"
        );
        assert_eq!(args.headers()["authorization"], "secret");
    }

    #[test]
    fn conflicting_or_invalid_arguments_are_rejected() {
        for line in [
            "x --url http://a:1",
            "x --admin http://a:1",
            "x --config a --url http://a:1 --admin http://a:1",
            "x --url http://a:1 --admin http://a:1 --idle 1s",
            "x --config a --load-time 1s",
            "x --currency EUR",
            "x --gpu-hour-price -1",
            "x --header secret",
            "x --cycles 0",
            "x --burst 0",
            "x --arrivals never",
        ] {
            assert!(ColdStartCli::try_parse_from(line.split_whitespace()).is_err(), "{line}");
        }
    }
}
