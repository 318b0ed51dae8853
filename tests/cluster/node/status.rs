//! A pod's status, as its node writes it.

use std::{collections::BTreeMap, net::Ipv4Addr, time::SystemTime};

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use serde_json::{Value, json};

use super::clock::NodeClock;

/// Conditions of a pod with their transition times.
pub(super) struct PodConditions {
    clock: NodeClock,
    started: SystemTime,
    since: BTreeMap<&'static str, (&'static str, SystemTime)>,
}

// === impl PodConditions ===

impl PodConditions {
    pub(super) fn new(clock: NodeClock) -> Self {
        Self { clock, started: clock.now(), since: BTreeMap::new() }
    }

    /// Returns a patch of the whole status. `ended`: no container of the pod will run again.
    pub(super) fn patch(
        &mut self,
        pod: &Pod,
        address: (Ipv4Addr, Ipv4Addr),
        containers: &[ContainerStatus],
        ended: bool,
    ) -> Value {
        let ready = !ended && containers.iter().all(|container| container.ready);
        let (readiness, reason) = match (ready, ended) {
            (true, _) => ("True", None),
            (_, true) => ("False", Some("PodCompleted")),
            _ => ("False", Some("ContainersNotReady")),
        };
        let conditions = json!([
            self.condition("PodReadyToStartContainers", if ended { "False" } else { "True" }, None),
            self.condition("Initialized", "True", None),
            self.condition("ContainersReady", readiness, reason),
            self.condition("Ready", readiness, reason),
        ]);
        let (node, pod_address) = address;
        json!({
            "status": {
                "phase": phase(containers, ended),
                "observedGeneration": pod.metadata.generation,
                "conditions": conditions,
                "containerStatuses": containers,
                "hostIP": node, "hostIPs": [{ "ip": node }],
                "podIP": pod_address, "podIPs": [{ "ip": pod_address }],
                "startTime": time(self.started),
            },
        })
    }

    fn condition(&mut self, kind: &'static str, status: &'static str, reason: Option<&str>) -> Value {
        let now = self.clock.now();
        let since = self.since.entry(kind).or_insert((status, now));
        if since.0 != status {
            *since = (status, now);
        }
        let since = time(since.1);
        match reason {
            None => json!({ "type": kind, "status": status, "lastTransitionTime": since, "reason": null }),
            Some(reason) => {
                json!({ "type": kind, "status": status, "lastTransitionTime": since, "reason": reason })
            }
        }
    }
}

/// Returns the phase: Pending until every container has run once.
fn phase(containers: &[ContainerStatus], ended: bool) -> &'static str {
    let has_run = |container: &ContainerStatus| {
        let state = container.state.as_ref();
        state.is_some_and(|state| state.waiting.is_none()) || container.last_state.is_some()
    };
    let failed = |container: &ContainerStatus| {
        let ended = container.state.as_ref().and_then(|state| state.terminated.as_ref());
        ended.is_some_and(|ended| ended.exit_code != 0)
    };
    match (ended, containers.iter().all(has_run)) {
        (true, _) if containers.iter().any(failed) => "Failed",
        (true, _) => "Succeeded",
        (_, true) => "Running",
        _ => "Pending",
    }
}

/// Formats a time like Kubernetes, in whole seconds.
pub(super) fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}
