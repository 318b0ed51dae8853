//! What slices and pods say, taken together. Pure.

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, SocketAddr},
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

use super::{super::pods::ACTIVE_PORTS, pool::Pool};
use crate::{
    domain::{ObstacleKind, Role, Roles, ServicePort},
    state::{Discovered, DiscoveredEndpoint, Problem, Protocol},
};

/// How many endpoints of a target are used at most.
pub(super) const MOST: usize = 4096;

/// Where an endpoint stands. Of two words on the same address the greater one counts: who is on the way out says
/// nothing of who comes after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    Terminating,
    /// A readiness gate of the pod is not met.
    Gated,
    NotReady,
    Ready,
}

/// The endpoints, in the order of their addresses.
type Known = BTreeMap<SocketAddr, (Standing, Protocol, Role)>;

/// Pods that have gone, as long as slices still have them.
#[derive(Debug, Default)]
pub(super) struct Departed {
    known: HashSet<String>,
    gone: HashSet<String>,
}

// === impl Departed ===

impl Departed {
    /// These are there now.
    pub(super) fn update(&mut self, slices: &[Arc<EndpointSlice>], pods: &[Arc<Pod>]) {
        let known: HashSet<_> = pods.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
        self.gone.extend(self.known.difference(&known).cloned());
        if !self.gone.is_empty() {
            let endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
            let listed: HashSet<_> =
                endpoints.filter_map(|endpoint| pod_behind(endpoint)?.uid.as_deref()).collect();
            self.gone.retain(|uid| listed.contains(&**uid) && !known.contains(uid));
        }
        self.known = known;
    }
}

/// The labels by which a Service selects pods, if it does.
pub(super) fn selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    service.spec.as_ref()?.selector.as_ref().filter(|selector| !selector.is_empty())
}

/// A selector, as it is written.
pub(super) fn labels<'a>(selector: impl IntoIterator<Item = (&'a String, &'a String)>) -> String {
    let labels: Vec<_> = selector.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
    labels.join(",")
}

/// How an endpoint wants to be spoken to, by the `appProtocol` of its port.
pub(super) fn protocol(app_protocol: Option<&str>) -> Protocol {
    if app_protocol == Some("kubernetes.io/h2c") { Protocol::H2c } else { Protocol::Http1 }
}

/// The endpoints of a Service.
///
/// The word of a pod wins over what a slice says of it: slices are made from pods, in batches. A slice's word counts
/// for endpoints that are no pods of the Service's selector, and for pods that we have not heard of, but not for those
/// that have gone since.
pub(super) fn service(
    service: &Service,
    port: &ServicePort,
    slices: &[Arc<EndpointSlice>],
    pods: &[Arc<Pod>],
    departed: &Departed,
    roles: &Roles,
) -> Discovered {
    if !roles.is_plain() && selector(service).is_none() {
        let why = format!(
            "the Service {} has no selector, so that the labels of its pods are not known; leave out serve and ready",
            name_of(service)
        );
        let problem = Some(Problem::lasting(ObstacleKind::NoService, why));
        return Discovered { problem, ..Discovered::default() };
    }
    let port = match port_of(service, port) {
        Ok(port) => port,
        Err(why) => {
            let problem = Some(Problem::lasting(ObstacleKind::NoService, why));
            return Discovered { problem, ..Discovered::default() };
        }
    };
    let by_name: HashSet<_> = pods.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect();
    let mut known = Known::new();
    for slice in slices.iter().filter(|slice| matches!(&*slice.address_type, "IPv4" | "IPv6")) {
        let Some((number, of_slice)) = port_in(slice, port.name.as_deref()) else { continue };
        let protocol = protocol(port.app_protocol.as_deref().or(of_slice.app_protocol.as_deref()));
        let unheard_of = |endpoint: &&Endpoint| {
            let Some(pod) = pod_behind(endpoint) else { return true };
            let is_known = pod.name.as_deref().is_some_and(|name| by_name.contains(name));
            !is_known && !pod.uid.as_ref().is_some_and(|uid| departed.gone.contains(uid))
        };
        // What a pod is for is known by its labels only.
        for endpoint in slice.endpoints.iter().filter(|_| roles.is_plain()).filter(unheard_of) {
            // No meaning is defined for further addresses.
            let Some(address) = endpoint.addresses.first().and_then(|address| address.parse().ok()) else {
                continue;
            };
            let address = SocketAddr::new(address, number);
            enter(&mut known, address, (of_endpoint(endpoint), protocol, Role::default()));
        }
    }
    let mut of_pods = Known::new();
    let protocol = protocol(port.app_protocol.as_deref());
    let mut unnamed = None;
    for pod in pods {
        let Some((standing, role)) = of_pod(pod).zip(roles.of(pod.metadata.labels.as_ref())) else {
            continue;
        };
        match target_port(port, pod) {
            Ok(number) => {
                for address in addresses(pod) {
                    enter(&mut of_pods, SocketAddr::new(address, number), (standing, protocol, role));
                }
            }
            Err(name) => unnamed = Some(name),
        }
    }
    known.extend(of_pods);
    let spec = service.spec.as_ref();
    let families = spec.and_then(|spec| spec.ip_families.as_ref());
    let prefers_6 = families.and_then(|families| families.first()).is_some_and(|family| family == "IPv6");
    let mut found = discovered(one_family(known, prefers_6));
    if let Some(name) = unnamed.filter(|_| found.endpoints.is_empty()) {
        let why =
            format!("no container of the pods of the Service {} has a port named {name}", name_of(service));
        found.problem = Some(Problem::lasting(ObstacleKind::PortRefused, why));
    }
    found
}

