//! `anteroom demo` as a binary, and the documents that describe it.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers as well")]

#[path = "support/marked.rs"]
mod marked;

use std::{
    collections::HashSet,
    fs,
    io::{BufReader, Read as _},
    process::{Child, Command, ExitStatus},
    thread::sleep,
    time::Duration,
};

use anteroom::{config::Config, kube::ModelRoute};
use marked::{MarkedProcess, ProcessMark};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const README: &str = include_str!("../README.md");

struct Demo {
    child: Child,
    mark: ProcessMark,
}

/// Result of a demo that has exited.
struct DemoOutput {
    status: ExitStatus,
    stdout: String,
    stderr: String,
    /// Processes left running.
    left: Vec<MarkedProcess>,
}

impl Demo {
    fn start(arguments: &[&str]) -> Self {
        let mark = ProcessMark::new();
        let child = mark.spawn(Command::new(env!("CARGO_BIN_EXE_anteroom")).arg("demo").args(arguments));
        Self { child, mark }
    }

    /// Reads the output until it contains this text.
    fn until(&mut self, text: &str) -> String {
        // Byte by byte, so that later output is not consumed.
        let mut read = Vec::new();
        while !String::from_utf8_lossy(&read).contains(text) {
            let mut byte = [0];
            let count = self.child.stdout.as_mut().unwrap().read(&mut byte).unwrap();
            assert_eq!(count, 1, "it ended before: {}", String::from_utf8_lossy(&read));
            read.push(byte[0]);
        }
        String::from_utf8(read).unwrap()
    }

    /// Waits for the process of the model server.
    fn sim(&self) -> Pid {
        loop {
            let is_sim = |process: &MarkedProcess| process.command.get(1).is_some_and(|word| word == "sim");
            if let Some(sim) = self.mark.processes().into_iter().find(is_sim) {
                return sim.id;
            }
            sleep(Duration::from_millis(2));
        }
    }

    fn interrupt(&self) {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
    }

    fn end(mut self) -> DemoOutput {
        let mut stdout = String::new();
        let mut errors = self.child.stderr.take().unwrap();
        let errors = std::thread::spawn(move || {
            let mut stderr = String::new();
            errors.read_to_string(&mut stderr).unwrap();
            stderr
        });
        BufReader::new(self.child.stdout.take().unwrap()).read_to_string(&mut stdout).unwrap();
        let status = self.child.wait().unwrap();
        DemoOutput { status, stdout, stderr: errors.join().unwrap(), left: self.mark.processes() }
    }
}

fn assert_nothing_is_left(ended: &DemoOutput) {
    assert!(ended.left.is_empty(), "left running: {:?}", ended.left);
    assert!(ended.stdout.ends_with("Stopped; nothing is left running.\n"), "{}", ended.stdout);
}

#[test]
fn once_reports_a_cold_start_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let json = file.to_str().unwrap();
    // An earlier, longer report is replaced.
    fs::write(&file, "x".repeat(1 << 20)).unwrap();
    let ended = Demo::start(&["--once", "--requests", "8", "--load-time", "300ms", "--json", json]).end();
    assert_eq!(ended.status.code(), Some(0), "{}{}", ended.stdout, ended.stderr);
    assert_eq!(ended.stderr, "");
    assert_nothing_is_left(&ended);
    assert_eq!(ended.stdout.find(|c: char| c.is_control() && c != '\n'), None, "{:?}", ended.stdout);
    assert!(ended.stdout.contains("8 admitted = 8 completed + 0 held + 0 in flight"), "{}", ended.stdout);

    let report: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["load_time"], "300ms");
    assert_eq!(report["problems"], serde_json::json!([]));
    let cold_start = &report["cold_start"];
    assert_eq!(cold_start["outcome"], "completed");
    assert!((1..=8).contains(&cold_start["held_peak"].as_u64().unwrap()), "{cold_start}");
    assert_eq!(cold_start["failed"], 0);
    let phases = cold_start["phases"].as_array().unwrap();
    let names: Vec<_> = phases.iter().map(|phase| phase["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["signal", "start", "load", "dispatch", "first_byte", "first_token"]);
    let sum: f64 = phases.iter().map(|phase| phase["duration_ms"].as_f64().unwrap()).sum();
    assert!((sum - cold_start["total_ms"].as_f64().unwrap()).abs() < 0.001, "{cold_start}");
    let clients = &report["clients"];
    assert_eq!((&clients["requests"], &clients["completed"]), (&8.into(), &8.into()));
    assert_eq!(clients["each"].as_array().unwrap().len(), 8);
    for client in clients["each"].as_array().unwrap() {
        assert_eq!(client["tokens"], 7, "{client}");
        // No client can receive its first token before the first byte of the cold start.
        let first_token = client["first_token_ms"].as_f64().unwrap();
        assert!(first_token >= cold_start["total_ms"].as_f64().unwrap(), "{report}");
    }
    let account = &report["account"];
    assert_eq!((&account["admitted"], &account["outcomes"]["completed"]), (&8.into(), &8.into()));
    assert_eq!(account["balances"], true);
}

#[test]
fn ctrl_c_during_load_leaves_no_processes() {
    let mut demo = Demo::start(&["--load-time", "5m"]);
    demo.until("the model server's process runs");
    demo.sim();
    demo.interrupt();
    let ended = demo.end();
    assert_eq!(ended.status.code(), Some(130), "{}{}", ended.stdout, ended.stderr);
    assert_nothing_is_left(&ended);
}

#[test]
fn demo_keeps_running_until_ctrl_c() {
    let mut demo = Demo::start(&["--load-time", "0", "--requests", "1"]);
    let report = demo.until("Ctrl-C ends the demo.");
    assert!(report.contains("curl -N http://127.0.0.1:"), "{report}");
    demo.interrupt();
    let ended = demo.end();
    assert_eq!(ended.status.code(), Some(0), "{}{}", ended.stdout, ended.stderr);
    assert_nothing_is_left(&ended);
}

#[test]
fn a_model_server_that_dies_fails_the_demo() {
    let mut demo = Demo::start(&["--once", "--load-time", "5m", "--requests", "1"]);
    demo.until("the model server's process runs");
    kill_process(demo.sim(), Signal::KILL).unwrap();
    let ended = demo.end();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stdout);
    assert_nothing_is_left(&ended);
    assert!(ended.stderr.contains("error: the cold start ended as failed: "), "{}", ended.stderr);
    assert!(ended.stderr.contains("error: 1 of 1 requests failed; #1: "), "{}", ended.stderr);
}

