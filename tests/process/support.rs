//! A route with its supervisor, and commands that record their process ids.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anteroom::{
    admission::{Gate, Permit},
    coldstart::{ColdStart, ColdStarts},
    domain::{Period, Policy, ProcessTarget, Target, WhenIdle},
    hold::{ReleaseOutcome, Ticket},
    scaler::{self, Options, Shutdown},
};
use rustix::process::{Pid, test_kill_process};
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinHandle};

/// The executable under test.
pub(crate) const ANTEROOM_BIN: &str = env!("CARGO_BIN_EXE_anteroom");

/// Supervised route with one target.
pub(crate) struct SupervisedRoute {
    pub(crate) gate: Arc<Gate>,
    pub(crate) store: Arc<ColdStarts>,
    pub(crate) targets: watch::Sender<Target>,
    pub(crate) shutdown: Shutdown,
    task: JoinHandle<()>,
}

/// File to which commands append process ids.
pub(crate) struct Pids(TempDir);

/// Awaits `work`; panics after a minute instead of hanging.
pub(crate) async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), work).await.expect("nothing happened for a minute")
}

/// Polls a condition that sends no notification until it is true.
pub(crate) async fn eventually(condition: impl Fn() -> bool) {
    within(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

pub(crate) fn settings() -> Policy {
    let mut policy = Policy::default();
    policy.readiness.interval = Period::from_millis(10);
    policy.readiness.timeout = Period::from_secs(10);
    policy
}

pub(crate) fn process(command: Vec<String>) -> Target {
    Target::Process(ProcessTarget {
        command,
        env: [("NO_COLOR".into(), "{port}".into())].into(),
        directory: None,
        idle_timeout: Period::from_secs(600),
        when_idle: WhenIdle::Stop,
        sleep_level: 1,
        stop_after: None,
        stop_timeout: Period::from_secs(60),
    })
}

/// Returns the command of a stand-in for vLLM.
pub(crate) fn sim(arguments: &[&str]) -> Vec<String> {
    let command = [ANTEROOM_BIN, "sim", "--port", "{port}"];
    command.iter().chain(arguments).map(|&word| word.to_owned()).collect()
}

/// Returns the command of a shell script, in which `"$0" "$@"` is `command`.
pub(crate) fn sh(script: &str, command: &[String]) -> Vec<String> {
    let mut words = vec!["sh".into(), "-c".into(), script.into()];
    words.extend_from_slice(command);
    words
}

pub(crate) fn alive(pid: Pid) -> bool {
    test_kill_process(pid).is_ok()
}

/// Parses process ids, one per line.
pub(crate) fn pids(text: &str) -> Vec<Pid> {
    text.lines().map(|line| Pid::from_raw(line.trim().parse().unwrap()).unwrap()).collect()
}

// === impl Pids ===

impl Pids {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("pids")
    }

    pub(crate) fn path(&self) -> String {
        self.file().to_str().unwrap().to_owned()
    }

    /// Returns a script that appends the shell's own id to the file, then runs `script`.
    pub(crate) fn then(&self, script: &str) -> String {
        format!("echo $$ >> {}; {script}", self.path())
    }

    /// Returns all ids recorded so far.
    pub(crate) fn all(&self) -> Vec<Pid> {
        pids(&std::fs::read_to_string(self.file()).unwrap_or_default())
    }
}

// === impl SupervisedRoute ===

impl SupervisedRoute {
    pub(crate) fn new(target: Target) -> Self {
        Self::with(target, settings())
    }

    pub(crate) fn with(target: Target, policy: Policy) -> Self {
        let store = ColdStarts::new(|_| {});
        let gate = Gate::new("tiny".into(), policy, store.clone());
        let (targets, watched) = watch::channel(target);
        let shutdown = Shutdown::default();
        let options = Options { guardian: ANTEROOM_BIN.into(), ..Options::default() };
        let task = tokio::spawn(scaler::supervise(gate.clone(), watched, options, shutdown.clone()));
        Self { gate, store, targets, shutdown, task }
    }

    /// Enters a request that finds no endpoint with room, and holds it.
    pub(crate) fn hold(&self) -> Ticket<Permit> {
        assert!(self.gate.enter().is_none(), "it did not wait");
        self.gate.hold(0, true).unwrap()
    }

    /// Returns the permit of a dispatched request, held first if there was no room.
    pub(crate) async fn permit(&self) -> Permit {
        if let Some((permit, _)) = self.gate.enter() {
            return permit;
        }
        match within(self.gate.hold(0, true).unwrap().released()).await {
            ReleaseOutcome::Dispatch(permit) => permit,
            ReleaseOutcome::Failed(reason, _) => panic!("{reason}"),
            ReleaseOutcome::Draining => panic!("draining"),
        }
    }

    pub(crate) fn records(&self) -> Vec<ColdStart> {
        self.store.recent(None, 100)
    }

    /// Waits until the target has this status.
    pub(crate) async fn status(&self, name: &str) {
        eventually(|| self.gate.target().status().name() == name).await;
    }

    /// Retires the target and waits until its supervisor ends.
    pub(crate) async fn end(self) {
        self.shutdown.drain();
        within(self.task).await.unwrap();
    }
}
