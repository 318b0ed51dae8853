use serde_json::json;

use super::*;

fn object(value: Value) -> ScaledObject {
    serde_json::from_value(value).unwrap()
}

fn annotated(annotations: Value) -> ScaledObject {
    object(json!({ "metadata": { "name": "chat", "namespace": "team-a", "annotations": annotations } }))
}

#[test]
fn pause_follows_keda_semantics() {
    for (annotations, expected) in [
        (json!({}), None),
        (json!({ PAUSED_ANNOTATION: "true" }), Some(Pause::Frozen)),
        (json!({ PAUSED_ANNOTATION: "" }), Some(Pause::Frozen)),
        (json!({ PAUSED_ANNOTATION: "yes" }), Some(Pause::Frozen)),
        (json!({ PAUSED_ANNOTATION: "false" }), None),
        (json!({ PAUSED_ANNOTATION: "0" }), None),
        (json!({ PAUSED_ANNOTATION: "false", PAUSED_REPLICAS_ANNOTATION: "0" }), Some(Pause::At(0))),
        (json!({ PAUSED_ANNOTATION: "true", PAUSED_REPLICAS_ANNOTATION: "2" }), Some(Pause::At(2))),
        (json!({ PAUSED_REPLICAS_ANNOTATION: "many" }), Some(Pause::Frozen)),
        (json!({ PAUSED_SCALE_OUT_ANNOTATION: "true" }), Some(Pause::ScaleOut)),
        (json!({ PAUSED_SCALE_OUT_ANNOTATION: "f" }), None),
        (json!({ "autoscaling.keda.sh/paused-scale-in": "true" }), None),
    ] {
        assert_eq!(annotated(annotations.clone()).pause(), expected, "{annotations}");
    }
}

#[test]
fn triggers_name_routes_by_either_key() {
    let scaled = object(json!({
        "metadata": { "name": "chat", "namespace": "team-a" },
        "spec": {
            "scaleTargetRef": { "name": "vllm" },
            "triggers": [
                { "type": "external-push", "metadata": { "scalerAddress": "anteroom.anteroom:9090", "route": "chat" } },
                { "type": "external", "metadata": { "interceptorRoute": "old" } },
                { "type": "prometheus", "metadata": { "route": "no", "query": "sum(x)" } },
                { "type": "external-push", "metadata": { "scalerAddress": "other:1" } },
                { "type": "external-push" },
                { "metadata": { "route": "typeless" } },
                7,
            ],
        },
    }));
    let triggers: Vec<_> = scaled.triggers().collect();
    assert_eq!(
        triggers,
        [
            ExternalTrigger {
                index: 0,
                route: "chat".into(),
                address: "anteroom.anteroom:9090".into(),
                pushes: true
            },
            ExternalTrigger { index: 1, route: "old".into(), address: String::new(), pushes: false },
        ]
    );
    let workload = scaled.workload().unwrap();
    assert_eq!(
        (&*workload.api_version, &*workload.kind, &*workload.name),
        ("apps/v1", "Deployment", "vllm"),
        "KEDA's defaults"
    );
}

#[test]
fn listed_metrics_match_by_trigger_index() {
    let scaled = |listed: Value| {
        object(json!({
            "spec": { "triggers": [
                { "type": "prometheus", "metadata": {} },
                { "type": "external-push", "metadata": { "route": "chat" } },
            ] },
            "status": { "externalMetricNames": listed },
        }))
    };
    for (listed, expected) in [
        (json!(["s0-prometheus", "s1-chat-queue-depth"]), true),
        (json!(["s0-prometheus"]), false),
        (json!(["s10-chat-queue-depth", "chat-queue-depth"]), false),
        (Value::Null, false),
        (json!("s1-chat-queue-depth"), false),
    ] {
        let scaled = scaled(listed.clone());
        let trigger = scaled.triggers().next().unwrap();
        assert_eq!((trigger.index, scaled.lists_metric_of(&trigger)), (1, expected), "{listed}");
    }
}

#[test]
fn push_requests_minimum_with_idle_count() {
    for (spec, floor) in [
        (json!({}), 1),
        (json!({ "minReplicaCount": 3 }), 1),
        (json!({ "minReplicaCount": 3, "idleReplicaCount": 0 }), 3),
        (json!({ "idleReplicaCount": 0 }), 1),
        (json!({ "minReplicaCount": -3, "idleReplicaCount": 0 }), 1),
    ] {
        assert_eq!(object(json!({ "spec": spec })).push_replicas(), floor, "{spec}");
    }
}

#[test]
fn malformed_fields_count_as_absent() {
    let scaled = object(json!({
        "metadata": { "name": "odd" },
        "spec": { "triggers": "none", "scaleTargetRef": 1 },
        "status": [],
    }));
    assert_eq!((scaled.triggers().count(), scaled.workload(), scaled.not_ready()), (0, None, None));
    assert_eq!((scaled.pause(), scaled.last_active()), (None, None));
}

#[test]
fn not_ready_returns_reason_and_message() {
    let scaled = object(json!({
        "status": {
            "lastActiveTime": "2026-11-24T20:00:00Z",
            "conditions": [
                { "type": "Active", "status": "False", "reason": "x" },
                { "type": "Ready", "status": "False", "reason": "ScaledObjectCheckFailed", "message": "no Deployment" },
            ],
        },
    }));
    assert_eq!(scaled.not_ready(), Some(("ScaledObjectCheckFailed", "no Deployment")));
    assert_eq!(scaled.last_active().unwrap().to_string(), "2026-11-24T20:00:00Z");
}

#[test]
fn name_resolves_to_own_namespace_then_file() {
    let known = ["team-a/chat", "chat", "other"].map(RouteKey::from);
    let named = |namespace, name| resolve_route_name(namespace, name, |key| known.contains(key));
    assert_eq!(named("team-a", "chat"), Some("team-a/chat".into()));
    assert_eq!(named("team-b", "chat"), Some("chat".into()));
    assert_eq!(named("team-b", "none"), None);
    assert_eq!(named("team-b", "team-a/chat"), None, "another namespace's");
}
