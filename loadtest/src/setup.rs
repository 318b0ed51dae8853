//! Resources of a run: cores, programs, durations.

use std::collections::BTreeMap;
use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::cli::{ScenarioCommand, ScenarioOptions};
use crate::contender::{Contender, InstalledContender, Programs};
use crate::cores::{self, Cores};
use crate::error::LoadtestError;

/// Created once, before the first scenario.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) cores: Cores,
    /// Set by a signal: the running scenario then ends with [`LoadtestError::Interrupted`].
    pub(crate) stop: Arc<AtomicBool>,
    /// Brief measurements, for a first impression.
    pub(crate) quick: bool,
    rounds: Option<u16>,
    seconds: Option<u16>,
    installed: Vec<InstalledContender>,
}

// === impl Setup ===

impl Setup {
    /// Finds the programs that `scenario` measures, and moves this thread to the core of the clients and the backend.
    pub(crate) fn new(scenario: &ScenarioCommand, stop: Arc<AtomicBool>) -> Result<Self, LoadtestError> {
        let options = scenario.options();
        let cores = Cores::choose()?;
        let installed = find(scenario, || options.anteroom.clone().map_or_else(built, Ok))?;
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

    /// Returns the contenders to be measured, in order.
    pub(crate) fn contenders(&self) -> &[InstalledContender] {
        &self.installed
    }

    /// Returns `true` if `contender` is measured.
    pub(crate) fn measures(&self, contender: Contender) -> bool {
        self.installed.iter().any(|each| each.contender == contender)
    }

    /// Returns Anteroom, for scenarios that measure nothing else.
    pub(crate) fn anteroom(&self) -> Result<&InstalledContender, LoadtestError> {
        self.installed
            .iter()
            .find(|each| each.contender == Contender::Anteroom)
            .ok_or(LoadtestError::NotMeasured)
    }

    /// Returns the number of rounds per contender.
    pub(crate) fn rounds(&self) -> u16 {
        self.rounds.unwrap_or(if self.quick { 3 } else { 5 })
    }

    /// Returns the duration of one measurement in whole seconds; `quick` and `full` are the scenario's defaults.
    pub(crate) fn seconds(&self, quick: u16, full: u16) -> u16 {
        self.seconds.unwrap_or(if self.quick { quick } else { full })
    }

    /// Returns the duration of one measurement; `quick` and `full` are the scenario's defaults.
    pub(crate) fn duration(&self, quick: Duration, full: Duration) -> Duration {
        let own = if self.quick { quick } else { full };
        self.seconds.map_or(own, |seconds| Duration::from_secs(seconds.into()))
    }

    pub(crate) fn check_stop(&self) -> Result<(), LoadtestError> {
        if self.stop.load(Ordering::Relaxed) { Err(LoadtestError::Interrupted) } else { Ok(()) }
    }

    pub(crate) fn versions(&self) -> BTreeMap<&'static str, String> {
        self.installed
            .iter()
            .filter_map(|each| Some((each.contender.name(), each.version.clone()?)))
            .collect()
    }
}

/// Returns the contenders of `--contenders` that the scenario measures, each once and in that order.
fn wanted(scenario: &ScenarioCommand) -> Result<Vec<Contender>, LoadtestError> {
    let mut wanted = Vec::new();
    for contender in &scenario.options().contenders {
        if !wanted.contains(contender) {
            wanted.push(*contender);
        }
    }
    if scenario.needs_anteroom() && !wanted.contains(&Contender::Anteroom) {
        return Err(LoadtestError::NotMeasured);
    }
    if !scenario.compares() {
        wanted.retain(|contender| *contender == Contender::Anteroom);
    }
    Ok(wanted)
}

/// Finds the programs of the contenders. Anteroom is resolved last: it may have to be built first, which would be
/// wasted if another program is missing.
fn find(
    scenario: &ScenarioCommand,
    anteroom: impl FnOnce() -> Result<PathBuf, LoadtestError>,
) -> Result<Vec<InstalledContender>, LoadtestError> {
    let contenders = wanted(scenario)?;
    let (ours, others): (Vec<_>, Vec<_>) = contenders.iter().partition(|contender| contender.is_anteroom());
    let ScenarioOptions { haproxy, nginx, envoy, .. } = scenario.options();
    let mut programs = Programs {
        anteroom: PathBuf::new(),
        haproxy: haproxy.clone(),
        nginx: nginx.clone(),
        envoy: envoy.clone(),
    };
    let mut installed = Vec::with_capacity(contenders.len());
    for contender in others {
        installed.push(InstalledContender::find(contender, &programs, &contenders)?);
    }
    if !ours.is_empty() {
        programs.anteroom = anteroom()?;
    }
    for contender in ours {
        let instead: &[_] = if scenario.needs_anteroom() { &[] } else { &contenders };
        installed.push(InstalledContender::find(contender, &programs, instead)?);
    }
    installed.sort_by_key(|each| contenders.iter().position(|contender| *contender == each.contender));
    Ok(installed)
}

