//! A container: its process from the pull to the last restart, and its status.

use std::{
    fs::File,
    io::Write as _,
    net::Ipv4Addr,
    os::unix::process::ExitStatusExt as _,
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::{Container, ContainerState, ContainerStatus, Pod};
use kube::ResourceExt as _;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, Command},
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Agent,
    fate::{self, PodFailure},
    history::NodeEventKind,
    logs::RunLog,
    probe::{self, ProbeFinding},
    program::{self, ContainerContext},
    status,
    volumes::Files,
};
use crate::{client, plane::daemon};

/// Longest restart back-off, same as the kubelet's.
const MAX_RESTART_BACKOFF: Duration = Duration::from_secs(300);
/// Grace after a preStop hook that used up the whole grace period, same as the kubelet's.
const LEAST_GRACE: Duration = Duration::from_secs(2);

/// State of the task that runs a container.
pub(super) struct Task {
    pub(super) agent: Arc<Agent>,
    pub(super) index: usize,
    pub(super) container: Container,
    pub(super) address: Ipv4Addr,
    /// Current state of the pod.
    pub(super) pods: watch::Receiver<Option<Pod>>,
    /// Deadline for the exit of the container; `None` while it may run.
    pub(super) end: watch::Receiver<Option<Instant>>,
    pub(super) reports: mpsc::UnboundedSender<(usize, ContainerStatus)>,
    pub(super) status: ContainerStatus,
    pub(super) pod: Pod,
    /// Files of the container, once mounted.
    pub(super) files: Files,
}

/// Returns the status of a container that has not run yet.
pub(super) fn waiting(container: &Container) -> ContainerStatus {
    ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        started: Some(false),
        state: Some(state("waiting", json!({ "reason": "ContainerCreating" }))),
        ..Default::default()
    }
}

pub(super) fn state(kind: &str, what: serde_json::Value) -> ContainerState {
    serde_json::from_value(json!({ kind: what })).unwrap()
}

// === impl Task ===

