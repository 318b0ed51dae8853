//! Finds what a command under test has started, whoever the parents are by now.

use std::{
    fs,
    process::{Child, Command, Stdio},
};

use rustix::process::Pid;

/// The variable by which a command and all that it starts are known: they inherit it.
const NAME: &str = "ANTEROOM_TEST_MARK";

/// The mark of one command.
pub struct Mark(String);

/// A process with the mark.
pub struct Process {
    pub id: Pid,
    pub command: Vec<String>,
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.id.as_raw_nonzero(), self.command.join(" "))
    }
}

// === impl Mark ===

impl Mark {
    pub fn new() -> Self {
        Self(format!("{}-{}", std::process::id(), fastrand::u64(..)))
    }

    /// Starts a command with the mark, and with pipes for what it prints.
    pub fn spawn(&self, command: &mut Command) -> Child {
        let (name, value) = self.variable();
        let command = command.env(name, value).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// What the command has to have in its environment.
    pub fn variable(&self) -> (&'static str, &str) {
        (NAME, &self.0)
    }

    /// The processes with the mark, the command itself included while it runs.
    pub fn processes(&self) -> Vec<Process> {
        let mark = format!("{NAME}={}", self.0);
        let words = |bytes: Vec<u8>| -> Vec<String> {
            bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
        };
        let folders = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        let marked = folders.filter_map(|folder| {
            let id = Pid::from_raw(folder.file_name().to_str()?.parse().ok()?)?;
            // Of another user, or gone.
            let environment = words(fs::read(folder.path().join("environ")).ok()?);
            let command = words(fs::read(folder.path().join("cmdline")).ok()?);
            environment.contains(&mark).then_some(Process { id, command })
        });
        marked.collect()
    }
}
