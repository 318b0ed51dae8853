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
    /// Threads that serve requests [default: one per core].
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
    /// Puts what was given in place of what the file says.
    pub(super) fn apply(&self, config: &mut Config) {
        let Self { listen, admin, workers, drain_delay, drain_timeout, log_format } = self;
        config.listen = listen.unwrap_or(config.listen);
        config.admin = admin.unwrap_or(config.admin);
        config.workers = workers.or(config.workers);
        config.drain_delay = drain_delay.unwrap_or(config.drain_delay);
        config.drain_timeout = drain_timeout.unwrap_or(config.drain_timeout);
        config.log = log_format.unwrap_or(config.log);
    }
}