/// The endpoints of an InferencePool: every active port of every pod.
pub(super) fn pool(pool: &Pool, pods: &[Arc<Pod>], roles: &Roles) -> Discovered {
    let mut known = Known::new();
    for pod in pods {
        let Some((standing, role)) = of_pod(pod).zip(roles.of(pod.metadata.labels.as_ref())) else {
            continue;
        };
        let Some(address) = addresses(pod).next() else { continue };
        for port in active_ports(pool, pod) {
            enter(&mut known, SocketAddr::new(address, port), (standing, pool.protocol, role));
        }
    }
    discovered(known)
}

/// The ports of a pool on which a pod serves: all of them, unless the pod names those that are active. With data
/// parallelism each is a server of its own.
pub(super) fn active_ports(pool: &Pool, pod: &Pod) -> Vec<u16> {
    let annotations = pod.metadata.annotations.as_ref();
    let active = annotations.and_then(|all| ACTIVE_PORTS.iter().find_map(|name| all.get(*name)));
    let Some(active) = active else { return pool.ports.clone() };
    let active: Vec<u16> = active.split(',').filter_map(|port| port.trim().parse().ok()).collect();
    pool.ports.iter().copied().filter(|port| active.contains(port)).collect()
}

/// The port on a pod to which a port of a Service leads.
pub(super) fn port_on(service: &Service, port: &ServicePort, pod: &Pod) -> Option<u16> {
    target_port(port_of(service, port).ok()?, pod).ok()
}

fn discovered(known: Known) -> Discovered {
    let endpoints =
        known.into_iter().take(MOST).map(|(address, (standing, protocol, role))| DiscoveredEndpoint {
            address: address.to_string().into(),
            protocol,
            ready: standing == Standing::Ready,
            terminating: standing == Standing::Terminating,
            gated: standing == Standing::Gated,
            role,
        });
    Discovered { is_synced: true, endpoints: endpoints.collect(), ..Discovered::default() }
}

fn enter(known: &mut Known, address: SocketAddr, new: (Standing, Protocol, Role)) {
    let entry = known.entry(address).or_insert(new);
    if entry.0 < new.0 {
        *entry = new;
    }
}

/// A pod that is in both families is one pod: those of one family only, unless there are none.
fn one_family(mut known: Known, prefers_6: bool) -> Known {
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

fn port_of<'a>(service: &'a Service, port: &ServicePort) -> Result<&'a PortOfService, String> {
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

/// The port of a slice that belongs to the Service's port of this name.
fn port_in<'a>(slice: &'a EndpointSlice, name: Option<&str>) -> Option<(u16, &'a EndpointPort)> {
    let named = |port: &&EndpointPort| {
        port.name.as_deref().unwrap_or_default() == name.unwrap_or_default()
            && is_tcp(port.protocol.as_deref())
    };
    let port = slice.ports.as_ref()?.iter().find(named)?;
    Some((u16::try_from(port.port?).ok()?, port))
}

fn pod_behind(endpoint: &Endpoint) -> Option<&ObjectReference> {
    endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"))
}

fn of_endpoint(endpoint: &Endpoint) -> Standing {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    // `ready` can be overridden by publishNotReadyAddresses; `serving` is what the pod says. Absent means true.
    match conditions.serving.or(conditions.ready).unwrap_or(true) {
        _ if conditions.terminating == Some(true) => Standing::Terminating,
        true => Standing::Ready,
        false => Standing::NotReady,
    }
}

// === pods ===

/// Where a pod stands, unless it has run to its end: then its address may be another one's.
fn of_pod(pod: &Pod) -> Option<Standing> {
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return Some(Standing::Terminating);
    }
    Some(match is_ready(status) {
        true => Standing::Ready,
        false if is_gated(pod, status) => Standing::Gated,
        false => Standing::NotReady,
    })
}

/// Whether a readiness gate that the pod declares is not met. Something outside of the pod meets it, such as a load
/// balancer that has taken the pod in.
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

/// The addresses of a pod, the main one first.
pub(in crate::kube) fn addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> {
    let status = pod.status.as_ref();
    let main = status.and_then(|status| status.pod_ip.as_deref());
    let all = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
    main.into_iter().chain(all.iter().map(|ip| &*ip.ip)).filter_map(|ip| ip.parse().ok())
}

/// The port on the pod that the Service's port leads to; its name, if no container has it.
fn target_port<'a>(port: &'a PortOfService, pod: &Pod) -> Result<u16, &'a str> {
    let name = match &port.target_port {
        None => return u16::try_from(port.port).map_err(|_| ""),
        Some(IntOrString::Int(0)) => return u16::try_from(port.port).map_err(|_| ""),
        Some(IntOrString::Int(number)) => return u16::try_from(*number).map_err(|_| ""),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod.spec.as_ref();
    // Containers that run beside the others are init containers that are always restarted.
    let beside = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let containers = spec.map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let init = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    let mut ports = containers
        .iter()
        .chain(init.iter().filter(beside))
        .flat_map(|container| container.ports.as_deref().unwrap_or_default());
    let is_meant =
        |port: &&ContainerPort| port.name.as_ref() == Some(name) && is_tcp(port.protocol.as_deref());
    let found = ports.find(is_meant).and_then(|port| u16::try_from(port.container_port).ok());
    found.ok_or(name)
}