impl Task {
    /// Runs the container until it must not run any more. The last report has its exit status.
    pub(super) async fn run(mut self) {
        let mut end = self.end.clone();
        self.agent.logs.waits(self.key(), "ContainerCreating");
        tokio::select! {
            biased;
            () = wait_for_deadline(&mut end) => return,
            () = self.prepare() => {}
        }
        loop {
            let status = self.run_process_once().await;
            let policy = self.pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref());
            let again = match policy {
                Some("Never") => false,
                Some("OnFailure") => status.is_none_or(|status| !status.success()),
                _ => true,
            };
            if self.end.borrow().is_some() || !again {
                return;
            }
            tokio::select! {
                biased;
                () = wait_for_deadline(&mut end) => return,
                () = self.back_off() => {}
            }
            self.status.restart_count += 1;
        }
    }

    pub(super) fn report(&self) {
        let waiting = self.status.state.as_ref().and_then(|state| state.waiting.as_ref());
        if let Some(reason) = waiting.and_then(|waiting| waiting.reason.as_ref()) {
            self.agent.logs.waits(self.key(), reason);
        }
        // Fails if the pod's task has ended.
        let _ = self.reports.send((self.index, self.status.clone()));
    }

    /// Returns the failure that the pod's annotations currently request.
    pub(super) fn requested_failure(&self) -> Option<PodFailure> {
        self.pods.borrow().as_ref().and_then(PodFailure::of)
    }

    /// Returns the back-off after this number of failures.
    pub(super) fn delay(&self, failures: u32) -> Duration {
        let first = fate::duration(&self.pod, fate::BACKOFF_ANNOTATION, Duration::from_secs(10));
        first.saturating_mul(1 << failures.min(10)).min(MAX_RESTART_BACKOFF)
    }

    /// Runs the process once. Returns `None` if the process could not be started, or its exit was not observed.
    async fn run_process_once(&mut self) -> Option<ExitStatus> {
        let mut child = match self.spawn() {
            Ok(child) => child,
            Err(message) => {
                self.status.state =
                    Some(state("waiting", json!({ "reason": "CreateContainerError", "message": message })));
                self.event("Warning", "Failed", &format!("Error: {message}"));
                self.report();
                return None;
            }
        };
        let began = self.agent.note(&self.pod, NodeEventKind::Started);
        let log = self.agent.logs.begin(self.key());
        let output = self.follow(&mut child, &log);
        self.event_at(began, "Normal", "Started", "Container started");
        let began = self.agent.clock.reads(began);
        self.status.container_id = Some(format!("processes://{}", child.id().unwrap_or_default()));
        self.status.state = Some(state("running", json!({ "startedAt": status::time(began) })));
        self.status.started = Some(false);
        let mut end = self.end.clone();
        tokio::select! {
            biased;
            () = wait_for_deadline(&mut end) => {}
            () = sleep(self.given(fate::REPORT_DELAY_ANNOTATION).unwrap_or_default()) => {}
        }
        self.report();

        let reason = self.watch(&mut child).await;
        let status = child.wait().await.ok()?;
        drop(output);
        log.end();
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
        self.agent.note(&self.pod, NodeEventKind::Exited(code));
        let reason = reason.unwrap_or(if code == 0 { "Completed" } else { "Error" });
        self.status.state = Some(state(
            "terminated",
            json!({
                "exitCode": code,
                "reason": reason,
                "startedAt": status::time(began),
                "finishedAt": status::time(self.agent.clock.now()),
                "containerID": self.status.container_id,
            }),
        ));
        (self.status.ready, self.status.started) = (false, Some(false));
        self.report();
        Some(status)
    }

    fn spawn(&self) -> Result<Child, String> {
        let mut command = if self.requested_failure() == Some(PodFailure::CrashLoop) {
            let mut command = Command::new("sh");
            command.args(["-c", "echo 'it cannot work like this' >&2; exit 1"]).process_group(0);
            command
        } else {
            let node = (self.agent.name.as_str(), self.agent.address);
            let place = ContainerContext { pod: &self.pod, address: self.address, node, files: &self.files };
            program::command(&self.agent.ground.programs, &self.container, &place)?
        };
        if let Some(wire) = &self.agent.wire {
            command = wire.inside(&command);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command.spawn().map_err(|error| format!("cannot run {:?}: {error}", command.as_std().get_program()))
    }

    /// Copies the output into the container's log, and notes when the server logs that it is listening.
    fn follow(&self, child: &mut Child, log: &Arc<RunLog>) -> [AbortOnDropHandle<()>; 2] {
        let (namespace, name) = (self.pod.namespace().unwrap_or_default(), self.pod.name_any());
        let file = format!("{namespace}.{name}.{}.log", self.container.name);
        let file = daemon::append(&self.agent.ground.logs.join(file));
        let line = {
            let (agent, pod, log) = (self.agent.clone(), self.pod.clone(), log.clone());
            move |line: &str| {
                log.push(agent.clock.now(), line);
                // vLLM's message, which the simulator uses as well.
                if line.contains("Application startup complete") {
                    agent.note(&pod, NodeEventKind::Answers);
                }
            }
        };
        let (out, err) = (child.stdout.take(), child.stderr.take());
        [
            AbortOnDropHandle::new(tokio::spawn(copy(out, file.try_clone().unwrap(), line.clone()))),
            AbortOnDropHandle::new(tokio::spawn(copy(err, file, line))),
        ]
    }

    /// Waits until the process has exited, or terminates it. Returns the reason if the node has killed it.
    async fn watch(&mut self, child: &mut Child) -> Option<&'static str> {
        let (sender, mut findings) = mpsc::channel(4);
        let probes = probe::watch(self.container.clone(), self.address, sender);
        let _probes = AbortOnDropHandle::new(tokio::spawn(probes));
        let fate = self.requested_failure();
        let after = fate::duration(&self.pod, fate::OOM_DELAY_ANNOTATION, Duration::from_millis(200));
        let mut oom = std::pin::pin!(sleep(after));
        let mut end = self.end.clone();
        loop {
            tokio::select! {
                // An exit takes precedence over other events.
                biased;
                _ = child.wait() => return None,
                () = &mut oom, if fate == Some(PodFailure::Oom) => {
                    signal(child, Signal::KILL);
                    return Some("OOMKilled");
                }
                () = wait_for_deadline(&mut end) => {
                    self.terminate(child, self.end.clone()).await;
                    return None;
                }
                Some(finding) = findings.recv() => match finding {
                    ProbeFinding::Started => self.status.started = Some(true),
                    ProbeFinding::Ready(ready) => self.status.ready = ready,
                    ProbeFinding::Unready(message) => {
                        self.event("Warning", "Unhealthy", &message);
                        continue;
                    }
                    ProbeFinding::Dead(message) => {
                        self.event("Warning", "Unhealthy", &message);
                        let grace = self.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
                        let grace = Duration::from_secs(grace.unwrap_or(30).unsigned_abs());
                        let (_keep, end) = watch::channel(Some(Instant::now() + grace));
                        self.terminate(child, end).await;
                        return None;
                    }
                },
            }
            self.report();
        }
    }

    /// Runs the preStop hook, sends SIGTERM, and SIGKILL at the end of the grace period.
    async fn terminate(&self, child: &mut Child, mut end: watch::Receiver<Option<Instant>>) {
        let name = &self.container.name;
        self.event("Normal", "Killing", &format!("Stopping container {name}"));
        let mut least = None;
        tokio::select! {
            biased;
            _ = child.wait() => return,
            () = wait_until_deadline(&mut end) => least = Some(Instant::now() + LEAST_GRACE),
            () = pre_stop(&self.container, self.address) => {}
        }
        // A pod that was deleted without grace period gets SIGKILL at once.
        let now = self.pods.borrow().is_none();
        if !now {
            signal(child, Signal::TERM);
            self.agent.note(&self.pod, NodeEventKind::Signalled);
            tokio::select! {
                biased;
                _ = child.wait() => return,
                () = wait_until_deadline(&mut end), if least.is_none() => {}
                () = sleep_until(least.unwrap_or_else(Instant::now)), if least.is_some() => {}
            }
        }
        self.agent.note(&self.pod, NodeEventKind::Killed);
        signal(child, Signal::KILL);
    }

    /// Waits before a restart. The first restart is immediate.
    async fn back_off(&mut self) {
        let failures = u32::try_from(self.status.restart_count).unwrap_or_default();
        self.status.last_state = self.status.state.take();
        if failures > 0 {
            let delay = self.delay(failures - 1);
            let message = format!(
                "back-off {delay:?} restarting failed container={} pod={}",
                self.container.name,
                self.pod.name_any()
            );
            self.event("Warning", "BackOff", &message);
            self.status.state =
                Some(state("waiting", json!({ "reason": "CrashLoopBackOff", "message": message })));
            self.report();
            sleep(delay).await;
        }
    }
}

