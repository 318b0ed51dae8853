//! `anteroom bench` as a binary: measurements, files, output, and no processes left behind.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers as well")]

#[path = "support/marked.rs"]
mod marked;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use anteroom::{
    app::{self, BoundProxy},
    bench::results::{CycleVerdict, Run},
    config::Config,
    drain::StopSignal,
    scaler,
};
use marked::ProcessMark;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinHandle};

const ANTEROOM_BIN: &str = env!("CARGO_BIN_EXE_anteroom");

/// Result of a command that has exited.
struct BenchOutput {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// A running command.
struct BenchProcess {
    child: Child,
    mark: ProcessMark,
}

impl BenchProcess {
    fn start(arguments: &[&str]) -> Self {
        let mark = ProcessMark::new();
        let child = mark.spawn(Command::new(ANTEROOM_BIN).arg("bench").args(arguments));
        Self { child, mark }
    }

    /// Waits for the exit and checks that no process is left.
    fn end(mut self) -> BenchOutput {
        let mut errors = self.child.stderr.take().unwrap();
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            errors.read_to_string(&mut text).unwrap();
            text
        });
        let mut stdout = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        let code = self.child.wait().unwrap().code();
        let left = self.mark.processes();
        assert!(left.is_empty(), "left running: {left:?}");
        BenchOutput { code, stdout, stderr: errors.join().unwrap() }
    }
}

fn bench(arguments: &[&str]) -> BenchOutput {
    BenchProcess::start(arguments).end()
}

/// Runs a brief `cold-start` benchmark and returns its result with the paths of its files.
fn quick(folder: &TempDir, more: &[&str]) -> (BenchOutput, PathBuf, PathBuf) {
    let (json, html) = (folder.path().join("cold.json"), folder.path().join("cold.html"));
    let files = ["--json", json.to_str().unwrap(), "--html", html.to_str().unwrap()];
    let ended = bench(&[&["cold-start"][..], more, &files].concat());
    (ended, json, html)
}

/// A proxy in this process, with a stand-in that stops after `idle`.
struct BenchProxy {
    address: SocketAddr,
    admin: SocketAddr,
    commands: mpsc::Sender<app::Command>,
    running: JoinHandle<app::Account>,
}

impl BenchProxy {
    async fn start(idle: &str) -> Self {
        let config = format!(
            "listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nworkers: 1\nroutes:\n  - name: tiny\n    match: {{ models: [tiny] }}\n    \
             target: {{ process: {{ command: [\"{ANTEROOM_BIN}\", sim, --model=tiny, \"--port={{port}}\"], idleTimeout: {idle} }} }}\n"
        );
        let config = Config::parse(&config, "test.yaml").unwrap();
        let options = scaler::Options { guardian: ANTEROOM_BIN.into(), ..scaler::Options::default() };
        let bound = BoundProxy::new(config, options).await.unwrap();
        let (address, admin) = (bound.address, bound.admin_address);
        let (commands, received) = mpsc::channel(4);
        Self { address, admin, commands, running: tokio::spawn(bound.run(received)) }
    }

    /// Measures the proxy, with the files in a new folder.
    async fn bench(&self, more: &[&str]) -> (BenchOutput, TempDir) {
        let (url, admin) = (format!("http://{}", self.address), format!("http://{}", self.admin));
        let more: Vec<_> = more.iter().map(|word| (*word).to_owned()).collect();
        let measure = move || {
            let folder = tempfile::tempdir().unwrap();
            let to = ["--url", &url, "--admin", &admin];
            let more: Vec<_> = more.iter().map(String::as_str).collect();
            (quick(&folder, &[&to[..], &more].concat()).0, folder)
        };
        tokio::task::spawn_blocking(measure).await.unwrap()
    }

    async fn stop(self) {
        self.commands.send(app::Command::Stop(StopSignal::Interrupt)).await.unwrap();
        self.running.await.unwrap();
    }
}

