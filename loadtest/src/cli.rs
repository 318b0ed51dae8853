//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::contender::Contender;

/// Measures Anteroom against plain reverse proxies on this machine
#[derive(Debug, Parser)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) scenario: Scenario,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Scenario {
    /// All of them, one after the other
    All(Options),
    /// Small JSON answers through a proxy on one core: throughput, latency, CPU time
    Warm(Warm),
    /// Bodies from 2 KB to 8 MB: what it costs that the model's name is in them
    Body(Options),
    /// Answers that stream, many at the same time: throughput, and what an event has to wait
    Stream(Stream),
    /// A request for a route at zero, until KEDA's stream has been told: with one route, and with a thousand
    Signal(Options),
    /// 10,000 routes of a cluster, of which 1,000 a second change: whether requests to others notice
    Routes(Routes),
    /// Half an hour of everything, with gaps and cold starts: whether anything is left of it
    Soak(Options),
    /// 50,000 streaming requests held: memory, CPU time of keeping their clients informed
    Held(Crowd),
    /// 10,000 held requests when their model server gets ready: how soon, how fast, in which order
    Release(Crowd),
    /// Ten times as many requests as may wait: how soon the others are told, and whether those that wait are served
    Overflow(Crowd),
    /// 20,000 clients that hang up at once: how soon demand knows, what is left of them
    Hangup(Crowd),
    /// A well-behaved client beside one that means harm: its latency, and whether all of it is answered
    Attack(Options),
}

/// What every scenario takes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Short measurements, for a first look
    #[arg(long)]
    pub(crate) quick: bool,

    /// Write the results to FILE as well
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// What to measure, in this order; some scenarios are about anteroom alone
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAMES",
        default_value = "direct,anteroom,haproxy,nginx,envoy"
    )]
    pub(crate) contenders: Vec<Contender>,

    /// Seconds that one measurement takes [default: the scenario's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub(crate) seconds: Option<u16>,

    /// Turns that every contender gets [default: 5, 3 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    pub(crate) rounds: Option<u16>,

    /// Anteroom [default: `anteroom` in the folder of this program, built first where cargo runs us]
    #[arg(long, value_name = "PATH")]
    pub(crate) anteroom: Option<PathBuf>,

    /// HAProxy
    #[arg(long, value_name = "PATH", default_value = "haproxy")]
    pub(crate) haproxy: PathBuf,

    /// nginx
    #[arg(long, value_name = "PATH", default_value = "nginx")]
    pub(crate) nginx: PathBuf,

    /// Envoy
    #[arg(long, value_name = "PATH", default_value = "envoy")]
    pub(crate) envoy: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Warm {
    #[command(flatten)]
    pub(crate) options: Options,

    /// Clients, each with one connection and one request at a time
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "COUNTS",
        default_value = "1,64",
        value_parser = clap::value_parser!(u16).range(1..=4096)
    )]
    pub(crate) connections: Vec<u16>,

    /// Requests a second in the open loop: arrivals by schedule, which every contender has to bear
    #[arg(long, value_name = "N", default_value_t = crate::scenario::RATE, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) rate: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Stream {
    #[command(flatten)]
    pub(crate) options: Options,

    /// Streams at the same time
    #[arg(
        long,
        value_name = "COUNT",
        default_value_t = crate::scenario::STREAMS,
        value_parser = clap::value_parser!(u16).range(1..=4000)
    )]
    pub(crate) streams: u16,
}

#[derive(Debug, Args)]
pub(crate) struct Routes {
    #[command(flatten)]
    pub(crate) options: Options,

    /// Routes that the cluster has
    #[arg(long, value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u16).range(200..=10_000))]
    pub(crate) routes: u16,
}

#[derive(Debug, Args)]
pub(crate) struct Crowd {
    #[command(flatten)]
    pub(crate) options: Options,

    /// Clients, each with one connection and one request [default: the scenario's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub(crate) requests: Option<u32>,
}

// === impl Scenario ===

impl Scenario {
    pub(crate) fn options(&self) -> &Options {
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

    /// Whether all contenders take part, and not Anteroom alone.
    pub(crate) fn compares(&self) -> bool {
        matches!(self, Self::All(_) | Self::Warm(_) | Self::Body(_) | Self::Stream(_))
    }

    /// Whether there is nothing to measure, or not all, without Anteroom.
    pub(crate) fn needs_anteroom(&self) -> bool {
        matches!(self, Self::All(_)) || !self.compares()
    }
}

// === impl Crowd ===

impl Crowd {
    pub(crate) fn requests(&self) -> Option<usize> {
        self.requests.and_then(|requests| usize::try_from(requests).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let Cli { scenario: Scenario::Warm(warm) } = Cli::parse_from(["loadtest", "warm"]) else {
            panic!("another scenario");
        };
        assert_eq!(warm.options.contenders.len(), 5);
        assert_eq!(warm.connections, [1, 64]);
        assert!(Cli::try_parse_from(["loadtest", "warm", "--connections", "0"]).is_err());
    }
}