#[test]
fn impossible_bench_is_refused_before_it_starts() {
    for (arguments, says) in [
        (["--requests", "0"], "0 is not in 1..=200"),
        (["--load-time", "fast"], "is not a duration"),
        (["--load-time", "1h"], "too long for a demo"),
        (["--json", "/nowhere/report.json"], "cannot write /nowhere/report.json"),
    ] {
        let ended = Demo::start(&arguments).end();
        assert!(!ended.status.success(), "{arguments:?}");
        assert!(ended.stderr.contains(says), "{arguments:?}: {}", ended.stderr);
        assert_eq!(ended.stdout, "", "{arguments:?}");
    }
}

/// Returns the code blocks of a document in this language.
fn blocks(document: &'static str, language: &str) -> Vec<&'static str> {
    let start = format!("```{language}\n");
    document.split(start.as_str()).skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

/// Returns a line of output without the parts that vary between runs: numbers with units, bars, and spacing.
fn shape(line: &str) -> String {
    let mut shape = String::new();
    for c in line.chars() {
        match c {
            '█' | '▏' | '▕' | '├' | '┼' | '┤' | '─' | '<' | '>' => {}
            '0'..='9' | '.' if shape.ends_with('0') => {}
            '0'..='9' => shape.push('0'),
            c => shape.push(c),
        }
    }
    let words: Vec<_> = shape.split_whitespace().filter(|word| !matches!(*word, "s" | "ms" | "%")).collect();
    // The labels of an axis are reduced to zeros, so such a line is dropped.
    if words.iter().all(|word| *word == "0") { String::new() } else { words.join(" ") }
}

#[test]
fn demo_document_matches_output() {
    let ended = Demo::start(&["--once", "--load-time", "2s"]).end();
    assert_eq!(ended.status.code(), Some(0), "{}{}", ended.stdout, ended.stderr);
    let [shown] = blocks(include_str!("../docs/demo.md"), "console").try_into().unwrap();
    let shapes = |text: &str| text.lines().map(shape).collect::<HashSet<_>>();
    let (shown, printed) = (shapes(shown), shapes(&ended.stdout));
    let missing: Vec<_> = printed.difference(&shown).collect();
    assert!(missing.is_empty(), "not in docs/demo.md: {missing:#?}");
    let outdated: Vec<_> = shown.difference(&printed).filter(|line| !line.starts_with("$ ")).collect();
    assert!(outdated.is_empty(), "not printed any more: {outdated:#?}");
}

#[test]
fn readme_commands_and_configurations_exist() {
    for command in ["cargo run --release -- demo", "cargo test"] {
        assert!(README.contains(command), "{command}");
    }
    let word =
        |text: &str| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap().to_owned();
    for command in README.split("`anteroom ").skip(1).map(word) {
        let run = Command::new(env!("CARGO_BIN_EXE_anteroom")).args([&command, "--help"]).output().unwrap();
        assert!(run.status.success(), "anteroom {command}");
    }
    let configurations = blocks(README, "yaml");
    assert!(!configurations.is_empty());
    for configuration in configurations {
        if configuration.starts_with("apiVersion: anteroom.dev/") {
            serde_saphyr::from_str::<ModelRoute>(configuration).unwrap();
        } else {
            Config::parse(configuration, "README.md").unwrap();
        }
    }
}
