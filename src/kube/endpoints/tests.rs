use std::{net::IpAddr, time::Duration};

use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::*;
use crate::{
    domain::Role,
    kube::stand_in::FakeApiServer,
    state::{DiscoveredEndpoint, Protocol},
};

const SERVICES: &str = "/api/v1/namespaces/ml/services";
const PODS_PATH: &str = "/api/v1/namespaces/ml/pods";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/ml/endpointslices";
const POOLS: &str = "/apis/inference.networking.k8s.io/v1/namespaces/ml/inferencepools";

// === objects ===

fn service_with(spec: Value) -> Value {
    let mut whole = json!({
        "selector": { "app": "tiny" },
        "ports": [{ "name": "http", "port": 80, "targetPort": 8000 }],
        "ipFamilies": ["IPv4"],
    });
    for (key, value) in spec.as_object().unwrap() {
        whole[key] = value.clone();
    }
    json!({ "metadata": { "name": "tiny", "namespace": "ml" }, "spec": whole })
}

fn pod_at(name: &str, ip: &str, ready: bool) -> Value {
    json!({
        "metadata": { "name": name, "namespace": "ml", "uid": name, "labels": { "app": "tiny" } },
        "spec": { "containers": [{ "name": "vllm", "ports": [{ "name": "web", "containerPort": 8001 }] }] },
        "status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{ "ip": ip }],
            "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
        },
    })
}

fn terminating(mut object: Value) -> Value {
    object["metadata"]["deletionTimestamp"] = "2026-11-24T00:00:00Z".into();
    object
}

/// Returns a slice of these addresses, each with the pod behind it and its conditions.
fn slice_of(name: &str, port: Value, endpoints: &[(&str, Option<&str>, Value)]) -> Value {
    let endpoints = endpoints.iter().map(|(ip, pod, conditions)| {
        let target = pod.map(|pod| json!({ "kind": "Pod", "name": pod, "namespace": "ml", "uid": pod }));
        json!({ "addresses": [ip], "conditions": conditions, "targetRef": target })
    });
    json!({
        "metadata": { "name": name, "namespace": "ml", "labels": { SERVICE_NAME: "tiny" } },
        "addressType": if endpoints.clone().any(|endpoint| endpoint["addresses"][0].as_str().unwrap().contains(':')) { "IPv6" } else { "IPv4" },
        "ports": [port],
        "endpoints": endpoints.collect::<Vec<_>>(),
    })
}

fn port(number: u16) -> Value {
    json!({ "name": "http", "port": number, "protocol": "TCP" })
}

fn conditions(ready: bool) -> Value {
    json!({ "ready": ready, "serving": ready, "terminating": false })
}

fn parsed<K: serde::de::DeserializeOwned>(objects: &[Value]) -> Vec<Arc<K>> {
    objects.iter().map(|object| Arc::new(serde_json::from_value(object.clone()).unwrap())).collect()
}

/// Formats the discovered endpoints as `address`, with `!` if not ready and `†` if terminating.
fn merged(service: &Value, slices: &[Value], pods: &[Value]) -> Result<String, String> {
    let port = ServicePort::Name("http".into());
    let service = serde_json::from_value(service.clone()).unwrap();
    shown(&merge::service(
        &service,
        &port,
        &parsed(slices),
        &parsed(pods),
        &DeletedPods::default(),
        &Roles::default(),
    ))
}

fn shown(discovered: &Discovered) -> Result<String, String> {
    if let Some(problem) = &discovered.problem {
        return Err(problem.to_string());
    }
    let shown = discovered.endpoints.iter().map(|endpoint| {
        let state = match (endpoint.terminating, endpoint.ready) {
            (true, _) => "†",
            (_, true) => "",
            (_, false) => "!",
        };
        format!("{}{state}", endpoint.address)
    });
    Ok(shown.collect::<Vec<_>>().join(" "))
}

fn is(text: &str) -> Result<String, String> {
    Ok(text.into())
}

// === slices and pods taken together ===

