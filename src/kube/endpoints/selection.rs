//! Describes pod selection by Services and InferencePools for failure reasons. Pure.

use std::{collections::BTreeSet, sync::Arc};

use k8s_openapi::api::core::v1::{Container, Pod, Service};

use super::{
    merge::{self, name_of, port_on},
    pool::PoolSelector,
};
use crate::{domain::ServicePort, kube::pod_reasons::is_over, state::Selection};

/// Describes the Service and its current pods.
pub(super) fn of_service(service: &Service, port: &ServicePort, pods: &[Arc<Pod>]) -> Selection {
    let name = format!("Service `{}`", name_of(service));
    let live = || pods.iter().filter(|pod| !is_over(pod));
    let ports: BTreeSet<_> = live().filter_map(|pod| port_on(service, port, pod)).map(i32::from).collect();
    let leads_to = format!("port {port} to {}", join_or(ports.iter().map(i32::to_string), "no port"));
    describe(name, merge::selector(service).map(merge::labels), &ports, &leads_to, live())
}

/// Describes the pool `name` (`namespace/name`) and its current pods.
pub(super) fn of_pool(name: &str, pool: &PoolSelector, pods: &[Arc<Pod>]) -> Selection {
    let ports: BTreeSet<_> = pool.ports.iter().copied().map(i32::from).collect();
    let leads_to = format!("to {}", join_or(ports.iter().map(i32::to_string), "no port"));
    let live = pods.iter().filter(|pod| !is_over(pod));
    describe(format!("InferencePool `{name}`"), Some(merge::labels(&pool.selector)), &ports, &leads_to, live)
}

fn describe<'a>(
    name: String,
    selector: Option<String>,
    ports: &BTreeSet<i32>,
    leads_to: &str,
    live: impl Iterator<Item = &'a Arc<Pod>> + Clone,
) -> Selection {
    let containers = || live.clone().filter_map(|pod| pod.spec.as_ref()).flat_map(|spec| &spec.containers);
    let all: BTreeSet<_> = containers().flat_map(exposed).collect();
    let shown = join_or(all.into_iter().map(|(_, shown)| shown), "no port");
    // A readiness probe of a sidecar alone does not cover the server.
    let is_probed = |pod: &Arc<Pod>| {
        let containers = pod.spec.as_ref().map(|spec| spec.containers.as_slice()).unwrap_or_default();
        let mut serving =
            containers.iter().filter(|container| exposed(container).any(|(port, _)| ports.contains(&port)));
        let has_probe = |container: &Container| container.readiness_probe.is_some();
        serving.next().map_or_else(|| containers.iter().all(has_probe), has_probe)
    };
    let pods = live.clone().count();
    Selection {
        ports: format!("the {name} leads {leads_to}, and its containers expose {shown}").into(),
        name: name.into(),
        selector: selector.map(Into::into),
        is_probed: pods > 0 && live.clone().all(is_probed),
        pods,
    }
}

fn exposed(container: &Container) -> impl Iterator<Item = (i32, String)> {
    container.ports.iter().flatten().map(|port| {
        let number = port.container_port;
        let shown =
            port.name.as_ref().map_or_else(|| number.to_string(), |name| format!("{number} ({name})"));
        (number, shown)
    })
}

fn join_or(all: impl Iterator<Item = String>, none: &str) -> String {
    let all: Vec<_> = all.collect();
    if all.is_empty() { none.to_owned() } else { all.join(", ") }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(target_port: Value) -> Service {
        let value = json!({ "metadata": { "name": "tiny", "namespace": "ml" },
            "spec": { "selector": { "app": "tiny" }, "ports": [{ "port": 80, "targetPort": target_port }] } });
        serde_json::from_value(value).unwrap()
    }

    fn pod(containers: Value, phase: &str) -> Arc<Pod> {
        let value = json!({ "metadata": { "name": "x" }, "spec": { "containers": containers }, "status": { "phase": phase } });
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn vllm(port: u16, probe: &Value) -> Value {
        json!({ "name": "vllm", "ports": [{ "name": "web", "containerPort": port }], "readinessProbe": probe })
    }

    #[test]
    fn selection_describes_service_and_exposed_ports() {
        let pods =
            [pod(json!([vllm(8001, &json!({}))]), "Running"), pod(json!([vllm(9999, &json!({}))]), "Failed")];
        let selection = of_service(&service(json!(8000)), &ServicePort::Number(80), &pods);
        assert_eq!(
            &*selection.ports,
            "the Service `ml/tiny` leads port 80 to 8000, and its containers expose 8001 (web)"
        );
        assert_eq!(
            (selection.selector.as_deref(), selection.pods, selection.is_probed),
            (Some("app=tiny"), 1, true)
        );
        let none = of_service(&service(json!("web")), &ServicePort::Number(80), &[]);
        assert_eq!((none.pods, none.is_probed), (0, false));
    }

    #[test]
    fn is_probed_requires_probe_on_serving_container() {
        let probe = json!({});
        let sidecar = json!({ "name": "istio-proxy", "readinessProbe": {} });
        let is_probed = |containers: Value| {
            let pods = [pod(containers, "Running")];
            of_service(&service(json!(8000)), &ServicePort::Number(80), &pods).is_probed
        };
        assert!(is_probed(json!([vllm(8000, &probe), { "name": "logs" }])));
        assert!(
            !is_probed(json!([vllm(8000, &Value::Null), sidecar])),
            "the sidecar is ready while the model loads"
        );
        assert!(is_probed(json!([vllm(8001, &probe), sidecar])));
        assert!(!is_probed(json!([vllm(8001, &Value::Null), sidecar])), "any of them may be the server");
    }
}
