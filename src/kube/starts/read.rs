//! Derives startup phases from a pod and its Events. Pure.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Container, ContainerStatus, Event, Pod, PodCondition},
    apimachinery::pkg::apis::meta::v1::Time,
};
use tokio::time::Instant;

use crate::{
    domain::{ObstacleKind, Phase},
    kube::{
        pod_reasons::{shorten, trouble},
        pods::addresses,
    },
    state::{DiscoveredEndpoint, Observation, PodWarning, Stamp},
};

/// Name of the API server's clock, which sets `creationTimestamp`, bindings and managed-field times.
pub(in crate::kube) const CONTROL_PLANE: &str = "control-plane";

/// Resolution of timestamps in object metadata and status.
const METADATA_TIME_RESOLUTION: Duration = Duration::from_secs(1);
/// Resolution of `eventTime` in Events.
const EVENT_TIME_RESOLUTION: Duration = Duration::from_micros(1);

/// Kubelet state derived from the Events of a pod, which precede its status: that is written about once a second.
#[derive(Debug, Default)]
pub(super) struct KubeletEvents {
    /// Containers with an image pull in progress.
    pulling: HashSet<Box<str>>,
    /// Containers whose image was pulled once. Pulls after a restart are not part of the startup.
    pulled_once: HashSet<Box<str>>,
    /// End of the last image pull.
    pub(super) pulled: Option<Observation>,
    /// First start of the serving container.
    pub(super) started: Option<Observation>,
    warning: Option<KubeletWarning>,
}

/// A warning of the kubelet that blocks the pod.
#[derive(Debug)]
struct KubeletWarning {
    warning: PodWarning,
    /// True if the warning concerns a running container rather than its setup.
    is_running: bool,
}

/// Grace period for failing probes while a model may still be loading.
const PROBE_GRACE: Duration = Duration::from_secs(120);
/// Grace period for sandbox and network setup; the next attempt usually succeeds.
const SANDBOX_GRACE: Duration = Duration::from_secs(20);

/// Returns the serving container: the first that declares one of `ports`, else the first.
pub(super) fn serving_container<'a>(pod: &'a Pod, ports: &[u16]) -> Option<&'a str> {
    let has = |container: &&Container| {
        let own = container.ports.as_deref().unwrap_or_default();
        own.iter().any(|port| u16::try_from(port.container_port).is_ok_and(|port| ports.contains(&port)))
    };
    let all = all_containers(pod);
    all.clone().find(has).or_else(|| pod.spec.as_ref()?.containers.first()).map(|container| &*container.name)
}

/// Returns the address of the first discovered endpoint of the pod.
pub(super) fn address(pod: &Pod, ports: &[u16], found: &[DiscoveredEndpoint]) -> Option<Arc<str>> {
    let own = addresses(pod).flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port)));
    own.map(|own| own.to_string()).find_map(|own| {
        let endpoint = found.iter().find(|endpoint| *endpoint.address == *own)?;
        Some(endpoint.address.clone())
    })
}

/// Returns all containers in the order in which the kubelet pulls and starts them.
fn all_containers(pod: &Pod) -> impl Iterator<Item = &Container> + Clone {
    let spec = pod.spec.as_ref();
    let init = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    init.iter().chain(spec.map(|spec| spec.containers.as_slice()).unwrap_or_default())
}