#[test]
fn pod_takes_precedence_over_its_slice() {
    let service = service_with(json!({}));
    let slice = slice_of(
        "a",
        port(8000),
        &[("10.0.0.1", Some("one"), conditions(true)), ("10.0.0.2", Some("two"), conditions(false))],
    );
    let pods = [
        pod_at("one", "10.0.0.1", false),
        pod_at("two", "10.0.0.2", true),
        pod_at("three", "10.0.0.3", true),
    ];
    assert_eq!(
        merged(&service, std::slice::from_ref(&slice), &pods),
        is("10.0.0.1:8000! 10.0.0.2:8000 10.0.0.3:8000")
    );
    let pods = [terminating(pods[0].clone()), terminating(pods[1].clone())];
    assert_eq!(merged(&service, &[slice], &pods), is("10.0.0.1:8000† 10.0.0.2:8000†"));
}

#[test]
fn slice_counts_without_pod_or_for_unknown_pod() {
    let service = service_with(json!({ "selector": null }));
    let slices = [
        slice_of("a", port(8000), &[("10.0.0.1", None, conditions(true)), ("10.0.0.2", None, json!({}))]),
        slice_of("b", port(9000), &[("10.0.0.1", Some("unheard-of"), conditions(false))]),
        slice_of("c", json!({ "name": "metrics", "port": 1 }), &[("10.0.0.7", None, conditions(true))]),
        slice_of(
            "d",
            json!({ "name": "http", "port": 1, "protocol": "UDP" }),
            &[("10.0.0.8", None, conditions(true))],
        ),
        slice_of("e", json!({ "name": "http" }), &[("10.0.0.9", None, conditions(true))]),
    ];
    assert_eq!(
        merged(&service, &slices, &[]),
        is("10.0.0.1:8000 10.0.0.1:9000! 10.0.0.2:8000"),
        "absent conditions are true"
    );
}

#[test]
fn published_not_ready_address_is_not_ready() {
    let service = service_with(json!({ "selector": null, "publishNotReadyAddresses": true }));
    let slice = slice_of(
        "a",
        port(8000),
        &[
            ("10.0.0.1", None, json!({ "ready": true, "serving": false })),
            ("10.0.0.2", None, json!({ "ready": true, "serving": true, "terminating": true })),
            ("10.0.0.3", None, json!({ "ready": false })),
        ],
    );
    assert_eq!(merged(&service, &[slice], &[]), is("10.0.0.1:8000! 10.0.0.2:8000† 10.0.0.3:8000!"));
}

#[test]
fn duplicate_address_keeps_better_state() {
    let service = service_with(json!({}));
    let slices = [
        slice_of(
            "a",
            port(8000),
            &[("10.0.0.1", None, conditions(false)), ("10.0.0.2", None, conditions(true))],
        ),
        slice_of(
            "b",
            port(8000),
            &[("10.0.0.1", None, conditions(true)), ("10.0.0.2", None, conditions(true))],
        ),
    ];
    assert_eq!(merged(&service, &slices, &[]), is("10.0.0.1:8000 10.0.0.2:8000"));
    let pods = [terminating(pod_at("old", "10.0.0.3", true)), pod_at("new", "10.0.0.3", false)];
    assert_eq!(merged(&service, &[], &pods), is("10.0.0.3:8000!"), "the address is the new one's");
}

#[test]
fn pods_ended_or_without_address_are_skipped() {
    let service = service_with(json!({}));
    let mut failed = pod_at("failed", "10.0.0.1", true);
    failed["status"]["phase"] = "Failed".into();
    let mut pending = pod_at("pending", "", false);
    pending["status"] = json!({ "phase": "Pending" });
    let slice = slice_of("a", port(8000), &[("10.0.0.1", Some("failed"), conditions(true))]);
    assert_eq!(merged(&service, &[slice], &[failed, pending]), is(""));
}

