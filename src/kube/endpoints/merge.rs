//! Merges Services, EndpointSlices, InferencePools and Pods into endpoints. Pure.

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use k8s_openapi::{
    api::{
        core::v1::{
            Container, ContainerPort, ObjectReference, Pod, PodReadinessGate, PodStatus, Service,
            ServicePort as PortOfService,
        },
        discovery::v1::{Endpoint, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{pool::PoolSelector, protocol::protocol};
use crate::{
    domain::{ObstacleKind, Role, Roles, ServicePort},
    kube::pods::{ACTIVE_PORTS, addresses},
    state::{Discovered, DiscoveredEndpoint, DiscoveryProblem, Protocol},
};

/// Upper bound of endpoints per target.
pub(super) const MAX_ENDPOINTS: usize = 4096;

/// Endpoint state, worst first. If two sources disagree about one address, the better state wins: a terminating pod may
/// share its address with its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum EndpointState {
    Terminating,
    /// A readiness gate of the pod is false.
    Gated,
    NotReady,
    Ready,
}

/// Endpoints, sorted by address.
type EndpointMap = BTreeMap<SocketAddr, (EndpointState, Protocol, Role)>;

/// Deleted pods that EndpointSlices still list.
#[derive(Debug, Default)]
pub(super) struct DeletedPods {
    known: HashSet<String>,
    deleted: HashSet<String>,
}

// === impl DeletedPods ===

impl DeletedPods {
    /// Records the current slices and pods.
    pub(super) fn update(&mut self, slices: &[Arc<EndpointSlice>], pods: &[Arc<Pod>]) {
        let known: HashSet<_> = pods.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
        self.deleted.extend(self.known.difference(&known).cloned());
        if !self.deleted.is_empty() {
            let endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
            let listed: HashSet<_> =
                endpoints.filter_map(|endpoint| pod_ref(endpoint)?.uid.as_deref()).collect();
            self.deleted.retain(|uid| listed.contains(&**uid) && !known.contains(uid));
        }
        self.known = known;
    }
}

/// Returns the selector of a Service, or `None` if it is absent or empty.
pub(super) fn selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    service.spec.as_ref()?.selector.as_ref().filter(|selector| !selector.is_empty())
}

/// Formats a selector as `a=b,c=d`.
pub(super) fn labels<'a>(selector: impl IntoIterator<Item = (&'a String, &'a String)>) -> String {
    let labels: Vec<_> = selector.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
    labels.join(",")
}

/// Returns the endpoints of a Service.
///
/// Pods take precedence over EndpointSlices, which the control plane derives from pods in batches. A slice entry
/// counts only if it refers to no pod, or to a pod that the pod watch has not reported yet, neither as present nor as
/// deleted.
pub(super) fn service(
    service: &Service,
    port: &ServicePort,
    slices: &[Arc<EndpointSlice>],
    pods: &[Arc<Pod>],
    deleted: &DeletedPods,
    roles: &Roles,
) -> Discovered {
    if !roles.is_plain() && selector(service).is_none() {
        let why = format!(
            "the Service {} has no selector, so that the labels of its pods are not known; leave out serve and ready",
            name_of(service)
        );
        let problem = Some(DiscoveryProblem::lasting(ObstacleKind::NoService, why));
        return Discovered { problem, ..Discovered::default() };
    }
    let port = match service_port(service, port) {
        Ok(port) => port,
        Err(why) => {
            let problem = Some(DiscoveryProblem::lasting(ObstacleKind::NoService, why));
            return Discovered { problem, ..Discovered::default() };
        }
    };
    let by_name: HashSet<_> = pods.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect();
    let mut known = EndpointMap::new();
    for slice in slices.iter().filter(|slice| matches!(&*slice.address_type, "IPv4" | "IPv6")) {
        let Some((number, of_slice)) = slice_port(slice, port.name.as_deref()) else { continue };
        let protocol = protocol(port.app_protocol.as_deref().or(of_slice.app_protocol.as_deref()));
        let is_unknown = |endpoint: &&Endpoint| {
            let Some(pod) = pod_ref(endpoint) else { return true };
            let is_known = pod.name.as_deref().is_some_and(|name| by_name.contains(name));
            !is_known && !pod.uid.as_ref().is_some_and(|uid| deleted.deleted.contains(uid))
        };
        // Roles are defined by pod labels, which slices lack.
        for endpoint in slice.endpoints.iter().filter(|_| roles.is_plain()).filter(is_unknown) {
            // Kubernetes assigns no meaning to further addresses.
            let Some(address) = endpoint.addresses.first().and_then(|address| address.parse().ok()) else {
                continue;
            };
            let address = SocketAddr::new(address, number);
            insert_better(&mut known, address, (slice_state(endpoint), protocol, Role::default()));
        }
    }
    let mut of_pods = EndpointMap::new();
    let protocol = protocol(port.app_protocol.as_deref());
    let mut unnamed = None;
    for pod in pods {
        let Some((state, role)) = pod_state(pod).zip(roles.of(pod.metadata.labels.as_ref())) else {
            continue;
        };
        match target_port(port, pod) {
            Ok(number) => {
                for address in addresses(pod) {
                    insert_better(&mut of_pods, SocketAddr::new(address, number), (state, protocol, role));
                }
            }
            Err(name) => unnamed = Some(name),
        }
    }
    known.extend(of_pods);
    let spec = service.spec.as_ref();
    let families = spec.and_then(|spec| spec.ip_families.as_ref());
    let prefers_6 = families.and_then(|families| families.first()).is_some_and(|family| family == "IPv6");
    let mut found = discovered(prefer_family(known, prefers_6));
    if let Some(name) = unnamed.filter(|_| found.endpoints.is_empty()) {
        let why =
            format!("no container of the pods of the Service {} has a port named {name}", name_of(service));
        found.problem = Some(DiscoveryProblem::lasting(ObstacleKind::PortRefused, why));
    }
    found
}

