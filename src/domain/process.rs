//! Targets that run as a process on this machine.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Period;

/// Command line and lifecycle of a model server on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProcessTarget {
    /// Program and arguments. `{port}` is replaced by a free port, on which the server must listen at 127.0.0.1.
    pub command: Vec<String>,
    /// Environment variables, added to those of the proxy.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory. Default: that of the proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// Time after the last request until the server counts as idle.
    #[serde(default = "ProcessTarget::default_idle_timeout")]
    pub idle_timeout: Period,
    /// Action when the server is idle.
    #[serde(default)]
    pub when_idle: WhenIdle,
    /// vLLM's sleep level. 1: offload the weights to CPU memory; 2: discard them and reload on wake-up.
    #[serde(default = "ProcessTarget::default_sleep_level")]
    #[schemars(range(min = 1, max = 2))]
    pub sleep_level: u8,
    /// Time asleep after which the server is stopped. Default: it sleeps until it is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_after: Option<Period>,
    /// Time between SIGTERM and SIGKILL.
    #[serde(default = "ProcessTarget::default_stop_timeout")]
    pub stop_timeout: Period,
}

/// Action when a model server is idle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum WhenIdle {
    /// Stop the process.
    #[default]
    Stop,
    /// Put the server to sleep, which frees GPU memory. Needs vLLM with `--enable-sleep-mode` and
    /// `VLLM_SERVER_DEV_MODE=1`.
    Sleep,
}

// === impl ProcessTarget ===

impl ProcessTarget {
    fn default_idle_timeout() -> Period {
        Period::from_secs(300)
    }

    fn default_sleep_level() -> u8 {
        1
    }

    fn default_stop_timeout() -> Period {
        Period::from_secs(30)
    }
}