#[test]
fn ports_resolve_by_name_and_number() {
    let named = service_with(json!({ "ports": [{ "name": "http", "port": 80, "targetPort": "web" }] }));
    let mut sidecar = pod_at("sidecar", "10.0.0.2", true);
    sidecar["spec"] = json!({
        "containers": [{ "name": "vllm" }],
        "initContainers": [
            { "name": "once", "ports": [{ "name": "web", "containerPort": 1 }] },
            { "name": "proxy", "restartPolicy": "Always", "ports": [
                { "name": "web", "containerPort": 2, "protocol": "UDP" },
                { "name": "web", "containerPort": 3 },
            ] },
        ],
    });
    let pods = [pod_at("one", "10.0.0.1", true), sidecar];
    assert_eq!(merged(&named, &[], &pods), is("10.0.0.1:8001 10.0.0.2:3"));
    let missing = service_with(json!({ "ports": [{ "name": "http", "port": 80, "targetPort": "nowhere" }] }));
    let why = "no container of the pods of the Service ml/tiny has a port named nowhere";
    assert_eq!(merged(&missing, &[], &pods), Err(why.into()));
    assert_eq!(merged(&missing, &[], &[]), is(""), "at zero nobody knows");
    let same = service_with(json!({ "ports": [{ "name": "http", "port": 80 }] }));
    assert_eq!(merged(&same, &[], &pods[..1]), is("10.0.0.1:80"));
}

#[test]
fn unusable_service_reports_reason() {
    let ports = json!([
        { "name": "dns", "port": 53, "protocol": "UDP" },
        { "name": "web", "port": 80 },
        { "port": 81 },
    ]);
    for (spec, why) in [
        (json!({ "ports": ports }), "the Service ml/tiny has no TCP port http; it has: 80 (web), 81"),
        (json!({ "ports": null }), "the Service ml/tiny has no TCP port http; it has: none"),
        (json!({ "type": "ExternalName" }), "the Service ml/tiny is an ExternalName, which has no pods"),
    ] {
        assert_eq!(merged(&service_with(spec), &[], &[pod_at("one", "10.0.0.1", true)]), Err(why.into()));
    }
}

#[test]
fn dual_stack_pod_is_one_endpoint() {
    let mut pod = pod_at("one", "10.0.0.1", true);
    pod["status"]["podIPs"] = json!([{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }]);
    let slices = [
        slice_of("a", port(8000), &[("10.0.0.2", None, conditions(true))]),
        slice_of("b", port(8000), &[("fd00::2", None, conditions(true))]),
    ];
    let both = service_with(json!({ "ipFamilies": ["IPv6", "IPv4"] }));
    assert_eq!(merged(&both, &slices, std::slice::from_ref(&pod)), is("[fd00::1]:8000 [fd00::2]:8000"));
    assert_eq!(merged(&service_with(json!({})), &slices, &[pod]), is("10.0.0.1:8000 10.0.0.2:8000"));
    assert_eq!(merged(&service_with(json!({})), &slices[1..], &[]), is("[fd00::2]:8000"), "better than none");
}

#[test]
fn app_protocol_h2c_selects_http2() {
    let h2c = json!("kubernetes.io/h2c");
    let of = |service: Value, slice_port: Value| {
        let slices = [slice_of("a", slice_port, &[("10.0.0.1", None, conditions(true))])];
        let service = serde_json::from_value(service).unwrap();
        let found = merge::service(
            &service,
            &ServicePort::Number(80),
            &parsed(&slices),
            &[],
            &DeletedPods::default(),
            &Roles::default(),
        );
        found.endpoints[0].protocol
    };
    let service = |protocol: &Value| {
        service_with(json!({ "ports": [{ "name": "http", "port": 80, "appProtocol": protocol }] }))
    };
    assert_eq!(of(service(&h2c), port(8000)), Protocol::H2c);
    let slice = json!({ "name": "http", "port": 8000, "appProtocol": h2c });
    assert_eq!(of(service(&Value::Null), slice.clone()), Protocol::H2c, "a slice of one's own");
    assert_eq!(of(service(&json!("http")), slice), Protocol::Http1, "the Service wins");
}

