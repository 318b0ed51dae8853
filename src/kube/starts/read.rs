//! What a pod and its Events say of its way into being. Pure.

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
        endpoints::addresses,
        pod_reasons::{shorten, trouble},
    },
    state::{DiscoveredEndpoint, PodWarning, Seen, Stamp},
};

/// Whose clock the API server's is: that of `creationTimestamp`, of bindings and of who manages a field since when.
pub(in crate::kube) const CONTROL_PLANE: &str = "control-plane";

/// What Kubernetes writes into objects is cut to seconds.
const SECOND: Duration = Duration::from_secs(1);
/// What it writes into newer Events is cut to this.
const MICROSECOND: Duration = Duration::from_micros(1);

/// What a kubelet tells in the Events of a pod: sooner than in its status, which it writes about once a second.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Containers whose image is being fetched.
    running: HashSet<Box<str>>,
    /// Those whose image has come once: when a container starts again, that is no more a part of the pod's way.
    done: HashSet<Box<str>>,
    /// When the last image came.
    pub(super) pulled: Option<Seen>,
    /// When the container that serves was started for the first time.
    pub(super) started: Option<Seen>,
    warning: Option<Warning>,
}

/// What stands in the way of a pod, as its node says.
#[derive(Debug)]
struct Warning {
    told: PodWarning,
    /// Whether it is said of containers that run, and not of what comes before they do.
    of_running: bool,
}

/// How long probes may fail for reasons that pass by themselves as a model loads.
const LOADING: Duration = Duration::from_secs(120);
/// How long the network of a pod may fail to be set up: mostly the next try succeeds.
const SETTING_UP: Duration = Duration::from_secs(20);

/// The container of a pod that serves: the one that says that it has one of these ports, else the first.
pub(super) fn serving<'a>(pod: &'a Pod, ports: &[u16]) -> Option<&'a str> {
    let has = |container: &&Container| {
        let own = container.ports.as_deref().unwrap_or_default();
        own.iter().any(|port| u16::try_from(port.container_port).is_ok_and(|port| ports.contains(&port)))
    };
    let all = all_containers(pod);
    all.clone().find(has).or_else(|| pod.spec.as_ref()?.containers.first()).map(|container| &*container.name)
}

/// The endpoint as which a pod is found: of several ports, the first that is.
pub(super) fn address(pod: &Pod, ports: &[u16], found: &[DiscoveredEndpoint]) -> Option<Arc<str>> {
    let own = addresses(pod).flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port)));
    own.map(|own| own.to_string()).find_map(|own| {
        let endpoint = found.iter().find(|endpoint| *endpoint.address == *own)?;
        Some(endpoint.address.clone())
    })
}

/// In the order in which they are fetched and started: a kubelet does one after the other.
fn all_containers(pod: &Pod) -> impl Iterator<Item = &Container> + Clone {
    let spec = pod.spec.as_ref();
    let init = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    init.iter().chain(spec.map(|spec| spec.containers.as_slice()).unwrap_or_default())
}

/// Which phases of a pod are over, by its own word. `serving`: the container whose start counts.
pub(super) fn moments(pod: &Pod, serving: Option<&str>, at: Instant) -> Vec<(Phase, Seen)> {
    let mut moments = Vec::with_capacity(4);
    let created = pod.metadata.creation_timestamp.as_ref();
    moments.push((Phase::Create, seen(at, created, || CONTROL_PLANE.into())));
    let Some(node) = node(pod) else { return moments };
    let scheduled = condition(pod, "PodScheduled").filter(|condition| condition.status == "True");
    let since = scheduled.and_then(|scheduled| scheduled.last_transition_time.as_ref());
    moments.push((Phase::Schedule, seen(at, since, || CONTROL_PLANE.into())));
    let Some(container) = serving.and_then(|name| status_of(pod, name)) else { return moments };
    if let Some(started) = first_start(container) {
        moments.push((Phase::Start, seen(at, started, || node.into())));
    }
    let is_ready = is_true(pod, "Ready");
    if container.ready || is_ready {
        let ready = ["ContainersReady", "Ready"].into_iter().find_map(|kind| condition(pod, kind));
        let ready = ready.filter(|ready| ready.status == "True");
        let since = ready.and_then(|ready| ready.last_transition_time.as_ref());
        moments.push((Phase::Load, seen(at, since, || node.into())));
    }
    moments
}

/// The node that a pod has.
pub(super) fn node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|node| !node.is_empty())
}

/// Whether its probes find it ready.
pub(super) fn is_ready(pod: &Pod) -> bool {
    is_true(pod, "Ready")
}

/// Whether the scheduler has found no node for it, so that one may have to be made.
pub(super) fn waits_for_a_node(pod: &Pod) -> bool {
    let scheduled = condition(pod, "PodScheduled");
    node(pod).is_none()
        && scheduled.is_some_and(|it| it.status == "False" && it.reason.as_deref() == Some("Unschedulable"))
}

