//! The launcher, the guardian and the prober, with real processes. Nothing here depends on the speed of the machine.

#![allow(clippy::unwrap_used, reason = "the helpers are test code too")]

mod load;
mod sleep;
mod support;

use std::{
    os::unix::process::ExitStatusExt as _,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use anteroom::{
    coldstart::ColdStartOutcome,
    domain::{Period, ProcessTarget, Target},
    hold::ReleaseOutcome,
    state::Status,
};
use rustix::process::{Signal, kill_process};
use support::{ANTEROOM_BIN, Pids, SupervisedRoute, alive, eventually, process, settings, sh, sim, within};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpListener,
    process::Command,
};

// === launcher ===

#[tokio::test]
async fn many_requests_start_one_server() {
    let pids = Pids::new();
    let route =
        SupervisedRoute::new(process(sh(&pids.then("exec \"$0\" \"$@\""), &sim(&["--load-time", "50ms"]))));
    let waiting: Vec<_> = (0..20).map(|_| route.hold()).collect();
    for (index, mut ticket) in waiting.into_iter().enumerate() {
        let ReleaseOutcome::Dispatch(permit) = within(ticket.released()).await else {
            panic!("not released")
        };
        if index == 0 {
            route.gate.cold_starts().dispatched();
        }
        permit.first_byte();
    }
    assert_eq!(pids.all().len(), 1, "started once");
    let [record] = route.records().try_into().unwrap();
    assert_eq!((record.outcome, record.held_peak), (Some(ColdStartOutcome::Completed), 20));
    let phases: Vec<_> = record.phases.iter().map(|span| span.name.name()).collect();
    assert_eq!(phases, ["signal", "start", "load", "dispatch", "first_byte"]);
    assert_eq!(route.gate.target().status(), Status::Ready);
    route.end().await;
    assert!(!alive(pids.all()[0]));
}

#[tokio::test]
async fn wrong_readiness_path_is_reported_at_run_time() {
    let mut policy = settings();
    policy.readiness.path = "/nowhere".into();
    policy.readiness.activation_timeout = Period::from_secs(600);
    let route = SupervisedRoute::with(process(sim(&[])), policy);
    let _held = route.hold();
    let reason = || route.gate.target().obstacle().map(|obstacle| obstacle.message.to_string());
    eventually(|| reason().is_some()).await;
    assert_eq!(reason().unwrap(), "/nowhere answers 404: is `readiness.path` right?");
    assert_eq!(route.gate.target().status(), Status::Starting);
    route.end().await;
}

#[tokio::test]
async fn exit_while_loading_fails_held_requests() {
    let route = SupervisedRoute::new(process(sim(&["--load-time", "20ms", "--fail-load=3"])));
    let (mut first, mut second) = (route.hold(), route.hold());
    for ticket in [&mut first, &mut second] {
        let ReleaseOutcome::Failed(reason, retry_after) = within(ticket.released()).await else {
            panic!("released")
        };
        assert!(
            reason.starts_with("the command exited with code 3 while loading; its last line: "),
            "{reason}"
        );
        let (reason, last_lines) = reason.split_once("\nIts last lines:\n").unwrap();
        assert!(reason.contains("torch.OutOfMemoryError: CUDA out of memory"), "{reason}");
        assert!(last_lines.contains("Traceback (most recent call last):"), "{last_lines}");
        assert!(last_lines.lines().count() <= 10);
        assert_eq!(retry_after, Some(Duration::from_secs(1)));
    }
    let [record] = route.records().try_into().unwrap();
    assert_eq!(record.outcome, Some(ColdStartOutcome::Failed));
    assert!(record.last_lines.iter().any(|line| line.contains("torch.OutOfMemoryError")));
    assert!(matches!(route.gate.target().status(), Status::Failed(_)));
    assert!(!route.gate.demand().is_leased());
    route.end().await;
}

#[tokio::test]
async fn next_start_waits_for_the_backoff() {
    let pids = Pids::new();
    // The script fails on the first start only.
    let script = pids.then(&format!("[ $(wc -l < {}) -gt 1 ] || exit 1; exec \"$0\" \"$@\"", pids.path()));
    let route = SupervisedRoute::new(process(sh(&script, &sim(&[]))));
    assert!(matches!(within(route.hold().released()).await, ReleaseOutcome::Failed(..)));
    let mut next = route.hold();
    assert!(matches!(within(next.released()).await, ReleaseOutcome::Dispatch(_)));
    assert_eq!(pids.all().len(), 2);
    route.end().await;
}

