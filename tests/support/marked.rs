//! Finds all processes started by a command under test, even after their parents have exited.

use std::{
    fs,
    process::{Child, Command, Stdio},
};

use rustix::process::Pid;

/// Environment variable that marks a command and, by inheritance, all its descendants.
const MARK_VARIABLE: &str = "ANTEROOM_TEST_MARK";

/// Mark of one command.
pub struct ProcessMark(String);

/// A process with the mark.
pub struct MarkedProcess {
    pub id: Pid,
    pub command: Vec<String>,
}

impl std::fmt::Debug for MarkedProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.id.as_raw_nonzero(), self.command.join(" "))
    }
}

// === impl ProcessMark ===

impl ProcessMark {
    pub fn new() -> Self {
        Self(format!("{}-{}", std::process::id(), fastrand::u64(..)))
    }

    /// Starts a command with the mark and with pipes for its output.
    pub fn spawn(&self, command: &mut Command) -> Child {
        let (name, value) = self.variable();
        let command = command.env(name, value).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Returns the environment variable the command needs.
    pub fn variable(&self) -> (&'static str, &str) {
        (MARK_VARIABLE, &self.0)
    }

    /// Returns the processes with the mark, including the command itself while it runs.
    pub fn processes(&self) -> Vec<MarkedProcess> {
        let mark = format!("{MARK_VARIABLE}={}", self.0);
        let words = |bytes: Vec<u8>| -> Vec<String> {
            bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
        };
        let folders = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        let marked = folders.filter_map(|folder| {
            let id = Pid::from_raw(folder.file_name().to_str()?.parse().ok()?)?;
            // Skip processes of other users and those that have exited.
            let environment = words(fs::read(folder.path().join("environ")).ok()?);
            let command = words(fs::read(folder.path().join("cmdline")).ok()?);
            environment.contains(&mark).then_some(MarkedProcess { id, command })
        });
        marked.collect()
    }
}