/// Returns the path of Anteroom beside this program. Under cargo, builds it first, so the measured binary matches the
/// source tree.
fn built() -> Result<PathBuf, LoadtestError> {
    let beside = env::current_exe().unwrap_or_default().with_file_name("anteroom");
    let Some(cargo) = env::var_os("CARGO") else { return Ok(beside) };
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    eprintln!("building anteroom ({profile})");
    let status = Command::new(cargo)
        .args(["build", "--package", "anteroom", "--bin", "anteroom", "--profile", profile])
        .stdin(Stdio::null())
        .status()
        .map_err(|error| LoadtestError::io("run cargo", error))?;
    if status.success() { Ok(beside) } else { Err(LoadtestError::Build(status)) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use clap::Parser;

    use super::*;
    use crate::cli::LoadtestCli;

    const ANTEROOM_ONLY: [&str; 8] =
        ["held", "release", "overflow", "hangup", "attack", "signal", "routes", "soak"];

    fn scenario(words: &[&str]) -> ScenarioCommand {
        LoadtestCli::parse_from(["loadtest"].iter().chain(words)).scenario
    }

    /// Creates a program that prints its name as its version.
    fn program(dir: &Path, name: &str) -> String {
        let file = dir.join(name);
        fs::write(&file, format!("#!/bin/sh\necho {name} 1\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        file.display().to_string()
    }

    #[test]
    fn anteroom_scenario_needs_no_other_contender() {
        let dir = tempfile::tempdir().unwrap();
        let anteroom = program(dir.path(), "anteroom");
        let gone = ["--haproxy", "/nowhere/a", "--nginx", "/nowhere/b", "--envoy", "/nowhere/c"];
        for name in ANTEROOM_ONLY {
            let found =
                find(&scenario(&[&[name][..], &gone].concat()), || Ok(anteroom.clone().into())).unwrap();
            let said: Vec<_> = found.iter().map(|each| each.version.as_deref().unwrap()).collect();
            assert_eq!(said, ["anteroom 1"], "{name}");
        }
    }

    #[test]
    fn missing_programs_are_reported_before_the_build() {
        let dir = tempfile::tempdir().unwrap();
        let (haproxy, nginx) = (program(dir.path(), "haproxy"), program(dir.path(), "nginx"));
        for name in ["all", "warm", "body", "stream"] {
            let words = [name, "--haproxy", &haproxy, "--nginx", &nginx, "--envoy", "/nowhere/envoy"];
            let error = find(&scenario(&words), || panic!("built in vain")).unwrap_err().to_string();
            assert!(
                error.starts_with("cannot find /nowhere/envoy: ") && error.contains("--envoy"),
                "{error}"
            );
            assert!(
                error.ends_with("leave it out with --contenders direct,anteroom,haproxy,nginx"),
                "{error}"
            );
        }
    }

    #[test]
    fn contenders_keep_command_line_order() {
        let dir = tempfile::tempdir().unwrap();
        let (anteroom, nginx) = (program(dir.path(), "anteroom"), program(dir.path(), "nginx"));
        let words = ["warm", "--nginx", &nginx, "--contenders", "anteroom,nginx,direct,nginx"];
        let found = find(&scenario(&words), || Ok(anteroom.into())).unwrap();
        let names: Vec<_> = found.iter().map(|each| each.contender.name()).collect();
        assert_eq!(names, ["anteroom", "nginx", "direct"]);
    }

    #[test]
    fn measured_contender_cannot_be_left_out() {
        for name in ANTEROOM_ONLY.into_iter().chain(["all"]) {
            let left_out = find(&scenario(&[name, "--contenders", "direct"]), || panic!("built in vain"));
            assert!(matches!(left_out, Err(LoadtestError::NotMeasured)), "{name}");
            let words = [name, "--contenders", "direct,anteroom"];
            let error = find(&scenario(&words), || Ok("/nowhere/anteroom".into())).unwrap_err().to_string();
            assert!(error.ends_with("pass its path with --anteroom"), "{error}");
        }
    }
}