#[tokio::test]
async fn start_failing_twice_alike_is_not_retryable() {
    let pids = Pids::new();
    // The last log line differs from start to start; the third start ends with another exit code.
    let script = pids.then(&format!(
        "[ $(wc -l < {}) -gt 2 ] && exit 4; echo \"[pid $$] CUDA out of memory at 0x$$\"; exit 3",
        pids.path()
    ));
    let route = SupervisedRoute::new(process(sh(&script, &[])));
    for (start, is_to_be_retried) in [("the first", true), ("the second", false), ("the third", true)] {
        let ReleaseOutcome::Failed(reason, retry_after) = within(route.hold().released()).await else {
            panic!("{start} was released")
        };
        assert_eq!(retry_after.is_some(), is_to_be_retried, "{start}: {reason}");
    }
    assert_eq!(pids.all().len(), 3);
    route.end().await;
}

#[tokio::test]
async fn unrunnable_command_fails_at_once() {
    let fail = async |target: ProcessTarget| {
        let route = SupervisedRoute::new(Target::Process(target));
        let ReleaseOutcome::Failed(reason, _) = within(route.hold().released()).await else {
            panic!("released")
        };
        route.end().await;
        reason.to_string()
    };
    let Target::Process(missing) = process(vec!["no-such-command".into()]) else { unreachable!() };
    let reason = fail(missing.clone()).await;
    assert!(
        reason.starts_with("the command could not be started: cannot run `no-such-command`: No such file"),
        "{reason}"
    );
    let reason = fail(ProcessTarget { command: vec!["/dev/null".into()], ..missing.clone() }).await;
    assert!(reason.contains("cannot run `/dev/null`: Permission denied"), "{reason}");
    let reason = fail(ProcessTarget { directory: Some("/no/such/folder".into()), ..missing }).await;
    assert!(reason.contains("`/no/such/folder`, does not exist"), "{reason}");
}

#[tokio::test]
async fn never_ready_server_is_stopped_with_its_answer() {
    let pids = Pids::new();
    let hang = sim(&["--load-time", "10ms", "--closed-time", "0s", "--hang-load"]);
    let mut settings = settings();
    // One second is enough to listen even on a slow machine; if not, the reason reports the refused connection instead
    // of a 503.
    settings.readiness.activation_timeout = Period::from_secs(1);
    let route = SupervisedRoute::with(process(sh(&pids.then("exec \"$0\" \"$@\""), &hang)), settings);
    let ReleaseOutcome::Failed(reason, _) = within(route.hold().released()).await else { panic!("released") };
    assert!(
        reason.starts_with("the target was not ready within 1s: the last probe of /health saw: "),
        "{reason}"
    );
    route.end().await;
    assert!(!alive(pids.all()[0]));
}

#[tokio::test]
async fn idle_server_stops_and_starts_again() {
    let pids = Pids::new();
    let mut target = process(sh(&pids.then("exec \"$0\" \"$@\""), &sim(&[])));
    set_idle(&mut target, 20);
    let route = SupervisedRoute::new(target);
    for starts in 1..=3 {
        drop(route.permit().await);
        route.status("idle").await;
        assert!(
            pids.all().len() == starts && !alive(pids.all()[starts - 1]),
            "it is gone when the route is idle"
        );
        assert!(route.gate.target().endpoints().is_empty());
    }
    assert_eq!(route.records().len(), 3);
    route.end().await;
}

#[tokio::test]
async fn server_in_use_is_not_stopped() {
    let pids = Pids::new();
    let mut target = process(sh(&pids.then("exec \"$0\" \"$@\""), &sim(&[])));
    set_idle(&mut target, 5);
    let route = SupervisedRoute::new(target);
    let permit = route.permit().await;
    // A hundred idle timeouts: an unused server would be stopped.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(permit.endpoint().is_ready() && alive(pids.all()[0]));
    assert_eq!(route.gate.target().status(), Status::Ready);
    drop(permit);
    route.status("idle").await;
    route.end().await;
}

#[tokio::test]
async fn start_without_clients_ends_as_abandoned() {
    let mut target = process(sim(&["--load-time", "20ms"]));
    set_idle(&mut target, 20);
    let route = SupervisedRoute::new(target);
    let mut ended = route.store.changed();
    drop(route.hold());
    within(ended.changed()).await.unwrap();
    assert_eq!(route.records()[0].outcome, Some(ColdStartOutcome::Abandoned));
    route.status("idle").await;
    route.end().await;
}

