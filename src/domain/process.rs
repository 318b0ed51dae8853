//! A model server on this machine.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Period;

/// How to run a model server on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProcessTarget {
    /// The program and its arguments. `{port}` becomes the free port that the server must listen on, at 127.0.0.1.
    pub command: Vec<String>,
    /// Environment variables, on top of our own environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The folder to start it in. Default: ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// How long after the last request the server is idle.
    #[serde(default = "ProcessTarget::default_idle_timeout")]
    pub idle_timeout: Period,
    /// What becomes of the server when it is idle.
    #[serde(default)]
    pub when_idle: WhenIdle,
    /// How deep it sleeps. 1: the weights go to the machine's memory; 2: they are discarded, and read again on waking.
    #[serde(default = "ProcessTarget::default_sleep_level")]
    #[schemars(range(min = 1, max = 2))]
    pub sleep_level: u8,
    /// How long it sleeps before it is stopped. Default: as long as nobody wants it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_after: Option<Period>,
    /// How long the server has between SIGTERM and SIGKILL.
    #[serde(default = "ProcessTarget::default_stop_timeout")]
    pub stop_timeout: Period,
}

/// What becomes of a model server that is idle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum WhenIdle {
    /// It is stopped, and nothing is left of it.
    #[default]
    Stop,
    /// It sleeps, and gives the GPU's memory back: vLLM with `--enable-sleep-mode` and `VLLM_SERVER_DEV_MODE=1`.
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