/// Waits until a deadline is set, or the sender is gone.
async fn wait_for_deadline(end: &mut watch::Receiver<Option<Instant>>) {
    let _ = end.wait_for(Option::is_some).await;
}

/// Waits until the deadline, which may be moved forward meanwhile.
async fn wait_until_deadline(end: &mut watch::Receiver<Option<Instant>>) {
    loop {
        let at = end.borrow_and_update().unwrap_or_else(Instant::now);
        tokio::select! {
            () = sleep_until(at) => return,
            Ok(()) = end.changed() => {}
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    let id = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(group) = id {
        let _ = kill_process_group(group, signal);
    }
}

async fn pre_stop(container: &Container, address: Ipv4Addr) {
    let Some(hook) = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref()) else {
        return;
    };
    if let Some(pause) = &hook.sleep {
        sleep(Duration::from_secs(pause.seconds.unsigned_abs())).await;
    }
    if let Some(words) = hook.exec.as_ref().and_then(|exec| exec.command.as_ref()) {
        let _ = Command::new(&words[0]).args(&words[1..]).kill_on_drop(true).status().await;
    }
    if let Some(http) = &hook.http_get
        && let Ok(port) = probe::port(&http.port, container)
    {
        let _ = client::get((address, port).into(), http.path.as_deref().unwrap_or("/")).await;
    }
}

async fn copy(from: Option<impl AsyncRead + Unpin>, mut log: File, each: impl Fn(&str)) {
    let Some(from) = from else { return };
    let mut lines = BufReader::new(from).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        each(&line);
        let _ = writeln!(log, "{line}");
    }
}