#[tokio::test]
async fn crash_while_serving_starts_the_next_server() {
    let pids = Pids::new();
    let route = SupervisedRoute::new(process(sh(&pids.then("exec \"$0\" \"$@\""), &sim(&[]))));
    let mut ticket = route.hold();
    let ReleaseOutcome::Dispatch(permit) = within(ticket.released()).await else { panic!("not released") };
    route.gate.cold_starts().dispatched();
    permit.first_byte();
    kill_process(pids.all()[0], Signal::KILL).unwrap();
    route.status("failed").await;
    let Status::Failed(reason) = route.gate.target().status() else { panic!("not failed any more") };
    assert!(
        reason.starts_with("the command was killed by SIGKILL while serving; its last line: "),
        "{reason}"
    );
    assert_eq!(route.gate.in_flight(), 1, "its answer may still be on its way to the client");
    let mut again = route.gate.readmit(ticket.place(), 0);
    drop(permit);
    let ReleaseOutcome::Dispatch(permit) = within(again.released()).await else { panic!("not released") };
    assert_eq!(pids.all().len(), 2);
    eventually(|| route.gate.target().endpoints().len() == 1).await;
    drop(permit);
    route.end().await;
}

#[tokio::test]
async fn failed_server_gets_one_trial_request() {
    let pids = Pids::new();
    let route = SupervisedRoute::new(process(sh(&pids.then("exec \"$0\" \"$@\""), &sim(&[]))));
    let permit = route.permit().await;
    permit.suspect();
    let mut ticket = route.hold();
    drop(permit);
    let ReleaseOutcome::Dispatch(permit) = within(ticket.released()).await else { panic!("not released") };
    assert_eq!((permit.endpoint().limit(), pids.all().len()), (1, 1), "the same server");
    drop(permit);
    route.end().await;
}

#[tokio::test]
async fn stop_ends_all_descendants() {
    let pids = Pids::new();
    // One child in the process group, and one that has left it.
    let script = format!(
        "sleep 1000 & echo $! >> {path}; setsid sleep 1000 & echo $! >> {path}; {}",
        pids.then("exec \"$0\" \"$@\""),
        path = pids.path(),
    );
    let route = SupervisedRoute::new(process(sh(&script, &sim(&[]))));
    drop(route.permit().await);
    assert!(pids.all().len() == 3 && pids.all().into_iter().all(alive));
    route.end().await;
    assert!(!pids.all().into_iter().any(alive));
}

#[tokio::test]
async fn a_server_that_ignores_sigterm_is_killed() {
    let pids = Pids::new();
    let script = format!("trap '' TERM; {}", pids.then("\"$0\" \"$@\" & while :; do sleep 1; done"));
    let mut target = process(sh(&script, &sim(&[])));
    if let Target::Process(target) = &mut target {
        target.stop_timeout = Period::from_millis(50);
    }
    let route = SupervisedRoute::new(target);
    drop(route.permit().await);
    route.end().await;
    assert!(!pids.all().into_iter().any(alive));
}

#[tokio::test]
async fn stop_does_not_wait_for_in_flight_requests() {
    let pids = Pids::new();
    let route = SupervisedRoute::new(process(sh(&pids.then("exec \"$0\" \"$@\""), &sim(&[]))));
    let permit = route.permit().await;
    route.shutdown.kill();
    let gate = route.gate.clone();
    route.end().await;
    assert!(!alive(pids.all()[0]));
    assert_eq!(gate.in_flight(), 1, "it counts until it has ended");
    drop(permit);
}

#[tokio::test]
async fn starting_server_is_stopped_with_the_route() {
    let pids = Pids::new();
    let route = SupervisedRoute::new(process(sh(&pids.then("exec \"$0\" \"$@\""), &sim(&["--hang-load"]))));
    let ticket = route.hold();
    eventually(|| !pids.all().is_empty()).await;
    let gate = route.gate.clone();
    let store = route.store.clone();
    route.end().await;
    assert!(!alive(pids.all()[0]));
    assert_eq!(gate.held(), 1, "what becomes of it is not the launcher's business");
    let record = &store.recent(None, 10)[0];
    assert_eq!(record.outcome, Some(ColdStartOutcome::Failed));
    assert_eq!(record.reason.as_deref(), Some("the route was removed before the target was up"));
    drop(ticket);
}

