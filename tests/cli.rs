//! Commands that only print, as a binary: `check`, `schema` and `crds`.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers as well")]

use std::{
    fs::OpenOptions,
    process::{Command, Stdio},
};

const ANTEROOM: &str = env!("CARGO_BIN_EXE_anteroom");

/// Every command that prints without a cluster or a model server.
fn printing_commands() -> [Vec<&'static str>; 5] {
    [
        vec!["check", "--config", "docs/example.yaml"],
        vec!["schema"],
        vec!["crds"],
        vec!["bench", "compare", "docs/bench/vllm-cpu.json", "docs/bench/vllm-cpu.json"],
        vec!["bench", "trace", "office-week"],
    ]
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(ANTEROOM);
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
    command
}

#[test]
fn closed_pipe_ends_commands_without_a_message() {
    for arguments in printing_commands() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command(&arguments).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{arguments:?}");
        assert_eq!(output.status.code(), Some(128 + 13), "{arguments:?}");
    }
}

#[test]
fn full_device_fails_commands_with_a_message() {
    for arguments in printing_commands() {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = command(&arguments).stdout(full).stderr(Stdio::piped()).output().unwrap();
        let message = "error: cannot write to standard output: No space left on device (os error 28)\n";
        assert_eq!(String::from_utf8_lossy(&output.stderr), message, "{arguments:?}");
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    }
}