/// Returns the completed phases per pod status. `serving` is the container whose start counts.
pub(super) fn phases(pod: &Pod, serving: Option<&str>, at: Instant) -> Vec<(Phase, Observation)> {
    let mut phases = Vec::with_capacity(4);
    let created = pod.metadata.creation_timestamp.as_ref();
    phases.push((Phase::Create, seen(at, created, || CONTROL_PLANE.into())));
    let Some(node) = node(pod) else { return phases };
    let scheduled = condition(pod, "PodScheduled").filter(|condition| condition.status == "True");
    let since = scheduled.and_then(|scheduled| scheduled.last_transition_time.as_ref());
    phases.push((Phase::Schedule, seen(at, since, || CONTROL_PLANE.into())));
    let Some(container) = serving.and_then(|name| status_of(pod, name)) else { return phases };
    if let Some(started) = first_start(container) {
        phases.push((Phase::Start, seen(at, started, || node.into())));
    }
    let is_ready = is_true(pod, "Ready");
    if container.ready || is_ready {
        let ready = ["ContainersReady", "Ready"].into_iter().find_map(|kind| condition(pod, kind));
        let ready = ready.filter(|ready| ready.status == "True");
        let since = ready.and_then(|ready| ready.last_transition_time.as_ref());
        phases.push((Phase::Load, seen(at, since, || node.into())));
    }
    phases
}

/// Returns the assigned node.
pub(super) fn node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|node| !node.is_empty())
}

pub(super) fn is_ready(pod: &Pod) -> bool {
    is_true(pod, "Ready")
}

/// Returns whether the scheduler found no node, so that an autoscaler may have to create one.
pub(super) fn waits_for_a_node(pod: &Pod) -> bool {
    let scheduled = condition(pod, "PodScheduled");
    node(pod).is_none()
        && scheduled.is_some_and(|it| it.status == "False" && it.reason.as_deref() == Some("Unschedulable"))
}

/// Returns whether the kubelet is retrying a failed image pull.
pub(super) fn waits_for_an_image(pod: &Pod) -> bool {
    trouble(pod).is_some_and(|trouble| trouble.kind == ObstacleKind::ImagePull)
}

/// Returns the restart count of a running container.
pub(super) fn run_of(pod: &Pod, name: &str) -> Option<i32> {
    let status = status_of(pod, name)?;
    status.state.as_ref()?.running.as_ref()?;
    Some(status.restart_count)
}

fn is_true(pod: &Pod, kind: &str) -> bool {
    condition(pod, kind).is_some_and(|condition| condition.status == "True")
}

fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    conditions.find(|condition| condition.type_ == kind)
}

fn status_of<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let mut all = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
    all.find(|status| status.name == name)
}

/// Returns the earliest known start of a container; restarts count as part of loading.
fn first_start(status: &ContainerStatus) -> Option<Option<&Time>> {
    [&status.last_state, &status.state].into_iter().flatten().find_map(|state| {
        let running = state.running.as_ref().map(|running| running.started_at.as_ref());
        running.or_else(|| Some(state.terminated.as_ref()?.started_at.as_ref()))
    })
}

fn seen(at: Instant, time: Option<&Time>, clock: impl FnOnce() -> Arc<str>) -> Observation {
    let stamp =
        time.map(|time| Stamp { time: system(time.0), resolution: METADATA_TIME_RESOLUTION, clock: clock() });
    Observation { at, stamp }
}

/// Creates a stamp with a resolution of one second.
pub(in crate::kube) fn stamp(time: Timestamp, clock: &str) -> Stamp {
    Stamp { time: system(time), resolution: METADATA_TIME_RESOLUTION, clock: clock.into() }
}

fn system(time: Timestamp) -> SystemTime {
    SystemTime::from(time)
}

// === impl KubeletEvents ===