#[tokio::test]
async fn new_target_takes_over_after_the_old_one_drains() {
    let (old, new) = (Pids::new(), Pids::new());
    let route = SupervisedRoute::new(process(sh(&old.then("exec \"$0\" \"$@\""), &sim(&[]))));
    let permit = route.permit().await;
    route.targets.send_replace(process(sh(&new.then("exec \"$0\" \"$@\""), &sim(&[]))));
    eventually(|| !route.gate.target().is_up()).await;
    let mut ticket = route.hold();
    assert!(alive(old.all()[0]) && new.all().is_empty(), "the old one still answers");
    drop(permit);
    let ReleaseOutcome::Dispatch(permit) = within(ticket.released()).await else { panic!("not released") };
    assert!(!alive(old.all()[0]) && alive(new.all()[0]));
    drop(permit);
    route.targets.send_replace(Target::Url("http://127.0.0.1:9".into()));
    eventually(|| !alive(new.all()[0])).await;
    route.end().await;
}

#[tokio::test]
async fn target_replaced_while_loading_keeps_its_requests() {
    let route = SupervisedRoute::new(process(sim(&["--hang-load"])));
    let mut ticket = route.hold();
    route.status("starting").await;
    route.targets.send_replace(process(sim(&[])));
    let ReleaseOutcome::Dispatch(permit) = within(ticket.released()).await else { panic!("not released") };
    permit.first_byte();
    let [second, first] = route.records().try_into().unwrap();
    assert_eq!(first.reason.as_deref(), Some("the target was replaced before it was up"));
    assert_eq!(second.outcome, Some(ColdStartOutcome::Completed));
    assert!(second.total_ms > first.total_ms, "it counts from the same request");
    drop(permit);
    route.end().await;
}

// === guardian ===

fn guardian(script: &str) -> Command {
    let mut command = Command::new(ANTEROOM_BIN);
    command.args(["guardian", "--stop-timeout", "60000", "--", "sh", "-c", script]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

#[tokio::test]
async fn guardian_exits_with_command_status() {
    for (script, code, signal) in [
        ("exit 0", Some(0), None),
        ("exit 7", Some(7), None),
        ("kill -TERM $$", None, Some(15)),
        ("kill -KILL $$", None, Some(9)),
        ("kill -ABRT $$", None, Some(6)),
    ] {
        let mut guardian = guardian(script).spawn().unwrap();
        let lifeline = guardian.stdin.take();
        let status = within(guardian.wait()).await.unwrap();
        assert_eq!((status.code(), status.signal()), (code, signal), "{script}");
        drop(lifeline);
    }
}

#[tokio::test]
async fn guardian_ends_only_with_the_pipe() {
    let mut guardian = guardian("trap 'exit 5' TERM; echo up; while :; do sleep 0.01; done").spawn().unwrap();
    let mut lines = BufReader::new(guardian.stdout.take().unwrap()).lines();
    assert_eq!(within(lines.next_line()).await.unwrap().as_deref(), Some("up"));
    let pid = rustix::process::Pid::from_raw(guardian.id().unwrap() as i32).unwrap();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        kill_process(pid, signal).unwrap();
    }
    drop(guardian.stdin.take());
    assert_eq!(
        within(guardian.wait()).await.unwrap().code(),
        Some(5),
        "the command's own end, asked by SIGTERM"
    );
}

#[tokio::test]
async fn ended_command_leaves_nothing_behind() {
    let mut guardian = guardian("sleep 1000 & echo $!; setsid sleep 1000 & echo $!; exit 3").spawn().unwrap();
    let lifeline = guardian.stdin.take();
    let mut printed = String::new();
    within(guardian.stdout.take().unwrap().read_to_string(&mut printed)).await.unwrap();
    assert_eq!(within(guardian.wait()).await.unwrap().code(), Some(3));
    let pids = support::pids(&printed);
    assert!(pids.len() == 2 && !pids.into_iter().any(alive));
    drop(lifeline);
}

#[tokio::test]
async fn killing_the_proxy_leaves_no_orphan() {
    let mut guardian = guardian("sleep 1000 & echo $!; echo $$; exec sleep 1000").spawn().unwrap();
    let mut lines = BufReader::new(guardian.stdout.take().unwrap()).lines();
    let mut pids = Vec::new();
    while pids.len() < 2 {
        pids.extend(support::pids(&within(lines.next_line()).await.unwrap().unwrap()));
    }
    // Stands in for the proxy: the guardian only needs a process that holds the pipe.
    let lifeline: Stdio = guardian.stdin.take().unwrap().try_into().unwrap();
    let mut proxy = Command::new("sleep").arg("1000").stdout(lifeline).spawn().unwrap();
    assert!(pids.iter().copied().all(alive));
    proxy.start_kill().unwrap();
    within(proxy.wait()).await.unwrap();
    within(guardian.wait()).await.unwrap();
    assert!(!pids.into_iter().any(alive));
}

// === prober ===

/// Serves health checks with the status code stored in `status`.
async fn healthy(listener: TcpListener, status: Arc<AtomicU16>) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 1024]).await;
        let status = status.load(Ordering::SeqCst);
        let _ =
            stream.write_all(format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n").as_bytes()).await;
    }
}

