//! What a run has to work with: cores, programs, how long it may take.

use std::collections::BTreeMap;
use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::cli::Options;
use crate::contender::{Contender, Installed, Programs};
use crate::cores::{self, Cores};
use crate::error::Error;

/// Made once, before the first scenario.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) cores: Cores,
    /// Set by a signal: the scenario that runs ends with [`Error::Interrupted`].
    pub(crate) stop: Arc<AtomicBool>,
    /// Short measurements, for a first look.
    pub(crate) quick: bool,
    rounds: Option<u16>,
    seconds: Option<u16>,
    installed: Vec<Installed>,
}

// === impl Setup ===

impl Setup {
    /// Finds the programs, and moves this thread to the core that the clients and the backend have.
    pub(crate) fn new(options: &Options, stop: Arc<AtomicBool>) -> Result<Self, Error> {
        let cores = Cores::choose()?;
        let mut contenders = Vec::new();
        for contender in &options.contenders {
            if !contenders.contains(contender) {
                contenders.push(*contender);
            }
        }
        let programs = Programs {
            anteroom: options.anteroom.clone().map_or_else(built, Ok)?,
            haproxy: options.haproxy.clone(),
            nginx: options.nginx.clone(),
            envoy: options.envoy.clone(),
        };
        let installed = contenders
            .iter()
            .map(|contender| Installed::find(*contender, &programs, &contenders))
            .collect::<Result<_, _>>()?;
        cores::pin(cores.rig)?;
        Ok(Self {
            cores,
            stop,
            quick: options.quick,
            rounds: options.rounds,
            seconds: options.seconds,
            installed,
        })
    }

    /// What is measured, in its order.
    pub(crate) fn contenders(&self) -> &[Installed] {
        &self.installed
    }

    /// Whether it is among what is measured.
    pub(crate) fn measures(&self, contender: Contender) -> bool {
        self.installed.iter().any(|each| each.contender == contender)
    }

    /// Anteroom, for the scenarios that are about nobody else.
    pub(crate) fn anteroom(&self) -> Result<&Installed, Error> {
        self.installed.iter().find(|each| each.contender == Contender::Anteroom).ok_or(Error::NotMeasured)
    }

    /// Turns that every contender gets.
    pub(crate) fn rounds(&self) -> u16 {
        self.rounds.unwrap_or(if self.quick { 3 } else { 5 })
    }

    /// Seconds that one measurement takes, for those that think in whole ones; `quick` and `full` are a scenario's own.
    pub(crate) fn seconds(&self, quick: u16, full: u16) -> u16 {
        self.seconds.unwrap_or(if self.quick { quick } else { full })
    }

    /// How long one measurement takes; `quick` and `full` are a scenario's own.
    pub(crate) fn duration(&self, quick: Duration, full: Duration) -> Duration {
        let own = if self.quick { quick } else { full };
        self.seconds.map_or(own, |seconds| Duration::from_secs(seconds.into()))
    }

    pub(crate) fn check_stop(&self) -> Result<(), Error> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }

    pub(crate) fn versions(&self) -> BTreeMap<&'static str, String> {
        self.installed
            .iter()
            .filter_map(|each| Some((each.contender.name(), each.version.clone()?)))
            .collect()
    }
}

/// Anteroom beside this program. Where cargo runs us it is built first: what is measured is what is in the tree.
fn built() -> Result<PathBuf, Error> {
    let beside = env::current_exe().unwrap_or_default().with_file_name("anteroom");
    let Some(cargo) = env::var_os("CARGO") else { return Ok(beside) };
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    eprintln!("building anteroom ({profile})");
    let status = Command::new(cargo)
        .args(["build", "--package", "anteroom", "--bin", "anteroom", "--profile", profile])
        .stdin(Stdio::null())
        .status()
        .map_err(|error| Error::io("run cargo", error))?;
    if status.success() { Ok(beside) } else { Err(Error::Build(status)) }
}