#[test]
fn embedded_default_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    let more = [
        "--cycles",
        "3",
        "--load-time",
        "300ms",
        "--idle",
        "50ms",
        "--burst",
        "2",
        "--gpu-hour-price",
        "2.5",
    ];
    let (ended, json, html) = quick(&folder, &more);
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    assert_eq!(ended.stderr.matches("2 of 2 answered").count(), 3, "{}", ended.stderr);
    assert_eq!(ended.stdout.find(|c: char| c.is_control() && c != '\n'), None, "{:?}", ended.stdout);
    let run = Run::read(&json).unwrap();
    assert_eq!((run.cycles.len(), run.summary.counted, run.summary.requests_failed), (3, 3, 0));
    assert_eq!((run.route.as_str(), run.burst, run.idle_s), ("stand-in", 2, Some(0.05)));
    for cycle in &run.cycles {
        assert_eq!((cycle.verdict, &cycle.error), (CycleVerdict::Cold, &None));
        let record = cycle.cold_start.as_ref().unwrap();
        let sum: f64 = record.phases.iter().map(|phase| phase.duration_ms).sum();
        assert!((sum - record.total_ms).abs() < 0.001, "{record:?}");
        let ids: Vec<_> = cycle.requests.iter().map(|request| request.request_id.as_deref()).collect();
        assert!(ids.contains(&record.request_id.as_deref()), "{record:?}");
        // The client receives a token later than the proxy.
        let clock = cycle.outside_clock.unwrap();
        assert!(clock.client_ms > clock.record_ms, "{clock:?}");
        assert!(
            cycle
                .requests
                .iter()
                .all(|request| request.sent_ms >= 0.0 && request.ttft_ms < Some(request.total_ms))
        );
        assert_eq!(cycle.idle_ms.is_some(), cycle.number > 1);
    }
    // The stand-in is configured with 300 ms of load and 200 ms to the first token.
    let least = |name: &str| run.summary.rows().find(|row| row.name == name).unwrap().min_ms;
    assert!(least("load") >= 290.0 && least("t_e2e") >= 490.0, "{:?}", run.summary);
    // The table, the JSON and the page have the same rows.
    let page = fs::read_to_string(html).unwrap();
    for row in run.summary.rows() {
        assert!(ended.stdout.lines().any(|line| line.trim_start().starts_with(&row.name)), "{}", row.name);
        assert!(page.contains(&format!("data-row=\"{}\"", row.name)), "{}", row.name);
        assert!(page.contains(&format!("data-ms=\"{}\"", row.median_ms)), "{}", row.name);
    }
    // docs/bench.md contains the command and its output.
    let document = include_str!("../docs/bench.md");
    let shown = document
        .split("```console\n")
        .find(|block| block.starts_with("$ anteroom bench cold-start"))
        .unwrap();
    for row in run.summary.rows() {
        assert!(
            shown.lines().any(|line| line.split(' ').any(|word| word == row.name)),
            "{} in docs/bench.md",
            row.name
        );
    }
    // The results must not contain local paths.
    let text = fs::read_to_string(&json).unwrap() + &page;
    assert!(!text.contains(folder.path().to_str().unwrap()), "a path is in the results");
}

#[test]
fn ctrl_c_keeps_finished_cycles_and_cleans_up() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("cold.json");
    let more = ["cold-start", "--cycles", "1000", "--load-time", "50ms", "--idle", "20ms", "--json"];
    let mut running = BenchProcess::start(&[&more[..], &[json.to_str().unwrap()]].concat());
    let mut lines = BufReader::new(running.child.stderr.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("cycle    1/1000  first token after"));
    kill_process(Pid::from_child(&running.child), Signal::INT).unwrap();
    let rest: Vec<_> = lines.map(Result::unwrap).collect();
    let status = running.child.wait().unwrap();
    assert_eq!(status.code(), Some(130), "{rest:?}");
    assert!(rest.last().unwrap().starts_with("interrupted after "), "{rest:?}");
    assert!(running.mark.processes().is_empty());
    let run = Run::read(&json).unwrap();
    assert!(run.interrupted && !run.cycles.is_empty() && run.cycles.len() < 1000);
    assert_eq!(run.summary.counted, run.cycles.len());
}