#[test]
fn unmet_readiness_gate_is_gated() {
    let state = |gates: Value, conditions: Value| {
        let mut pod = pod_at("one", "10.0.0.1", false);
        pod["spec"]["readinessGates"] = gates;
        pod["status"]["conditions"] = conditions;
        let service = serde_json::from_value(service_with(json!({}))).unwrap();
        let port = ServicePort::Number(80);
        let none = DeletedPods::default();
        let found = merge::service(&service, &port, &[], &parsed(&[pod]), &none, &Roles::default());
        let DiscoveredEndpoint { ready, gated, .. } = found.endpoints[0];
        (ready, gated)
    };
    let condition = |kind: &str, status: &str| json!({ "type": kind, "status": status });
    let gates = json!([{ "conditionType": "target-health.elbv2.k8s.aws/tiny" }]);
    let met = |status: &str| condition("target-health.elbv2.k8s.aws/tiny", status);
    let (containers, unready) = (condition("ContainersReady", "True"), condition("Ready", "False"));
    for (gates, conditions, expected) in [
        (gates.clone(), json!([containers, unready]), (false, true)),
        (gates.clone(), json!([containers, met("False"), unready]), (false, true)),
        (gates.clone(), json!([met("True"), unready]), (false, false)),
        (gates.clone(), json!([met("True"), condition("Ready", "True")]), (true, false)),
        (json!([]), json!([containers, unready]), (false, false)),
        (Value::Null, json!([met("False"), unready]), (false, false)),
    ] {
        assert_eq!(state(gates, conditions.clone()), expected, "{conditions}");
    }
}

#[test]
fn roles_follow_pod_labels_not_slices() {
    let of = |role: &str, ip: &str| {
        let mut pod = pod_at(role, ip, true);
        pod["metadata"]["labels"]["role"] = role.into();
        pod
    };
    let pods = [of("decode", "10.0.0.1"), of("prefill", "10.0.0.2"), of("router", "10.0.0.3")];
    let slice = slice_of("a", port(8000), &[("10.0.0.4", None, conditions(true))]);
    let labels = |role: &str| [("role".to_owned(), role.to_owned())].into();
    let groups = ["decode", "prefill"].map(|role| (role.to_owned(), labels(role))).into();
    let roles = Roles { serve: labels("decode"), groups };
    let merged = |service: Value| {
        let service = serde_json::from_value(service).unwrap();
        let port = ServicePort::Number(80);
        merge::service(
            &service,
            &port,
            &parsed(std::slice::from_ref(&slice)),
            &parsed(&pods),
            &DeletedPods::default(),
            &roles,
        )
    };
    let found = merged(service_with(json!({})));
    let found: Vec<_> = found.endpoints.iter().map(|pod| (&*pod.address, pod.role)).collect();
    let decode = Role { is_helper: false, groups: 0b01 };
    let prefill = Role { is_helper: true, groups: 0b10 };
    assert_eq!(found, [("10.0.0.1:8000", decode), ("10.0.0.2:8000", prefill)]);
    let problem = merged(service_with(json!({ "selector": null }))).problem.unwrap();
    assert!(problem.text.contains("has no selector"), "{problem}");
}

#[test]
fn endpoints_are_capped() {
    let pods: Vec<_> = (0..5000)
        .map(|at| pod_at(&format!("p{at}"), &format!("10.1.{}.{}", at / 250, at % 250), true))
        .collect();
    let service = serde_json::from_value(service_with(json!({}))).unwrap();
    let found = merge::service(
        &service,
        &ServicePort::Number(80),
        &[],
        &parsed(&pods),
        &DeletedPods::default(),
        &Roles::default(),
    );
    assert_eq!(found.endpoints.len(), merge::MAX_ENDPOINTS);
}