/// Returns the endpoints of an InferencePool: every active port of every pod.
pub(super) fn pool(pool: &PoolSelector, pods: &[Arc<Pod>], roles: &Roles) -> Discovered {
    let mut known = EndpointMap::new();
    for pod in pods {
        let Some((state, role)) = pod_state(pod).zip(roles.of(pod.metadata.labels.as_ref())) else {
            continue;
        };
        let Some(address) = addresses(pod).next() else { continue };
        for port in active_ports(pool, pod) {
            insert_better(&mut known, SocketAddr::new(address, port), (state, pool.protocol, role));
        }
    }
    discovered(known)
}

/// Returns the ports of the pool on which a pod serves: all, unless an annotation of the pod lists the active ones.
/// With data parallelism each port is a server of its own.
pub(super) fn active_ports(pool: &PoolSelector, pod: &Pod) -> Vec<u16> {
    let annotations = pod.metadata.annotations.as_ref();
    let active = annotations.and_then(|all| ACTIVE_PORTS.iter().find_map(|name| all.get(*name)));
    let Some(active) = active else { return pool.ports.clone() };
    let active: Vec<u16> = active.split(',').filter_map(|port| port.trim().parse().ok()).collect();
    pool.ports.iter().copied().filter(|port| active.contains(port)).collect()
}

/// Resolves a Service port to a port of the pod.
pub(super) fn port_on(service: &Service, port: &ServicePort, pod: &Pod) -> Option<u16> {
    target_port(service_port(service, port).ok()?, pod).ok()
}

fn discovered(known: EndpointMap) -> Discovered {
    let endpoints =
        known.into_iter().take(MAX_ENDPOINTS).map(|(address, (state, protocol, role))| DiscoveredEndpoint {
            address: address.to_string().into(),
            protocol,
            ready: state == EndpointState::Ready,
            terminating: state == EndpointState::Terminating,
            gated: state == EndpointState::Gated,
            role,
        });
    Discovered { is_synced: true, endpoints: endpoints.collect(), ..Discovered::default() }
}

fn insert_better(known: &mut EndpointMap, address: SocketAddr, new: (EndpointState, Protocol, Role)) {
    let entry = known.entry(address).or_insert(new);
    if entry.0 < new.0 {
        *entry = new;
    }
}

/// Keeps the addresses of the preferred family if there are any, so that a dual-stack pod counts once.
fn prefer_family(mut known: EndpointMap, prefers_6: bool) -> EndpointMap {
    if known.keys().any(|address| address.is_ipv6() == prefers_6) {
        known.retain(|address, _| address.is_ipv6() == prefers_6);
    }
    known
}

// === services ===