#[test]
fn failed_cold_starts_report_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("anteroom.yaml");
    let text = format!(
        "routes:\n  - name: broken\n    target:\n      process: {{ command: [\"{ANTEROOM_BIN}\", sim, \"--port={{port}}\", \
         --load-time=100ms, --fail-load=3] }}\n"
    );
    fs::write(&config, text).unwrap();
    let more = ["--cycles", "1", "--idle", "50ms", "--config", config.to_str().unwrap()];
    let (ended, json, html) = quick(&folder, &more);
    assert_eq!(ended.code, Some(1), "{}{}", ended.stdout, ended.stderr);
    assert!(
        ended.stderr.contains("failed, does not count: ") && ended.stderr.contains('3'),
        "{}",
        ended.stderr
    );
    let run = Run::read(&json).unwrap();
    assert_eq!((run.summary.failed, run.summary.counted, run.summary.requests_failed), (1, 0, 1));
    assert_eq!(run.settings.target, "own");
    let record = run.cycles[0].cold_start.as_ref().unwrap();
    assert_eq!(run.cycles[0].error.as_deref(), record.reason.as_deref());
    assert_eq!(run.cycles[0].requests[0].status, Some(503));
    assert!(fs::read_to_string(html).unwrap().contains("failed: "));
}

#[tokio::test(flavor = "multi_thread")]
async fn running_proxy_is_measured_from_outside() {
    let proxy = BenchProxy::start("50ms").await;
    let more =
        ["--cycles", "2", "--burst", "3", "--arrivals", "spread=50ms", "--no-stream", "--label", "remote"];
    let (ended, folder) = proxy.bench(&more).await;
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    let run = Run::read(&folder.path().join("cold.json")).unwrap();
    assert_eq!((run.settings.target.as_str(), run.idle_s, run.route.as_str()), ("running", None, "tiny"));
    assert_eq!(run.settings.model.as_deref(), Some("tiny"), "the model that the proxy lists");
    assert_eq!((run.summary.counted, run.summary.requests), (2, 6));
    assert!(run.cycles.iter().flat_map(|cycle| &cycle.requests).all(|request| request.ttft_ms.is_none()));
    assert!(run.cycles.iter().all(|cycle| cycle.requests[2].sent_ms >= 45.0), "spread over 50 ms");
    assert!(!run.command.iter().any(|word| word.contains("127.0.0.1")), "{:?}", run.command);
    proxy.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn target_at_minimum_one_is_not_measured() {
    let proxy = BenchProxy::start("1h").await;
    let (ended, _) = proxy.bench(&["--cycles", "1"]).await;
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    for (more, expected) in [
        (&["--timeout", "200ms"][..], "route tiny is not at zero after 200ms (ready): it scales down after"),
        (
            &["--stop-command", "echo it cannot >&2; false"],
            "the --stop-command failed (exit status: 1): it cannot",
        ),
        (
            &["--stop-command", "true", "--timeout", "200ms"],
            "the --stop-command ran but did not stop the target",
        ),
        (&["--route", "big"], "has no route big; it has: tiny"),
    ] {
        let (ended, _) = proxy.bench(more).await;
        assert_eq!(ended.code, Some(2), "{more:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{more:?}: {}", ended.stderr);
    }
    proxy.stop().await;
}

#[test]
fn unmeasurable_target_error_names_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (empty, times) = (file("empty.txt", "\n"), file("times.txt", "0\n1\n"));
    let unsorted = file("unsorted.txt", "1\n0\n");
    let two = file(
        "two.yaml",
        "routes:\n  - { name: a, match: { models: [a] }, target: { url: \"http://127.0.0.1:1\" } }\n  - { name: b, match: { \
         models: [b] }, target: { url: \"http://127.0.0.1:2\" } }\n",
    );
    let wrong = file("wrong.yaml", "routes: 7\n");
    // Port 1 has no listener.
    let nobody = "http://127.0.0.1:1";
    for (arguments, expected) in [
        (&["--cycles", "0"][..], "0 is not in 1..=10000"),
        (&["--url", nobody], "--admin"),
        (&["--url", "https://a", "--admin", nobody], "kubectl port-forward"),
        (
            &["--url", nobody, "--admin", nobody],
            "cannot reach the admin API at http://127.0.0.1:1: cannot connect",
        ),
        (&["--arrivals", "never"], "expected together, spread=2s"),
        (&["--arrivals", &unsorted], "line 2: 0 comes before the time above it"),
        (&["--arrivals", &times, "--burst", "3"], "the --arrivals file has 2 times"),
        (&["--prompts", &empty], "the file contains no prompts"),
        (&["--prompts", "/nowhere/prompts"], "cannot read /nowhere/prompts"),
        (&["--json", "/nowhere/cold.json"], "cannot write /nowhere/cold.json"),
        (&["--config", &two], "choose one with --route: a, b"),
        (&["--config", &two, "--route", "c"], "no route c; it has: a, b"),
        (&["--config", &wrong], "wrong.yaml:1"),
        (&["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ] {
        let ended = bench(&[&["cold-start"][..], arguments].concat());
        assert_eq!(ended.code, Some(2), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{arguments:?}: {}", ended.stderr);
        assert_eq!(ended.stdout, "", "{arguments:?}");
    }
}

/// Writes a made-up run whose loads take `factor` times as long.
fn write_run(path: &Path, measured: &Value, factor: f64) {
    let mut run = measured.clone();
    let cycles = run["cycles"].as_array_mut().unwrap();
    let first = cycles[0].clone();
    *cycles = (0..8)
        .map(|number| {
            let mut cycle = first.clone();
            cycle["number"] = (number + 1).into();
            let load = factor * f64::from(3000 + 7 * number);
            let record = &mut cycle["cold_start"];
            for phase in
                record["phases"].as_array_mut().unwrap().iter_mut().filter(|phase| phase["name"] == "load")
            {
                phase["duration_ms"] = load.into();
            }
            record["t_e2e_ms"] = (load + 50.0).into();
            cycle
        })
        .collect();
    fs::write(path, run.to_string()).unwrap();
}

#[test]
fn compare_exit_code_signals_regression() {
    let folder = tempfile::tempdir().unwrap();
    let (ended, json, _) = quick(&folder, &["--cycles", "1", "--load-time", "50ms", "--idle", "20ms"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let measured: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let path = |name: &str| folder.path().join(name);
    write_run(&path("before.json"), &measured, 1.0);
    write_run(&path("same.json"), &measured, 1.0001);
    write_run(&path("slower.json"), &measured, 1.3);
    let compare = |after: &str, more: &[&str]| {
        let (before, after) = (path("before.json"), path(after));
        bench(&[&["compare", before.to_str().unwrap(), after.to_str().unwrap()][..], more].concat())
    };
    let same = compare("same.json", &[]);
    assert_eq!(same.code, Some(0), "{}{}", same.stdout, same.stderr);
    assert!(same.stdout.contains("No regression"), "{}", same.stdout);
    let slower = compare("slower.json", &[]);
    assert_eq!(slower.code, Some(1), "{}{}", slower.stdout, slower.stderr);
    assert!(slower.stdout.contains("Regression: slower in load, t_e2e."), "{}", slower.stdout);
    assert_eq!(compare("slower.json", &["--threshold", "50%"]).code, Some(0));
    assert_eq!(compare("slower.json", &["--floor", "10s"]).code, Some(0));
    // Five cycles per run are too few to show the slowdown.
    for (from, to) in [("before.json", "five-before.json"), ("slower.json", "five-slower.json")] {
        let mut run: Value = serde_json::from_slice(&fs::read(path(from)).unwrap()).unwrap();
        run["cycles"].as_array_mut().unwrap().truncate(5);
        fs::write(path(to), run.to_string()).unwrap();
    }
    let five = ["five-before.json", "five-slower.json"].map(|name| path(name).to_str().unwrap().to_owned());
    let untold = bench(&["compare", &five[0], &five[1]]);
    assert_eq!(untold.code, Some(3), "{}{}", untold.stdout, untold.stderr);
    assert!(untold.stdout.contains("Cannot tell: with 5 and 5 cycles"), "{}", untold.stdout);
    let told: Value = serde_json::from_str(&compare("slower.json", &["--json"]).stdout).unwrap();
    assert_eq!(
        (&told["schema"], &told["regression"]),
        (&"anteroom.dev/bench-compare/v1".into(), &true.into())
    );
    let load = told["rows"].as_array().unwrap().iter().find(|row| row["name"] == "load").unwrap();
    assert_eq!(load["change"], "worse");

    fs::write(path("other.json"), "{}").unwrap();
    for (after, more, expected) in [
        ("missing.json", &[][..], "cannot read"),
        ("other.json", &[], "expected the output of `bench cold-start --json`"),
        ("same.json", &["--alpha", "2"], "between 0 and 1"),
        ("same.json", &["--threshold", "x"], "such as 5%"),
    ] {
        let ended = compare(after, more);
        assert_eq!(ended.code, Some(2), "{after}: {}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{after}: {}", ended.stderr);
    }
}