#[test]
fn pool_lists_pods_and_ports() {
    let read = |spec: Value| {
        let pool = json!({ "metadata": { "name": "tiny", "namespace": "ml" }, "apiVersion": "x", "kind": "x", "spec": spec });
        pool::read(&serde_json::from_value(pool).unwrap())
    };
    let selector = json!({ "matchLabels": { "app": "tiny" } });
    let pool = read(json!({ "selector": selector, "targetPorts": [{ "number": 8000 }, { "number": 8001 }] }))
        .unwrap();
    let pods = [pod_at("one", "10.0.0.1", true), pod_at("two", "10.0.0.2", false)];
    assert_eq!(
        shown(&merge::pool(&pool, &parsed(&pods), &Roles::default())),
        is("10.0.0.1:8000 10.0.0.1:8001 10.0.0.2:8000! 10.0.0.2:8001!")
    );
    let none = "selects no pods: it has no spec.selector.matchLabels";
    for (spec, why) in [
        (json!({}), none),
        (json!("no pool"), none),
        (json!({ "selector": { "matchLabels": {} } }), none),
        (json!({ "selector": selector }), "has no spec.targetPorts with a number"),
        (
            json!({ "selector": selector, "targetPorts": [{ "number": 70000 }, 7] }),
            "has no spec.targetPorts with a number",
        ),
        (
            json!({ "selector": { "matchLabels": { "app": 7 } }, "targetPorts": [{ "number": 1 }] }),
            "has a label in its selector that is not a string",
        ),
    ] {
        assert_eq!(read(spec), Err(why));
    }
}

/// State of a pod or of a slice's endpoint, as numbers: one of a few addresses, and one of a few conditions.
type EncodedEntry = (u8, u8);

proptest! {
    /// For all pods and slices, in any order: the addresses are sorted and unique; the state of a known pod overrules
    /// slices; for an address that only slices list, the best of their states counts.
    #[test]
    fn merge_of_random_slices_and_pods_is_sound(
        pods in prop::collection::vec((0..6_u8, 0..4_u8), 0..8),
        slices in prop::collection::vec(prop::collection::vec((0..6_u8, 0..3_u8, 0..8_u8), 0..6), 0..4),
        seed: u64,
    ) {
        let ip = |at: u8| format!("10.0.0.{at}");
        let state = |how: u8| json!({ "ready": how > 0, "serving": how == 2, "terminating": how == 0 });
        let of_pods: Vec<Value> = pods.iter().enumerate().map(|(index, (at, how))| {
            let mut pod = pod_at(&index.to_string(), &ip(*at), *how == 2);
            match how {
                0 => pod = terminating(pod),
                3 => pod["status"]["phase"] = "Succeeded".into(),
                _ => {}
            }
            pod
        }).collect();
        let mut of_slices: Vec<Value> = slices.iter().enumerate().map(|(index, endpoints)| {
            let endpoints: Vec<_> = endpoints.iter().map(|(at, how, pod)| (ip(*at), *how, pod.to_string())).collect();
            let endpoints: Vec<_> = endpoints.iter().map(|(ip, how, pod)| (&**ip, Some(&**pod), state(*how))).collect();
            slice_of(&index.to_string(), port(8000), &endpoints)
        }).collect();
        let service: Service = serde_json::from_value(service_with(json!({}))).unwrap();
        let merge = |slices: &[Value], pods: &[Value]| {
            merge::service(&service, &ServicePort::Number(80), &parsed(slices), &parsed(pods), &DeletedPods::default(), &Roles::default()).endpoints
        };
        let found = merge(&of_slices, &of_pods);
        let ips: Vec<IpAddr> =
            found.iter().map(|endpoint| endpoint.address.split(':').next().unwrap().parse().unwrap()).collect();
        prop_assert!(ips.is_sorted_by(|one, next| one < next));
        let best = |entries: &mut dyn Iterator<Item = EncodedEntry>, at: u8| {
            entries.filter(|(there, _)| *there == at).map(|(_, how)| how).max()
        };
        for at in 0..6 {
            let of_pods = best(&mut pods.iter().copied().filter(|(_, how)| *how < 3), at);
            let mut unheard = slices.iter().flatten().filter(|(_, _, pod)| usize::from(*pod) >= pods.len()).map(|(at, how, _)| (*at, *how));
            let expected = of_pods.or_else(|| best(&mut unheard, at));
            let actual = found.iter().find(|endpoint| endpoint.address.starts_with(&format!("{}:", ip(at))));
            let actual = actual.map(|endpoint| match (endpoint.terminating, endpoint.ready) {
                (true, _) => 0,
                (_, false) => 1,
                (_, true) => 2,
            });
            prop_assert_eq!(actual, expected, "address {}", at);
        }
        // The order of slices and pods has no effect.
        let turns = of_slices.len().max(1);
        of_slices.rotate_left(seed as usize % turns);
        let mut turned = of_pods;
        turned.reverse();
        prop_assert_eq!(merge(&of_slices, &turned), found);
    }
}

