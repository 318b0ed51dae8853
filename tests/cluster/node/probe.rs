//! Probes of a container, run like the kubelet's.

use std::{net::Ipv4Addr, time::Duration};

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use k8s_openapi::{
    api::core::v1::{Container, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};
use tokio::{
    net::TcpStream,
    process::Command,
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval_at},
};

use crate::client;

/// Result of the probes of a container.
#[derive(Debug)]
pub(super) enum ProbeFinding {
    /// The container has started: the other probes begin.
    Started,
    Ready(bool),
    /// The readiness probe failed once: the kubelet writes an Event for each failure.
    Unready(String),
    /// The container must be restarted, for this reason.
    Dead(String),
}

/// Runs all probes of a newly started container until the receiver is gone.
pub(super) async fn watch(container: Container, address: Ipv4Addr, findings: mpsc::Sender<ProbeFinding>) {
    if let Some(probe) = &container.startup_probe {
        // A container that does not start in time is restarted, like one that fails its liveness probe.
        if let Err(reason) = first_success(probe, &container, address).await {
            let _ = findings.send(ProbeFinding::Dead(format!("Startup probe failed: {reason}"))).await;
            return;
        }
    }
    if findings.send(ProbeFinding::Started).await.is_err() {
        return;
    }
    tokio::join!(ready(&container, address, &findings), alive(&container, address, &findings));
}

async fn ready(container: &Container, address: Ipv4Addr, findings: &mpsc::Sender<ProbeFinding>) {
    let Some(probe) = &container.readiness_probe else {
        let _ = findings.send(ProbeFinding::Ready(true)).await;
        return;
    };
    let (success, failure) = (threshold(probe.success_threshold, 1), threshold(probe.failure_threshold, 3));
    let mut ready = false;
    // Number of consecutive results that differ from `ready`.
    let mut row = 0;
    let mut ticks = ticks(probe);
    loop {
        ticks.tick().await;
        let answer = ask(probe, container, address).await;
        let found = answer.is_ok();
        if let Err(reason) = answer
            && findings
                .send(ProbeFinding::Unready(format!("Readiness probe failed: {reason}")))
                .await
                .is_err()
        {
            return;
        }
        row = if found == ready { 0 } else { row + 1 };
        if row >= if found { success } else { failure } {
            (ready, row) = (found, 0);
            if findings.send(ProbeFinding::Ready(ready)).await.is_err() {
                return;
            }
        }
    }
}

async fn alive(container: &Container, address: Ipv4Addr, findings: &mpsc::Sender<ProbeFinding>) {
    let Some(probe) = &container.liveness_probe else { return };
    let reason = first_failure(probe, container, address).await;
    let _ = findings.send(ProbeFinding::Dead(format!("Liveness probe failed: {reason}"))).await;
}

/// Waits for the first success; returns an error once the failure threshold is reached.
async fn first_success(probe: &Probe, container: &Container, address: Ipv4Addr) -> Result<(), String> {
    let mut ticks = ticks(probe);
    let mut failed = 0;
    loop {
        ticks.tick().await;
        match ask(probe, container, address).await {
            Ok(()) => return Ok(()),
            Err(reason) => {
                failed += 1;
                if failed >= threshold(probe.failure_threshold, 3) {
                    return Err(reason);
                }
            }
        }
    }
}

async fn first_failure(probe: &Probe, container: &Container, address: Ipv4Addr) -> String {
    let mut ticks = ticks(probe);
    let mut failed = 0;
    loop {
        ticks.tick().await;
        match ask(probe, container, address).await {
            Ok(()) => failed = 0,
            Err(reason) => {
                failed += 1;
                if failed >= threshold(probe.failure_threshold, 3) {
                    return reason;
                }
            }
        }
    }
}

fn ticks(probe: &Probe) -> tokio::time::Interval {
    let seconds = |value: Option<i32>, default| Duration::from_secs(threshold(value, default).into());
    let first = Instant::now() + seconds(probe.initial_delay_seconds, 0);
    let mut ticks = interval_at(first, seconds(probe.period_seconds, 10).max(Duration::from_secs(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn threshold(value: Option<i32>, default: u32) -> u32 {
    value.and_then(|value| value.try_into().ok()).unwrap_or(default)
}

/// Runs a probe once.
async fn ask(probe: &Probe, container: &Container, address: Ipv4Addr) -> Result<(), String> {
    let limit = Duration::from_secs(threshold(probe.timeout_seconds, 1).max(1).into());
    match tokio::time::timeout(limit, ask_at_leisure(probe, container, address)).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {limit:?}")),
    }
}

async fn ask_at_leisure(probe: &Probe, container: &Container, address: Ipv4Addr) -> Result<(), String> {
    if let Some(http) = &probe.http_get {
        let port = port(&http.port, container)?;
        let path = http.path.as_deref().unwrap_or("/");
        let mut request = Request::get(path).header("user-agent", "kube-probe/1.37").header("accept", "*/*");
        let fields = http.http_headers.iter().flatten();
        let mut host = format!("{address}:{port}");
        for field in fields {
            if field.name.eq_ignore_ascii_case("host") {
                host = field.value.clone();
            } else {
                request = request.header(&field.name, &field.value);
            }
        }
        let request = request.header("host", host).body(Full::<Bytes>::default()).unwrap();
        let status = client::send((address, port).into(), request).await?.status;
        // Redirects are successes, as in the kubelet.
        return if (200..400).contains(&status.as_u16()) {
            Ok(())
        } else {
            Err(format!("HTTP probe failed with statuscode: {}", status.as_u16()))
        };
    }
    if let Some(tcp) = &probe.tcp_socket {
        let port = port(&tcp.port, container)?;
        return TcpStream::connect((address, port)).await.map(drop).map_err(|error| error.to_string());
    }
    if let Some(words) = probe.exec.as_ref().and_then(|exec| exec.command.as_ref()) {
        let status = Command::new(&words[0]).args(&words[1..]).kill_on_drop(true).status().await;
        return match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(status.to_string()),
            Err(error) => Err(error.to_string()),
        };
    }
    panic!("the node's agent does not know this probe: {probe:?}")
}

pub(super) fn port(port: &IntOrString, container: &Container) -> Result<u16, String> {
    match port {
        IntOrString::Int(port) => u16::try_from(*port).map_err(|error| error.to_string()),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            let found = ports.find(|port| port.name.as_deref() == Some(name));
            let found = found.and_then(|port| u16::try_from(port.container_port).ok());
            found.ok_or_else(|| format!("the container has no port {name}"))
        }
    }
}
