//! Commands that only print, as a binary: `check`, `schema` and `crds`.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers as well")]

use std::{
    fs::{self, OpenOptions},
    process::{Command, Output, Stdio},
};

const ANTEROOM: &str = env!("CARGO_BIN_EXE_anteroom");

/// Every command that prints without a cluster or a model server.
fn printing_commands() -> [Vec<&'static str>; 5] {
    [
        vec!["check", "-c", "docs/example.yaml"],
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

/// Runs `check` on this text, with a variable `SECRET`.
fn check(text: &str) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.yaml");
    fs::write(&path, text).unwrap();
    let mut command = command(&["check", "--config", path.to_str().unwrap()]);
    command.env("SECRET", "x: {hunter2}").env("TIMEOUT", "20s").env("COUNT", "7").env_remove("UNSET");
    command.output().unwrap()
}

#[test]
fn variables_are_expanded_and_not_shown() {
    let output = check(
        "routes:\n  - name: a\n    match: { headers: { x-tenant: \"${env:SECRET}\" } }\n    \
         target: { process: { command: [sh, \"{port}\", \"${env:SECRET}\", $HOME], env: { KEY: \"~/x\" } } }\n    \
         hold: { maxRequests: \"${env:COUNT}\", timeout: \"${env:TIMEOUT}\" }\n",
    );
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(!text.contains("hunter2"), "{text}");
    for part in ["x-tenant: ${env:SECRET}", "7 requests", "20s", "env.KEY: \"~\" is passed on as it is"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("$HOME\" is passed"), "a shell expands it: {text}");
}

#[test]
fn variables_in_errors_are_not_shown() {
    let output = check(
        "listen: ${env:SECRET}\ndrainDelay: ${env:UNSET}\nroutes:\n  - name: a\n    target: { url: \"ftp://${env:SECRET}\" }\n    \
         hold: { maxRequests: \"${env:TIMEOUT}\", timeout: \"${env:COUNT}\" }\n",
    );
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
    for part in [
        "a.yaml:1:9: listen: expected an address",
        "found \"${env:SECRET}\", whose value is not shown",
        "a.yaml:2:13: drainDelay: the environment variable UNSET is not set; set it, or write $${env: for the text",
        "target.url: ",
        "hold.maxRequests: expected a whole number, at least 1, found \"${env:TIMEOUT}\", whose value is not shown",
        "hold.timeout: expected a number and a unit",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn process_settings_are_shown_without_secrets() {
    let output = check(
        "routes:\n  - name: a\n    target:\n      process:\n        \
         command: [sh, \"{port}\", --api-key, hunter2 hunter2, --token=hunter2]\n        \
         env: { HF_TOKEN: hunter2, MODE: hunter2 }\n        directory: /\n        idleTimeout: 7m\n    \
         readiness: { path: /ready, activationTimeout: 9m }\n",
    );
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("hunter2"), "{text}");
    for part in [
        "process of a\n",
        "sh {port} --api-key …",
        "--token=…",
        "idle       after 7m: stop; killed 30s after SIGTERM\n",
        "readiness  GET /ready every ",
        "ready within 9m\n",
        "directory  /\n",
        "env        HF_TOKEN, MODE\n",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}