// === discovery through an API server ===

struct DiscoveryTest {
    api: FakeApiServer,
    endpoints: Endpoints,
    found: watch::Receiver<Arc<Discovered>>,
}

fn target(source: EndpointSource) -> ClusterTarget {
    ClusterTarget { namespace: "ml".into(), source, gateway: None, roles: Roles::default() }
}

fn tiny() -> ClusterTarget {
    target(EndpointSource::Service { name: "tiny".into(), port: ServicePort::Number(80) })
}

impl DiscoveryTest {
    fn new(target: ClusterTarget) -> Self {
        let api = FakeApiServer::default();
        let cluster = api.cluster();
        let endpoints = Endpoints::new(cluster.clone(), PodWatches::new(cluster));
        let found = endpoints.watch(&target);
        Self { api, endpoints, found }
    }

    /// Waits until discovery reports `expected`.
    async fn expect_found(&mut self, expected: Result<&str, &str>) {
        let expected = expected.map(String::from).map_err(String::from);
        let so = self
            .found
            .wait_for(|found| (found.is_synced || found.problem.is_some()) && shown(found) == expected);
        let waited = timeout(Duration::from_secs(30), so).await.map(drop);
        assert!(waited.is_ok(), "found {:?} instead of {expected:?}", self.found.borrow());
    }
}

#[tokio::test]
async fn unordered_events_converge() {
    let mut discovery = DiscoveryTest::new(tiny());
    discovery.expect_found(Err("the Service ml/tiny does not exist")).await;
    // The slice appears before its Service, and the pod of the slice last.
    let slice = |ready| slice_of("tiny-a", port(8000), &[("10.0.0.1", Some("one"), conditions(ready))]);
    discovery.api.put_in(SLICES, slice(true));
    discovery.api.put_in(SERVICES, service_with(json!({})));
    discovery.expect_found(Ok("10.0.0.1:8000")).await;
    discovery.api.put_in(PODS_PATH, pod_at("one", "10.0.0.1", false));
    discovery.expect_found(Ok("10.0.0.1:8000!")).await;
    discovery.api.put_in(PODS_PATH, pod_at("two", "10.0.0.2", true));
    discovery.expect_found(Ok("10.0.0.1:8000! 10.0.0.2:8000")).await;
    discovery.api.put_in(PODS_PATH, terminating(pod_at("one", "10.0.0.1", true)));
    discovery.expect_found(Ok("10.0.0.1:8000† 10.0.0.2:8000")).await;
    // The pod is deleted before the slice is updated.
    discovery.api.remove(&format!("{PODS_PATH}/one"));
    discovery.expect_found(Ok("10.0.0.2:8000")).await;
    discovery.api.put_in(SLICES, slice(false));
    discovery.api.put_in(PODS_PATH, pod_at("two", "10.0.0.2", false));
    discovery.expect_found(Ok("10.0.0.2:8000!")).await;
    discovery.api.remove(&format!("{SLICES}/tiny-a"));
    discovery.api.put_in(PODS_PATH, pod_at("two", "10.0.0.2", true));
    discovery.expect_found(Ok("10.0.0.2:8000")).await;
    // The Service gets another selector and another port.
    let mut other = pod_at("other", "10.0.0.9", true);
    other["metadata"]["labels"]["app"] = "other".into();
    discovery.api.put_in(PODS_PATH, other);
    let ports = json!([{ "name": "http", "port": 80, "targetPort": 9000 }]);
    discovery.api.put_in(SERVICES, service_with(json!({ "selector": { "app": "other" }, "ports": ports })));
    discovery.expect_found(Ok("10.0.0.9:9000")).await;
    discovery.api.remove(&format!("{SERVICES}/tiny"));
    discovery.expect_found(Err("the Service ml/tiny does not exist")).await;
    discovery.api.put_in(SERVICES, service_with(json!({})));
    discovery.expect_found(Ok("10.0.0.2:8000")).await;
}

