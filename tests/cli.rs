//! Commands that only print or write files, as a binary: `check`, `schema`, `crds`, `completions` and `man`.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers as well")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, OpenOptions},
    process::{Command, Output, Stdio},
};

use anteroom::cli::Cli;
use clap::CommandFactory as _;

const ANTEROOM: &str = env!("CARGO_BIN_EXE_anteroom");

/// Every command that prints without a cluster or a model server.
fn printing_commands() -> [Vec<&'static str>; 6] {
    [
        vec!["check", "-c", "docs/example.yaml"],
        vec!["schema"],
        vec!["crds"],
        vec!["completions", "bash"],
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

/// Returns the program and its visible subcommands by the names of their man pages, such as `anteroom-bench-compare`.
fn visible_commands() -> BTreeMap<String, clap::Command> {
    let mut found = BTreeMap::new();
    let mut open = vec![("anteroom".to_owned(), Cli::command())];
    while let Some((name, definition)) = open.pop() {
        for subcommand in definition.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
            open.push((format!("{name}-{}", subcommand.get_name()), subcommand.clone()));
        }
        found.insert(name, definition);
    }
    assert!(found.contains_key("anteroom-bench-compare"), "{:?}", found.keys());
    found
}

/// Returns the completion script of a shell.
fn completions(shell: &str) -> String {
    let output = command(&["completions", shell]).output().unwrap();
    assert!(output.status.success(), "{shell}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn completions_name_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = completions(shell);
        let words = script.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').collect::<BTreeSet<_>>();
        for (name, definition) in visible_commands() {
            assert!(words.contains(definition.get_name()), "{shell}: {name}");
        }
    }
}

#[test]
fn bash_completes_subcommands() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("anteroom.bash");
    fs::write(&path, completions("bash")).unwrap();
    let parsed = Command::new("bash").arg("-n").arg(&path).output().unwrap();
    assert!(parsed.status.success(), "{}", String::from_utf8_lossy(&parsed.stderr));

    // Calls the script's function as bash does for `anteroom bench co<TAB>`.
    let complete = ". \"$1\"; COMP_WORDS=(anteroom bench co); COMP_CWORD=2; _anteroom anteroom co bench; \
                    echo \"${COMPREPLY[*]}\"";
    let output = Command::new("bash").args(["-c", complete, "bash"]).arg(&path).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "cold-start compare\n", "{errors}");
}

#[test]
fn every_visible_command_has_a_man_page() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("share/man1");
    let output = command(&["man", pages.to_str().unwrap()]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut expected = BTreeSet::new();
    for (name, definition) in visible_commands() {
        let file = format!("{name}.1");
        let page = fs::read_to_string(pages.join(&file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        // roff needs a backslash before a hyphen.
        let page = page.replace("\\-", "-");
        let arguments = definition.get_arguments().filter(|argument| !argument.is_hide_set());
        for flag in arguments.filter_map(|argument| argument.get_long()) {
            assert!(page.contains(&format!("--{flag}")), "--{flag} in {file}");
        }
        if name == "anteroom-serve" {
            assert!(page.contains("ANTEROOM_CONFIG"), "{page}");
        }
        expected.insert(file);
    }
    let written =
        fs::read_dir(&pages).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(written.collect::<BTreeSet<_>>(), expected);
}

#[test]
fn man_reports_a_folder_it_cannot_write() {
    let output = command(&["man", "/dev/null/man1"]).output().unwrap();
    let message = "error: cannot write man pages to /dev/null/man1: Not a directory (os error 20)\n";
    assert_eq!(String::from_utf8_lossy(&output.stderr), message);
    assert_eq!(output.status.code(), Some(1));
}
