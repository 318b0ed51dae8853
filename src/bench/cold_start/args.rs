//! What `anteroom bench cold-start` can be told.

use std::path::PathBuf;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{arrivals::Arrivals, prompts::Endpoint};
use crate::{bench::http::Base, domain::Period};

/// Measures cold starts: N times wait for zero, send requests, and find out where the time went.
///
/// Without --config and --url it measures the real proxy with a stand-in for vLLM, and needs nothing. Exits 0 if every
/// cycle was a cold start and every request was answered, 1 if not, 2 if nothing could be measured, and 130 after
/// Ctrl-C, with the results of the cycles until then.
#[derive(Clone, Debug, clap::Args)]
pub struct ColdStartArgs {
    /// How many cold starts to measure
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub cycles: u16,

    /// Run a proxy with this configuration, here, and measure it
    #[arg(long, value_name = "FILE", conflicts_with = "url", help_heading = "What is measured")]
    pub config: Option<PathBuf>,

    /// Measure a proxy that runs: where it takes requests, such as http://127.0.0.1:8080
    #[arg(long, value_name = "URL", requires = "admin", help_heading = "What is measured")]
    pub url: Option<Base>,

    /// Its admin address, such as http://127.0.0.1:8081; once for each replica
    #[arg(long, value_name = "URL", requires = "url", help_heading = "What is measured")]
    pub admin: Vec<Base>,

    /// The route to wake, of a cluster NAMESPACE/NAME; needed if there are several
    #[arg(long, value_name = "NAME", help_heading = "What is measured")]
    pub route: Option<String>,

    /// Time that the stand-in takes to load, without --config and --url
    #[arg(long, value_name = "DURATION", default_value = "3s", conflicts_with_all = ["config", "url"],
          help_heading = "What is measured")]
    pub load_time: Period,

    /// Stop the process of a proxy that runs here when it has had no request for so long [default: 1s]
    #[arg(long, value_name = "DURATION", conflicts_with = "url", help_heading = "Between the bursts")]
    pub idle: Option<Period>,

    /// Stop the target with this shell command before each burst if it is up
    #[arg(long, value_name = "COMMAND", help_heading = "Between the bursts")]
    pub stop_command: Option<String>,

    /// Stay at zero for so long before each burst
    #[arg(long, value_name = "DURATION", default_value = "0s", help_heading = "Between the bursts")]
    pub pause: Period,

    /// How long a cycle may take to get to zero, and how long its answers may take after that
    #[arg(long, value_name = "DURATION", default_value = "30m", help_heading = "Between the bursts")]
    pub timeout: Period,

    /// Requests a burst [default: 1, or as many as the file of --arrivals has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=5000), help_heading = "Requests")]
    pub burst: Option<u16>,

    /// When the requests of a burst are sent: together, spread=2s, poisson=2.5 (a second), or a file with a time in
    /// seconds a line
    #[arg(long, value_name = "PATTERN", default_value = "together", help_heading = "Requests")]
    pub arrivals: Arrivals,

    /// What to ask; several are asked in turn
    #[arg(long, value_name = "TEXT", help_heading = "Requests")]
    pub prompt: Vec<String>,

    /// A file of prompts, one a line; a line that is a JSON object is a whole body
    #[arg(long, value_name = "FILE", help_heading = "Requests")]
    pub prompts: Option<PathBuf>,

    /// The model to ask for [default: the first of the route, or the first that the proxy lists]
    #[arg(long, value_name = "NAME", help_heading = "Requests")]
    pub model: Option<String>,

    /// The API to use
    #[arg(long, value_enum, default_value_t, help_heading = "Requests")]
    pub endpoint: Endpoint,

    /// The longest answer
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..),
          help_heading = "Requests")]
    pub max_tokens: u32,

    /// Ask for whole answers: then there is no time to the first token
    #[arg(long, help_heading = "Requests")]
    pub no_stream: bool,

    /// A header of every request, such as "Authorization: Bearer ..."; it is in no file that is written
    #[arg(long, value_name = "NAME: VALUE", value_parser = header, help_heading = "Requests")]
    pub header: Vec<(HeaderName, HeaderValue)>,

    /// Seed of random arrivals and of the confidence intervals
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// What to call this run in the report and in comparisons
    #[arg(long, value_name = "TEXT", help_heading = "Output")]
    pub label: Option<String>,

    /// What an hour of all GPUs of the target costs
    #[arg(long, value_name = "PRICE", value_parser = price, help_heading = "Output")]
    pub gpu_hour_price: Option<f64>,

    /// The currency of that price, as it is to be shown
    #[arg(long, value_name = "TEXT", requires = "gpu_hour_price", help_heading = "Output")]
    pub currency: Option<String>,

    /// Write the results to this file as JSON, for `bench compare` and other programs
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub json: Option<PathBuf>,

    /// Write a report to this file as one page of HTML, which needs nothing else
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub html: Option<PathBuf>,
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let wrong = || "write NAME: VALUE, such as \"Authorization: Bearer abc\"".to_owned();
    let (name, value) = text.split_once(':').ok_or_else(wrong)?;
    let (name, value) = (name.trim().parse(), HeaderValue::from_str(value.trim()));
    Ok((name.map_err(|_| wrong())?, value.map_err(|_| wrong())?))
}

fn price(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(price) if price >= 0.0 && f64::is_finite(price) => Ok(price),
        _ => Err("write a number, such as 2.49".to_owned()),
    }
}

// === impl ColdStartArgs ===

impl ColdStartArgs {
    /// The headers of every request.
    pub(super) fn headers(&self) -> HeaderMap {
        self.header.iter().cloned().collect()
    }

    /// How long a target of ours may be idle.
    pub(super) fn idle(&self) -> Period {
        self.idle.unwrap_or(Period::from_secs(1))
    }

    /// The command line for others to read: no address, no command, no key, and of files the name alone.
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
                other => Some(other.words()),
            },
        );
        self.prompt.iter().for_each(|text| add("prompt", Some(text.clone())));
        add("prompts", self.prompts.as_ref().and_then(name));
        add("model", self.model.clone());
        add("endpoint", (self.endpoint != Endpoint::default()).then(|| self.endpoint.name().to_owned()));
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
    struct Flags {
        #[command(flatten)]
        args: ColdStartArgs,
    }

    #[test]
    fn the_command_that_is_told_gives_nothing_away() {
        let line = "x --cycles 3 --url http://10.0.0.1:8080 --admin http://10.0.0.1:8081 --admin http://10.0.0.2:8081 \
                    --route models/tiny --prompts /home/me/prompts.txt --stop-command kubectl --json /home/me/a.json \
                    --no-stream --header Authorization:secret";
        let args = Flags::parse_from(line.split_whitespace()).args;
        assert_eq!(
            args.command().join(" "),
            "anteroom bench cold-start --cycles 3 --url URL --admin URL --admin URL --route models/tiny --stop-command \
             COMMAND --prompts prompts.txt --header authorization: ... --json a.json --no-stream"
        );
        assert_eq!(args.headers()["authorization"], "secret");
    }

    #[test]
    fn arguments_that_do_not_fit_together_are_told() {
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
            assert!(Flags::try_parse_from(line.split_whitespace()).is_err(), "{line}");
        }
    }
}
