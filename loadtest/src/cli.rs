//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::contender::Contender;

/// Default rate of the open loop, in requests per second.
pub(crate) const DEFAULT_RATE: u32 = 10_000;
/// Default number of concurrent streams.
pub(crate) const DEFAULT_STREAMS: u16 = 2000;

/// Measures Anteroom against plain reverse proxies on this machine
#[derive(Debug, Parser)]
pub(crate) struct LoadtestCli {
    #[command(subcommand)]
    pub(crate) scenario: ScenarioCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ScenarioCommand {
    /// All scenarios, one after another
    All(ScenarioOptions),
    /// Small JSON responses through a proxy on one core: throughput, latency, CPU time
    Warm(WarmArgs),
    /// Bodies from 2 KB to 8 MB: cost of finding the model name in them
    Body(ScenarioOptions),
    /// Many concurrent streamed responses: throughput and delay per event
    Stream(StreamArgs),
    /// Delay from a request for a route at zero to the event on KEDA's stream, with one route and with a thousand
    Signal(ScenarioOptions),
    /// 10,000 routes in a cluster, 1,000 of which change per second: effect on requests to other routes
    Routes(RoutesArgs),
    /// Half an hour of mixed traffic with gaps and cold starts: checks that nothing leaks
    Soak(ScenarioOptions),
    /// 50,000 held streaming requests: memory, and CPU time of their heartbeats
    Held(CrowdArgs),
    /// 10,000 held requests when their model server becomes ready: delay, rate and order of their dispatch
    Release(CrowdArgs),
    /// Ten times as many requests as the queue holds: delay of the rejections, and completion of the held requests
    Overflow(CrowdArgs),
    /// 20,000 clients that disconnect at once: delay until demand is updated, and resources left behind
    Hangup(CrowdArgs),
    /// A well-behaved client beside a malicious one: its latency, and whether all its requests succeed
    Attack(ScenarioOptions),
}

/// Options of every scenario.
#[derive(Debug, Args)]
pub(crate) struct ScenarioOptions {
    /// Measure briefly, for a first impression
    #[arg(long)]
    pub(crate) quick: bool,

    /// Also write the results to FILE
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// Contenders to measure, in this order; some scenarios measure only anteroom
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAMES",
        default_value = "direct,anteroom,haproxy,nginx,envoy"
    )]
    pub(crate) contenders: Vec<Contender>,

    /// Duration of one measurement in seconds [default: depends on the scenario]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub(crate) seconds: Option<u16>,

    /// Rounds per contender [default: 5, or 3 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    pub(crate) rounds: Option<u16>,

    /// Path of Anteroom [default: `anteroom` beside this program, built first when run by cargo]
    #[arg(long, value_name = "PATH")]
    pub(crate) anteroom: Option<PathBuf>,

    /// Path of HAProxy
    #[arg(long, value_name = "PATH", default_value = "haproxy")]
    pub(crate) haproxy: PathBuf,

    /// Path of nginx
    #[arg(long, value_name = "PATH", default_value = "nginx")]
    pub(crate) nginx: PathBuf,

    /// Path of Envoy
    #[arg(long, value_name = "PATH", default_value = "envoy")]
    pub(crate) envoy: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct WarmArgs {
    #[command(flatten)]
    pub(crate) options: ScenarioOptions,

    /// Numbers of clients to measure with, each with one connection and one request at a time
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "COUNTS",
        default_value = "1,64",
        value_parser = clap::value_parser!(u16).range(1..=4096)
    )]
    pub(crate) connections: Vec<u16>,

    /// Requests per second in the open loop, where arrivals follow a schedule; every contender must sustain it
    #[arg(long, value_name = "N", default_value_t = DEFAULT_RATE, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) rate: u32,
}

#[derive(Debug, Args)]
pub(crate) struct StreamArgs {
    #[command(flatten)]
    pub(crate) options: ScenarioOptions,

    /// Concurrent streams
    #[arg(
        long,
        value_name = "COUNT",
        default_value_t = DEFAULT_STREAMS,
        value_parser = clap::value_parser!(u16).range(1..=4000)
    )]
    pub(crate) streams: u16,
}

#[derive(Debug, Args)]
pub(crate) struct RoutesArgs {
    #[command(flatten)]
    pub(crate) options: ScenarioOptions,

    /// Routes in the cluster
    #[arg(long, value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u16).range(200..=10_000))]
    pub(crate) routes: u16,
}

#[derive(Debug, Args)]
pub(crate) struct CrowdArgs {
    #[command(flatten)]
    pub(crate) options: ScenarioOptions,

    /// Number of clients, each with one connection and one request [default: depends on the scenario]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub(crate) requests: Option<u32>,
}

// === impl ScenarioCommand ===

impl ScenarioCommand {
    pub(crate) fn options(&self) -> &ScenarioOptions {
        match self {
            Self::All(options)
            | Self::Body(options)
            | Self::Signal(options)
            | Self::Attack(options)
            | Self::Soak(options) => options,
            Self::Routes(routes) => &routes.options,
            Self::Warm(warm) => &warm.options,
            Self::Stream(stream) => &stream.options,
            Self::Held(crowd) | Self::Release(crowd) | Self::Overflow(crowd) | Self::Hangup(crowd) => {
                &crowd.options
            }
        }
    }

    /// Returns `true` if the scenario measures all contenders, `false` if only Anteroom.
    pub(crate) fn compares(&self) -> bool {
        matches!(self, Self::All(_) | Self::Warm(_) | Self::Body(_) | Self::Stream(_))
    }

    /// Returns `true` if the scenario cannot run, or not completely, without Anteroom.
    pub(crate) fn needs_anteroom(&self) -> bool {
        matches!(self, Self::All(_)) || !self.compares()
    }
}

// === impl CrowdArgs ===

impl CrowdArgs {
    pub(crate) fn requests(&self) -> Option<usize> {
        self.requests.and_then(|requests| usize::try_from(requests).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cli_defaults_match_docs() {
        let LoadtestCli { scenario: ScenarioCommand::Warm(warm) } =
            LoadtestCli::parse_from(["loadtest", "warm"])
        else {
            panic!("another scenario");
        };
        assert_eq!(warm.options.contenders.len(), 5);
        assert_eq!(warm.connections, [1, 64]);
        assert!(LoadtestCli::try_parse_from(["loadtest", "warm", "--connections", "0"]).is_err());
    }
}
