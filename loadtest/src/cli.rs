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

    /// What to measure, in this order
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
}

// === impl Scenario ===

impl Scenario {
    pub(crate) fn options(&self) -> &Options {
        match self {
            Self::All(options) => options,
            Self::Warm(warm) => &warm.options,
        }
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