/// Whether an image of it cannot be had so far, so that fetching it goes on.
pub(super) fn waits_for_an_image(pod: &Pod) -> bool {
    trouble(pod).is_some_and(|trouble| trouble.kind == ObstacleKind::ImagePull)
}

/// How often a container has run before, if it runs now.
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

/// When a container started, if it has: the first time that is known of, since an end and another start are a part of
/// what it takes to load.
fn first_start(status: &ContainerStatus) -> Option<Option<&Time>> {
    [&status.last_state, &status.state].into_iter().flatten().find_map(|state| {
        let running = state.running.as_ref().map(|running| running.started_at.as_ref());
        running.or_else(|| Some(state.terminated.as_ref()?.started_at.as_ref()))
    })
}

fn seen(at: Instant, time: Option<&Time>, clock: impl FnOnce() -> Arc<str>) -> Seen {
    let stamp = time.map(|time| Stamp { time: system(time.0), resolution: SECOND, clock: clock() });
    Seen { at, stamp }
}

/// What another clock says, cut to seconds.
pub(in crate::kube) fn stamp(time: Timestamp, clock: &str) -> Stamp {
    Stamp { time: system(time), resolution: SECOND, clock: clock.into() }
}

fn system(time: Timestamp) -> SystemTime {
    SystemTime::from(time)
}

// === impl Told ===

impl Told {
    /// An Event of the pod, seen `at`. Images of containers that come after the one that serves do not count: it does not
    /// wait for them.
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
            self.started.get_or_insert(Seen { at, stamp });
            return;
        }
        let container = container.unwrap_or_default();
        if !counts || self.done.contains(container) {
            return;
        }
        let message = event.message.as_deref().unwrap_or_default();
        match event.reason.as_deref() {
            Some("Pulling") => drop(self.running.insert(container.into())),
            Some("Pulled") => {
                self.running.remove(container);
                self.done.insert(container.into());
                // Else it says that the image was there already.
                if message.starts_with("Successfully pulled") {
                    self.pulled = Some(Seen { at, stamp });
                }
            }
            // It may have failed: then it is tried again, and goes on until the image is there.
            _ => {}
        }
    }

    pub(super) fn is_pulling(&self) -> bool {
        !self.running.is_empty()
    }

    /// What stands in the way now, if the pod has started so far.
    pub(super) fn warning(&self, has_started: bool, is_ready: bool) -> Option<PodWarning> {
        let warning =
            self.warning.as_ref().filter(|warning| warning.of_running == has_started && !is_ready)?;
        Some(warning.told.clone())
    }

    fn warn(&mut self, event: &Event, pod: &Pod, at: Instant) {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let reason = event.reason.as_deref().unwrap_or_default();
        let said = shorten(event.message.as_deref().unwrap_or_default());
        let (kind, of_running, after, message) = match reason {
            "FailedMount" | "FailedAttachVolume" | "FailedMapVolume" => {
                let message = format!("A volume of pod `{name}` cannot be mounted ({reason}): {said}");
                (ObstacleKind::Volume, false, Duration::ZERO, message)
            }
            "FailedCreatePodSandBox" | "NetworkNotReady" => {
                let message = format!("Pod `{name}` cannot be set up on its node ({reason}): {said}");
                (ObstacleKind::NotReady, false, SETTING_UP, message)
            }
            "Unhealthy" => {
                let after = if is_refusal(&said) { Duration::ZERO } else { LOADING };
                (ObstacleKind::NotReady, true, after, format!("Pod `{name}` runs and is not ready: {said}"))
            }
            // What was in the way is not, or it begins anew.
            "SuccessfulAttachVolume" | "Pulling" | "Pulled" | "Created" | "Started" | "Killing" => {
                self.warning = None;
                return;
            }
            _ => return,
        };
        let told = PodWarning { kind, message: message.into(), from: at + after };
        let before = self.warning.take().filter(|before| before.told.kind == kind);
        let from = before.map_or(told.from, |before| before.told.from.min(told.from));
        self.warning = Some(Warning { told: PodWarning { from, ..told }, of_running });
    }
}

/// Whether a server answered a probe so that waiting does not help: with a status that says that the question is wrong.
fn is_refusal(said: &str) -> bool {
    let status =
        said.split_once("statuscode: ").map(|(_, rest)| rest.trim_end_matches(|c: char| !c.is_ascii_digit()));
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
        return Some(Stamp { time: system(time.0), resolution: MICROSECOND, clock: node.into() });
    }
    let time = event.last_timestamp.as_ref().or(event.first_timestamp.as_ref())?;
    Some(stamp(time.0, node))
}

#[cfg(test)]
mod tests;
