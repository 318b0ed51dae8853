//! Long-running process with a log file. It can be killed and restarted, and is killed when its owner is dropped.

use std::{
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use tokio::process::{Child, Command};

use crate::wait;

/// Program that is always started with the same arguments.
pub(crate) struct Daemon {
    name: String,
    log: PathBuf,
    make: Box<dyn Fn() -> Command + Send + Sync>,
    child: Option<Child>,
}

// === impl Daemon ===

impl Daemon {
    /// Creates the daemon without starting it. Its output goes to `NAME.log` in the folder.
    pub(crate) fn new(name: &str, logs: &Path, make: impl Fn() -> Command + Send + Sync + 'static) -> Self {
        let log = logs.join(format!("{name}.log"));
        Self { name: name.to_owned(), log, make: Box::new(make), child: None }
    }

    pub(crate) fn start(&mut self) {
        assert!(self.child.is_none(), "{} has been started", self.name);
        let log = append(&self.log);
        let mut command = (self.make)();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).kill_on_drop(true);
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {}: {error}", self.name));
        self.child = Some(child);
    }

    /// Kills the process with SIGKILL, as in a crash.
    pub(crate) async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().await.unwrap();
        }
    }

    /// Returns the exit status if the process has exited.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().unwrap()
    }

    pub(crate) fn id(&self) -> Option<u32> {
        self.child.as_ref()?.id()
    }

    /// Waits for the exit, which the caller has caused.
    pub(crate) async fn end(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("it has been started");
        wait::within(&format!("the end of {}", self.name), wait::WAIT_LIMIT, child.wait()).await.unwrap()
    }

    /// Waits until `ready` returns `Ok`. Panics at once if the process exits.
    pub(crate) async fn ready(&mut self, mut ready: impl AsyncFnMut() -> Result<(), String>) {
        let name = self.name.clone();
        wait::until(&format!("{name} to be ready"), wait::WAIT_LIMIT, async || {
            if let Some(status) = self.ended() {
                panic!("{name} has ended ({status}), and its last lines are:\n{}", tail(&self.log, 30));
            }
            ready().await
        })
        .await;
    }

    pub(crate) fn log(&self) -> &Path {
        &self.log
    }
}

pub(crate) fn append(file: &Path) -> File {
    OpenOptions::new().create(true).append(true).open(file).unwrap()
}

/// Returns the last lines of a file.
pub(crate) fn tail(file: &Path, lines: usize) -> String {
    let text = std::fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let from = text.lines().count().saturating_sub(lines);
    text.lines().skip(from).collect::<Vec<_>>().join("\n")
}