#[tokio::test]
async fn irrelevant_change_is_not_published() {
    let mut discovery = DiscoveryTest::new(tiny());
    discovery.api.put_in(SERVICES, service_with(json!({})));
    discovery.api.put_in(PODS_PATH, pod_at("one", "10.0.0.1", true));
    discovery.expect_found(Ok("10.0.0.1:8000")).await;
    discovery.api.await_watch_count(3).await;
    discovery.found.mark_unchanged();
    let mut renamed = pod_at("one", "10.0.0.1", true);
    renamed["metadata"]["labels"]["version"] = "2".into();
    discovery.api.put_in(PODS_PATH, renamed);
    let before = discovery.found.borrow().clone();
    discovery.api.put_in(PODS_PATH, pod_at("two", "10.0.0.2", true));
    discovery.found.changed().await.unwrap();
    let after = discovery.found.borrow_and_update().clone();
    assert_eq!((before.endpoints.len(), after.endpoints.len()), (1, 2), "the first change is the second pod");
}

#[tokio::test]
async fn api_server_outage_keeps_last_state() {
    let mut discovery = DiscoveryTest::new(tiny());
    discovery.api.put_in(SERVICES, service_with(json!({})));
    discovery.api.put_in(PODS_PATH, pod_at("one", "10.0.0.1", true));
    discovery.expect_found(Ok("10.0.0.1:8000")).await;
    discovery.api.await_watch_count(3).await;
    discovery.found.mark_unchanged();
    discovery.api.refuse_connections().await;
    discovery.api.put_in(PODS_PATH, pod_at("two", "10.0.0.2", true));
    discovery.api.accept_connections();
    discovery.found.changed().await.unwrap();
    assert_eq!(shown(&discovery.found.borrow()), is("10.0.0.1:8000 10.0.0.2:8000"), "and nothing in between");
    let lists = [SERVICES, SLICES, PODS_PATH].map(|path| discovery.api.lists(path));
    assert_eq!(lists, [1; 3], "the watches continue where they were");
}

#[tokio::test]
async fn routes_share_watch_until_last_drop() {
    let mut discovery = DiscoveryTest::new(tiny());
    discovery.api.put_in(SERVICES, service_with(json!({})));
    discovery.expect_found(Ok("")).await;
    discovery.api.await_watch_count(3).await;
    // A target with a gateway shares the watches.
    let gateway = ClusterTarget { gateway: Some("http://envoy:80".into()), ..tiny() };
    let second = discovery.endpoints.watch(&gateway);
    // Another port of the same Service shares the watches too.
    let name = ServicePort::Name("http".into());
    let mut third =
        discovery.endpoints.watch(&target(EndpointSource::Service { name: "tiny".into(), port: name }));
    third.wait_for(|found| found.is_synced).await.unwrap();
    discovery.api.await_watch_count(3).await;
    drop((second, third));
    discovery.api.await_watch_count(3).await;
    discovery.found = watch::channel(Arc::default()).1;
    discovery.api.await_watch_count(0).await;
    discovery.found = discovery.endpoints.watch(&tiny());
    discovery.expect_found(Ok("")).await;
    discovery.api.await_watch_count(3).await;
}