pub(super) fn name_of(service: &Service) -> String {
    let meta = &service.metadata;
    format!("{}/{}", meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

fn service_port<'a>(service: &'a Service, port: &ServicePort) -> Result<&'a PortOfService, String> {
    let spec = service.spec.as_ref();
    if spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName") {
        return Err(format!("the Service {} is an ExternalName, which has no pods", name_of(service)));
    }
    let ports = spec.and_then(|spec| spec.ports.as_deref()).unwrap_or_default();
    let is_meant = |candidate: &&PortOfService| match port {
        ServicePort::Number(number) => candidate.port == i32::from(*number),
        ServicePort::Name(name) => candidate.name.as_ref() == Some(name),
    };
    ports.iter().filter(|port| is_tcp(port.protocol.as_deref())).find(is_meant).ok_or_else(|| {
        let shown = |port: &PortOfService| match &port.name {
            Some(name) => format!("{} ({name})", port.port),
            None => port.port.to_string(),
        };
        let has = ports.iter().filter(|port| is_tcp(port.protocol.as_deref())).map(shown).collect::<Vec<_>>();
        let has = if has.is_empty() { "none".into() } else { has.join(", ") };
        format!("the Service {} has no TCP port {port}; it has: {has}", name_of(service))
    })
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

// === slices ===

/// Returns the slice port with the name of the Service port.
fn slice_port<'a>(slice: &'a EndpointSlice, name: Option<&str>) -> Option<(u16, &'a EndpointPort)> {
    let named = |port: &&EndpointPort| {
        port.name.as_deref().unwrap_or_default() == name.unwrap_or_default()
            && is_tcp(port.protocol.as_deref())
    };
    let port = slice.ports.as_ref()?.iter().find(named)?;
    Some((u16::try_from(port.port?).ok()?, port))
}

fn pod_ref(endpoint: &Endpoint) -> Option<&ObjectReference> {
    endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"))
}

fn slice_state(endpoint: &Endpoint) -> EndpointState {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    // `serving` is the readiness of the pod; publishNotReadyAddresses overrides `ready`. Absent means true.
    match conditions.serving.or(conditions.ready).unwrap_or(true) {
        _ if conditions.terminating == Some(true) => EndpointState::Terminating,
        true => EndpointState::Ready,
        false => EndpointState::NotReady,
    }
}

// === pods ===

/// Returns the state of a pod, or `None` once it has terminated: its address may have been reassigned.
fn pod_state(pod: &Pod) -> Option<EndpointState> {
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return Some(EndpointState::Terminating);
    }
    Some(match is_ready(status) {
        true => EndpointState::Ready,
        false if is_gated(pod, status) => EndpointState::Gated,
        false => EndpointState::NotReady,
    })
}

/// Returns whether a declared readiness gate is false. Gates are set by external controllers, such as a load balancer
/// that registers the pod.
fn is_gated(pod: &Pod, status: &PodStatus) -> bool {
    let gates = pod.spec.as_ref().and_then(|spec| spec.readiness_gates.as_deref()).unwrap_or_default();
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let is_met = |gate: &PodReadinessGate| {
        let mut of_gate = conditions.iter().filter(|condition| condition.type_ == gate.condition_type);
        of_gate.any(|condition| condition.status == "True")
    };
    !gates.iter().all(is_met)
}

fn is_ready(status: &PodStatus) -> bool {
    let conditions = status.conditions.as_deref().unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Resolves `targetPort`. The error is the port name that no container declares.
fn target_port<'a>(port: &'a PortOfService, pod: &Pod) -> Result<u16, &'a str> {
    let name = match &port.target_port {
        None => return u16::try_from(port.port).map_err(|_| ""),
        Some(IntOrString::Int(0)) => return u16::try_from(port.port).map_err(|_| ""),
        Some(IntOrString::Int(number)) => return u16::try_from(*number).map_err(|_| ""),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod.spec.as_ref();
    // Sidecars are init containers with restartPolicy Always.
    let is_sidecar = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let containers = spec.map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let init = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    let mut ports = containers
        .iter()
        .chain(init.iter().filter(is_sidecar))
        .flat_map(|container| container.ports.as_deref().unwrap_or_default());
    let is_meant =
        |port: &&ContainerPort| port.name.as_ref() == Some(name) && is_tcp(port.protocol.as_deref());
    let found = ports.find(is_meant).and_then(|port| u16::try_from(port.container_port).ok());
    found.ok_or(name)
}
