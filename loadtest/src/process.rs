//! Process of a contender, started on its core and stopped on drop.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::clock::Instant;
use crate::cores::{self, Cores};
use crate::error::LoadtestError;

/// Time to exit after SIGTERM.
const SIGTERM_GRACE: Duration = Duration::from_secs(2);

/// A running process. Dropping it stops it and its children.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

// === impl Process ===

impl Process {
    /// Starts `program` on the contender's core, with its output in `log`.
    pub(crate) fn start(
        program: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
        env: &[(&str, &OsStr)],
        log: PathBuf,
        cores: Cores,
    ) -> Result<Self, LoadtestError> {
        let what = || format!("start {}", program.display());
        let output = File::create(&log).map_err(|error| LoadtestError::io(what(), error))?;
        let errors = output.try_clone().map_err(|error| LoadtestError::io(what(), error))?;
        let mut command = Command::new(program);
        command
            .args(args)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0);
        cores::pin(cores.contender)?;
        let child = command.spawn();
        cores::pin(cores.rig)?;
        Ok(Self { child: child.map_err(|error| LoadtestError::io(what(), error))?, log })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns the reason if the process has exited.
    pub(crate) fn ended(&mut self) -> Option<String> {
        match self.child.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(status.to_string()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// Waits for the exit and returns its reason, or `None` if the process outlives `patience`.
    pub(crate) fn exit_reason_within(&mut self, patience: Duration) -> Option<String> {
        let deadline = Instant::now() + patience;
        loop {
            let ended = self.ended();
            if ended.is_some() || Instant::now() >= deadline {
                return ended;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Returns the last 20 lines of the output.
    pub(crate) fn log(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(pid) = i32::try_from(self.id()).ok().and_then(Pid::from_raw) else { return };
        // Errors do not matter if the process has already exited.
        if self.ended().is_none() {
            let _ = kill_process(pid, Signal::TERM);
            let _ = self.exit_reason_within(SIGTERM_GRACE);
        }
        // The process leads a group of its own, so the signal reaches workers that outlive their master.
        let _ = kill_process_group(pid, Signal::KILL);
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs;

    fn start(dir: &Path, script: &str) -> Process {
        let cores = Cores::choose().unwrap();
        Process::start(Path::new("/bin/sh"), ["-c", script], &[], dir.join("log"), cores).unwrap()
    }

    #[test]
    fn drop_kills_process_ignoring_sigterm() {
        let dir = tempfile::tempdir().unwrap();
        let process = start(dir.path(), "trap '' TERM; sleep 60 & echo up; wait");
        while !process.log().contains("up") {
            std::thread::sleep(Duration::from_millis(5));
        }
        let family = procfs::process_tree(process.id());
        assert_eq!(family.len(), 2, "the shell and its sleep");
        drop(process);
        // The kernel takes a moment to end a killed process.
        let deadline = Instant::now() + Duration::from_secs(30);
        while family.iter().any(|pid| alive(*pid)) {
            assert!(Instant::now() < deadline, "one of {family:?} is still there");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn exit_is_reported_with_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start(dir.path(), "echo no such key; exit 3");
        while process.ended().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(process.log(), "no such key");
    }

    fn alive(pid: u32) -> bool {
        // A killed grandchild that is not reaped here stays a zombie for a moment.
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" Z")))
    }
}