impl KubeletEvents {
    /// Applies an Event observed at `at`. Image pulls of containers after the serving one are ignored: the serving
    /// container does not wait for them.
    pub(super) fn event(&mut self, event: &Event, pod: &Pod, serving: Option<&str>, at: Instant) {
        self.warn(event, pod, at);
        let container = event.involved_object.field_path.as_deref().and_then(container_in);
        let mut before = true;
        let counts = container.is_none_or(|container| {
            all_containers(pod).any(|known| {
                let counts = before && known.name == container;
                before &= Some(&*known.name) != serving;
                counts
            })
        });
        let stamp = node(pod).and_then(|node| stamp_of(event, node));
        if event.reason.as_deref() == Some("Started") && (container.is_none() || container == serving) {
            self.started.get_or_insert(Observation { at, stamp });
            return;
        }
        let container = container.unwrap_or_default();
        if !counts || self.pulled_once.contains(container) {
            return;
        }
        let message = event.message.as_deref().unwrap_or_default();
        match event.reason.as_deref() {
            Some("Pulling") => drop(self.pulling.insert(container.into())),
            Some("Pulled") => {
                self.pulling.remove(container);
                self.pulled_once.insert(container.into());
                // Other messages mean that the image was already present.
                if message.starts_with("Successfully pulled") {
                    self.pulled = Some(Observation { at, stamp });
                }
            }
            // A failed pull is retried and remains in progress.
            _ => {}
        }
    }

    pub(super) fn is_pulling(&self) -> bool {
        !self.pulling.is_empty()
    }

    /// Returns the current warning if it applies to this stage of the startup.
    pub(super) fn warning(&self, has_started: bool, is_ready: bool) -> Option<PodWarning> {
        let warning =
            self.warning.as_ref().filter(|warning| warning.is_running == has_started && !is_ready)?;
        Some(warning.warning.clone())
    }

    fn warn(&mut self, event: &Event, pod: &Pod, at: Instant) {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let reason = event.reason.as_deref().unwrap_or_default();
        let message = shorten(event.message.as_deref().unwrap_or_default());
        let (kind, is_running, after, message) = match reason {
            "FailedMount" | "FailedAttachVolume" | "FailedMapVolume" => {
                let message = format!("A volume of pod `{name}` cannot be mounted ({reason}): {message}");
                (ObstacleKind::Volume, false, Duration::ZERO, message)
            }
            "FailedCreatePodSandBox" | "NetworkNotReady" => {
                let message = format!("Pod `{name}` cannot be set up on its node ({reason}): {message}");
                (ObstacleKind::NotReady, false, SANDBOX_GRACE, message)
            }
            "Unhealthy" => {
                let after = if is_client_error_status(&message) { Duration::ZERO } else { PROBE_GRACE };
                (
                    ObstacleKind::NotReady,
                    true,
                    after,
                    format!("Pod `{name}` runs and is not ready: {message}"),
                )
            }
            // The problem is resolved, or the container is being restarted.
            "SuccessfulAttachVolume" | "Pulling" | "Pulled" | "Created" | "Started" | "Killing" => {
                self.warning = None;
                return;
            }
            _ => return,
        };
        let warning = PodWarning { kind, message: message.into(), from: at + after };
        let before = self.warning.take().filter(|before| before.warning.kind == kind);
        let from = before.map_or(warning.from, |before| before.warning.from.min(warning.from));
        self.warning = Some(KubeletWarning { warning: PodWarning { from, ..warning }, is_running });
    }
}

/// Returns whether a probe got a client-error status, which waiting does not resolve.
fn is_client_error_status(message: &str) -> bool {
    let status = message
        .split_once("statuscode: ")
        .map(|(_, rest)| rest.trim_end_matches(|c: char| !c.is_ascii_digit()));
    let status = status.and_then(|status| status.parse::<u16>().ok());
    status.is_some_and(|status| (400..500).contains(&status) && !matches!(status, 408 | 425 | 429))
}

/// `vllm` in `spec.containers{vllm}`.
fn container_in(path: &str) -> Option<&str> {
    let (_, rest) = path.split_once('{')?;
    rest.strip_suffix('}')
}

fn stamp_of(event: &Event, node: &str) -> Option<Stamp> {
    if let Some(time) = &event.event_time {
        return Some(Stamp { time: system(time.0), resolution: EVENT_TIME_RESOLUTION, clock: node.into() });
    }
    let time = event.last_timestamp.as_ref().or(event.first_timestamp.as_ref())?;
    Some(stamp(time.0, node))
}

#[cfg(test)]
mod tests;