async fn server(status: u16) -> (Target, Arc<AtomicU16>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let status = Arc::new(AtomicU16::new(status));
    tokio::spawn(healthy(listener, status.clone()));
    (Target::Url(url), status)
}

#[tokio::test]
async fn responding_url_is_no_cold_start() {
    let (target, _) = server(200).await;
    let route = SupervisedRoute::new(target);
    let permit = route.permit().await;
    assert_eq!(permit.endpoint().limit(), settings().concurrency.max, "no ramp");
    assert!(route.gate.cold_starts().current().is_none() && route.records().is_empty());
    assert!(!route.gate.demand().is_leased());
    drop(permit);
    route.end().await;
}

#[tokio::test]
async fn refusing_url_is_probed_as_a_cold_start() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let route = SupervisedRoute::new(Target::Url(format!("http://{free}")));
    let mut ticket = route.hold();
    route.status("starting").await;
    let phases = route.gate.cold_starts().current().unwrap().phases;
    assert_eq!(
        phases.iter().map(|phase| phase.unfinished).collect::<Vec<_>>(),
        [false, true],
        "signal, load"
    );
    tokio::spawn(healthy(TcpListener::bind(free).await.unwrap(), Arc::new(AtomicU16::new(200))));
    let ReleaseOutcome::Dispatch(permit) = within(ticket.released()).await else { panic!("not released") };
    assert_eq!(permit.endpoint().limit(), settings().concurrency.ramp_start);
    route.gate.cold_starts().dispatched();
    permit.first_byte();
    assert_eq!(route.records()[0].outcome, Some(ColdStartOutcome::Completed));
    drop(permit);
    route.end().await;
}

#[tokio::test]
async fn unready_url_fails_held_requests() {
    let (target, status) = server(503).await;
    let mut settings = settings();
    settings.readiness.activation_timeout = Period::from_millis(200);
    let route = SupervisedRoute::with(target, settings);
    let ReleaseOutcome::Failed(reason, _) = within(route.hold().released()).await else { panic!("released") };
    assert_eq!(&*reason, "the target was not ready within 200ms: the last probe of /health saw: status 503");
    status.store(200, Ordering::SeqCst);
    drop(route.permit().await);
    route.end().await;
}

#[tokio::test]
async fn suspect_url_is_probed_then_tried_once() {
    let (target, status) = server(200).await;
    let route = SupervisedRoute::new(target);
    let permit = route.permit().await;
    permit.suspect();
    assert!(!route.gate.target().is_up());
    let mut ticket = route.hold();
    drop(permit);
    let ReleaseOutcome::Dispatch(permit) = within(ticket.released()).await else { panic!("not released") };
    assert_eq!(permit.endpoint().limit(), 1);
    assert!(
        route.records().is_empty() && route.gate.cold_starts().current().is_none(),
        "it was up all the while"
    );
    // A failed probe now means a cold start.
    status.store(503, Ordering::SeqCst);
    permit.suspect();
    let mut ticket = route.hold();
    route.status("starting").await;
    status.store(200, Ordering::SeqCst);
    assert!(matches!(within(ticket.released()).await, ReleaseOutcome::Dispatch(_)));
    drop(permit);
    route.end().await;
}

fn set_idle(target: &mut Target, milliseconds: u64) {
    if let Target::Process(target) = target {
        target.idle_timeout = Period::from_millis(milliseconds);
    }
}
