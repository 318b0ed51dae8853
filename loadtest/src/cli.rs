//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::contender::{Contender, Programs};

/// Measures Anteroom against plain reverse proxies on this machine
#[derive(Debug, Parser)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) scenario: Scenario,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Scenario {
    /// Small JSON answers through a proxy on one core: throughput, latency, CPU time
    Warm(Warm),
}

#[derive(Debug, Args)]
pub(crate) struct Warm {
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

    /// Clients, each with one connection and one request at a time
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "COUNTS",
        default_value = "1,64",
        value_parser = clap::value_parser!(u16).range(1..=4096)
    )]
    pub(crate) connections: Vec<u16>,

    /// Seconds that one measurement takes [default: 5, 1 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=60))]
    seconds: Option<u16>,

    /// Turns that every contender gets [default: 5, 3 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: Option<u16>,

    /// Anteroom [default: `anteroom` in the folder of this program]
    #[arg(long, value_name = "PATH")]
    anteroom: Option<PathBuf>,

    /// HAProxy
    #[arg(long, value_name = "PATH", default_value = "haproxy")]
    haproxy: PathBuf,

    /// nginx
    #[arg(long, value_name = "PATH", default_value = "nginx")]
    nginx: PathBuf,

    /// Envoy
    #[arg(long, value_name = "PATH", default_value = "envoy")]
    envoy: PathBuf,
}

// === impl Warm ===

impl Warm {
    pub(crate) fn duration(&self) -> Duration {
        Duration::from_secs(self.seconds.unwrap_or(if self.quick { 1 } else { 5 }).into())
    }

    pub(crate) fn warm_up(&self) -> Duration {
        Duration::from_millis(if self.quick { 300 } else { 1000 })
    }

    pub(crate) fn rounds(&self) -> u16 {
        self.rounds.unwrap_or(if self.quick { 3 } else { 5 })
    }

    pub(crate) fn programs(&self) -> Programs {
        Programs {
            anteroom: self.anteroom.clone(),
            haproxy: self.haproxy.clone(),
            nginx: self.nginx.clone(),
            envoy: self.envoy.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let Cli { scenario: Scenario::Warm(warm) } = Cli::parse_from(["loadtest", "warm"]);
        assert_eq!(warm.contenders.len(), 5);
        assert_eq!(warm.connections, [1, 64]);
        assert_eq!((warm.rounds(), warm.duration()), (5, Duration::from_secs(5)));
        assert!(Cli::try_parse_from(["loadtest", "warm", "--connections", "0"]).is_err());
    }
}
