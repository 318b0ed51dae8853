//! Overrides of the file from flags and environment variables.

use std::{net::SocketAddr, num::NonZeroUsize};

use super::{Config, LogFormat};
use crate::domain::Period;

/// Top-level keys as flags and variables; a flag beats its variable, which beats the file.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Overrides of the file")]
pub struct Overrides {
    /// Address of the API; port 0 picks a free one.
    #[arg(long, env = "ANTEROOM_LISTEN", value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Address of the dashboard, metrics, probes and the JSON API; port 0 picks a free one.
    #[arg(long, env = "ANTEROOM_ADMIN", value_name = "ADDRESS")]
    pub admin: Option<SocketAddr>,
    /// Address of the gRPC scaler for KEDA; port 0 picks a free one.
    #[arg(long, env = "ANTEROOM_SCALER", value_name = "ADDRESS")]
    pub scaler: Option<SocketAddr>,
    /// Worker threads; default: one per core.
    #[arg(long, env = "ANTEROOM_WORKERS", value_name = "NUMBER")]
    pub workers: Option<NonZeroUsize>,
    /// Time after SIGTERM in which new connections are still accepted, such as 5s.
    #[arg(long, env = "ANTEROOM_DRAIN_DELAY", value_name = "DURATION")]
    pub drain_delay: Option<Period>,
    /// Time that requests may take to finish after that, such as 30s.
    #[arg(long, env = "ANTEROOM_DRAIN_TIMEOUT", value_name = "DURATION")]
    pub drain_timeout: Option<Period>,
    /// Format of the log.
    #[arg(long, env = "ANTEROOM_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

// === impl Overrides ===

impl Overrides {
    /// Applies the overrides and returns the keys they set.
    pub(super) fn apply(&self, config: &mut Config) -> Vec<&'static str> {
        let Self { listen, admin, scaler, workers, drain_delay, drain_timeout, log_format } = *self;
        let given = [
            ("listen", set(&mut config.listen, listen)),
            ("admin", set(&mut config.admin, admin)),
            ("scaler", set(&mut config.scaler, scaler.map(Some))),
            ("workers", set(&mut config.workers, workers.map(Some))),
            ("drainDelay", set(&mut config.drain_delay, drain_delay)),
            ("drainTimeout", set(&mut config.drain_timeout, drain_timeout)),
            ("log", set(&mut config.log.format, log_format)),
        ];
        given.into_iter().filter_map(|(key, given)| given.then_some(key)).collect()
    }
}

fn set<T>(target: &mut T, value: Option<T>) -> bool {
    let given = value.is_some();
    if let Some(value) = value {
        *target = value;
    }
    given
}