#[tokio::test]
async fn pool_is_discovered_like_service() {
    let mut discovery = DiscoveryTest::new(target(EndpointSource::InferencePool { name: "tiny".into() }));
    discovery.expect_found(Err("the InferencePool ml/tiny does not exist")).await;
    discovery.api.put_in(PODS_PATH, pod_at("one", "10.0.0.1", false));
    let pool = |spec: Value| {
        json!({ "apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool",
            "metadata": { "name": "tiny", "namespace": "ml" }, "spec": spec })
    };
    discovery.api.put_in(POOLS, pool(json!({ "selector": 7 })));
    let why = "the InferencePool ml/tiny selects no pods: it has no spec.selector.matchLabels";
    discovery.expect_found(Err(why)).await;
    let selector = json!({ "matchLabels": { "app": "tiny" } });
    discovery.api.put_in(POOLS, pool(json!({ "selector": selector, "targetPorts": [{ "number": 8000 }] })));
    discovery.expect_found(Ok("10.0.0.1:8000!")).await;
    discovery.api.put_in(PODS_PATH, pod_at("one", "10.0.0.1", true));
    discovery.expect_found(Ok("10.0.0.1:8000")).await;
}

#[tokio::test]
async fn inactive_ports_are_no_endpoints() {
    let mut discovery = DiscoveryTest::new(target(EndpointSource::InferencePool { name: "tiny".into() }));
    let ports: Vec<_> = (8000..8004).map(|port| json!({ "number": port })).collect();
    let spec = json!({ "selector": { "matchLabels": { "app": "tiny" } }, "targetPorts": ports });
    discovery.api.put_in(
        POOLS,
        json!({ "apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool",
        "metadata": { "name": "tiny", "namespace": "ml" }, "spec": spec }),
    );
    let of = |annotations: Value| {
        let mut pod = pod_at("one", "10.0.0.1", true);
        pod["metadata"]["annotations"] = annotations;
        pod
    };
    let all = "10.0.0.1:8000 10.0.0.1:8001 10.0.0.1:8002 10.0.0.1:8003";
    let (new, old) = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports");
    for (annotations, expected) in [
        (json!({}), all),
        (json!({ new: "8000,8002" }), "10.0.0.1:8000 10.0.0.1:8002"),
        (json!({ new: "8000, 8001 ,8002" }), "10.0.0.1:8000 10.0.0.1:8001 10.0.0.1:8002"),
        (json!({ old: "8003" }), "10.0.0.1:8003"),
        (json!({ old: "8003", new: "8001" }), "10.0.0.1:8001"),
        // Entries that are no port of the pool are ignored.
        (json!({ new: "8002,9000,x,-1" }), "10.0.0.1:8002"),
        (json!({ new: "" }), ""),
        (json!({ "other": "8000" }), all),
    ] {
        discovery.api.put_in(PODS_PATH, of(annotations));
        discovery.expect_found(Ok(expected)).await;
    }
}

// === pods that have ended ===

#[test]
fn pod_ended_or_deleted_terminating_is_dead() {
    let mut dead = DeadAddresses::default();
    let mut now = |pods: &[Value], is_synced: bool, endpoints: &[&str]| {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|address| DiscoveredEndpoint {
                address: (*address).into(),
                protocol: Protocol::Http1,
                ready: true,
                ..DiscoveredEndpoint::default()
            })
            .collect();
        let dead = dead.update(&parsed(pods), is_synced, &endpoints, |_| vec![8000]);
        dead.iter().map(|address| address.to_string()).collect::<Vec<_>>().join(" ")
    };
    let (one, two, three) =
        (pod_at("one", "10.0.0.1", true), pod_at("two", "10.0.0.2", true), pod_at("three", "10.0.0.3", true));
    assert_eq!(now(&[one.clone(), two.clone(), three.clone()], true, &[]), "");
    // Pod "one" terminates, which only drains its address; pod "two" has left the selector and may still run.
    assert_eq!(now(&[terminating(one.clone()), three.clone()], true, &[]), "");
    assert_eq!(now(&[], false, &[]), "", "the list is not whole");
    let mut failed = three.clone();
    failed["status"]["phase"] = "Failed".into();
    assert_eq!(now(&[failed.clone()], true, &[]), "10.0.0.1:8000 10.0.0.3:8000");
    assert_eq!(now(&[failed], true, &["10.0.0.1:8000"]), "10.0.0.3:8000", "another pod has its address");
}
