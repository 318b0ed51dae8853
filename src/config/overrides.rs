//! What flags and variables override.

use std::{net::SocketAddr, num::NonZeroUsize};

use super::{Config, LogFormat};
use crate::domain::Period;

/// The top level of the file as flags and variables; a flag beats its variable, which beats the file.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Overrides of the file")]
pub struct Overrides {
    /// Address that requests come in at; port 0 takes a free one.
    #[arg(long, env = "ANTEROOM_LISTEN", value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Address of metrics, probes and the JSON API; port 0 takes a free one.
    #[arg(long, env = "ANTEROOM_ADMIN", value_name = "ADDRESS")]
    pub admin: Option<SocketAddr>,
    /// Address of the scaler that KEDA asks; port 0 takes a free one.
    #[arg(long, env = "ANTEROOM_SCALER", value_name = "ADDRESS")]
    pub scaler: Option<SocketAddr>,
    /// Threads that serve requests; without it, one per core.
    #[arg(long, env = "ANTEROOM_WORKERS", value_name = "NUMBER")]
    pub workers: Option<NonZeroUsize>,
    /// How long new connections are still accepted after SIGTERM, such as 5s.
    #[arg(long, env = "ANTEROOM_DRAIN_DELAY", value_name = "DURATION")]
    pub drain_delay: Option<Period>,
    /// How long requests may take to finish after that, such as 30s.
    #[arg(long, env = "ANTEROOM_DRAIN_TIMEOUT", value_name = "DURATION")]
    pub drain_timeout: Option<Period>,
    /// How the log is written.
    #[arg(long, env = "ANTEROOM_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

// === impl Overrides ===

impl Overrides {
    /// Puts what was given in place of what the file says. Returns the keys that the file no longer decides.
    pub(super) fn apply(&self, config: &mut Config) -> Vec<&'static str> {
        let Self { listen, admin, scaler, workers, drain_delay, drain_timeout, log_format } = *self;
        let given = [
            ("listen", set(&mut config.listen, listen)),
            ("admin", set(&mut config.admin, admin)),
            ("scaler", set(&mut config.scaler, scaler.map(Some))),
            ("workers", set(&mut config.workers, workers.map(Some))),
            ("drainDelay", set(&mut config.drain_delay, drain_delay)),
            ("drainTimeout", set(&mut config.drain_timeout, drain_timeout)),
            ("log", set(&mut config.log, log_format)),
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
