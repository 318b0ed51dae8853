//! The ModelRoute resource in the cluster: validation by the apiserver, and output for users.

use std::path::Path;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::json;

use crate::{
    api,
    chart::CHART,
    model::ModelDeployment,
    routes::{interceptor_route, model_route},
    scenario::Scenario,
};

/// Specs that violate rules beyond the types, and the error messages.
const INVALID_SPECS: &[(&str, &str)] = &[
    (r#"{"target": {"service": null}}"#, "give exactly one of service, inferencePool and url"),
    (r#"{"target": {"url": "http://a:1"}}"#, "give exactly one of service, inferencePool and url"),
    (r#"{"target": {"service": {"portName": "http"}}}"#, "give exactly one of port, a number, and portName"),
    (r#"{"target": {"service": {"port": null}}}"#, "give exactly one of port, a number, and portName"),
    (r#"{"target": {"service": {"port": 70000}}}"#, "should be less than or equal to 65535"),
    (
        r#"{"target": {"service": null, "url": "http://a:1", "gateway": "http://b:1"}}"#,
        "leave one of the two out",
    ),
    (r#"{"target": {"gateway": "https://b:1"}}"#, "https is not supported yet"),
    (r#"{"target": {"gateway": "http://b:1/path"}}"#, "requests keep their own path"),
    (
        r#"{"target": {"service": null, "url": "http://a:1", "serve": {"role": "decode"}}}"#,
        "serve and ready go with service or inferencePool",
    ),
    (r#"{"target": {"ready": {"all": {"prefill": {}}}}}"#, "name at least one label"),
    (r#"{"gateway": {"notYet": {"status": [200]}}}"#, "should be greater than or equal to 400"),
    (r#"{"scaleBy": "kubernetes"}"#, "add it with its kind and name"),
    (r#"{"scaleBy": "me"}"#, "supported values: \"keda\", \"kubernetes\""),
    (r#"{"whenPaused": "later"}"#, "supported values: \"reject\", \"hold\""),
    (r#"{"concurrency": {"max": 2, "rampStart": 3}}"#, "the ramp starts below it, or at it"),
    (r#"{"match": {"hosts": ["http://a"]}}"#, "without scheme and path"),
    (r#"{"match": {"paths": ["v1"]}}"#, "a path prefix that starts with a slash"),
    (r#"{"match": {"headers": {"Host": "a"}}}"#, "match the host with hosts"),
    (r#"{"match": {"models": [""]}}"#, "at least 1 chars long"),
    (r#"{"readiness": {"path": "health"}}"#, "such as /health"),
    (r#"{"hold": {"timeout": "soon"}}"#, "such as 100ms, 20s or 15m"),
    (r#"{"hold": {"maxBytes": "much"}}"#, "such as 512KiB, 64MiB or 1GiB"),
    (r#"{"failureGrace": {"quota": 5}}"#, "expected string"),
    // Not available in the cluster: authors of objects could run commands.
    (r#"{"target": {"process": {"command": ["sh"]}}}"#, "field not declared in schema"),
    (r#"{"target": {"namespace": "other"}}"#, "field not declared in schema"),
];

pub(super) async fn printed_crd_is_stored_unchanged(it: Scenario) {
    let printed = it.shell().anteroom("crds").await.stdout_of_success();
    let file = Path::new(CHART).join("crds/modelroutes.yaml");
    assert_eq!(printed, std::fs::read_to_string(file).unwrap());

    // Applied when the cluster was started. The apiserver drops unknown fields and reports non-structural schemas.
    let [ours] = api::objects(&printed).try_into().unwrap();
    let name = ours["metadata"]["name"].as_str().unwrap();
    let kept = it.kube.all::<CustomResourceDefinition>().get(name).await.unwrap();
    let conditions = kept.status.clone().unwrap().conditions.unwrap();
    assert!(conditions.iter().any(|condition| condition.type_ == "Established"), "{conditions:?}");
    for condition in &conditions {
        assert_eq!(condition.status, if condition.type_ == "NonStructuralSchema" { "False" } else { "True" });
    }
    let kept = serde_json::to_value(kept).unwrap();
    assert_eq!(kept["spec"]["versions"], ours["spec"]["versions"]);

    let said = it.shell().kubectl_with("apply --dry-run=server -f -", &printed).await.stdout_of_success();
    assert!(said.contains("modelroutes.anteroom.dev"), "{said}");
    let explained = it.shell().kubectl("explain modelroute.spec.hold.timeout").await.stdout_of_success();
    assert!(explained.contains("Default: 15m"), "{explained}");
}

pub(super) async fn invalid_routes_are_rejected_with_remedy(it: Scenario) {
    for (spec, why) in INVALID_SPECS {
        let route = model_route("refused", serde_json::from_str(spec).unwrap());
        let error = it.kube.try_apply(&route, &it.namespace).await.expect_err(spec).to_string();
        assert!(error.contains(why), "{spec}: {error}");
    }
    // Written by hand, as users do; a typo is reported rather than dropped.
    let typo = model_route("typo", json!({ "readiness": { "intervall": "1s" } })).to_string();
    let said = it.shell().kubectl_with("create -f -", &typo).await.stderr_of_failure();
    assert!(said.contains("unknown field \"spec.readiness.intervall\""), "{said}");

    // Every example is accepted.
    let examples = Path::new(CHART).join("../../examples");
    for file in ["modelroute.yaml", "without-keda.yaml", "interceptorroute.yaml"] {
        for mut object in api::objects_in(&examples.join(file)) {
            object["metadata"]["namespace"] = it.namespace.clone().into();
            it.apply(&object).await;
        }
    }
}

pub(super) async fn kubectl_shows_route_state(it: Scenario) {
    let mut model = ModelDeployment::new("tiny");
    (model.replicas, model.probe_period) = (1, 1);
    it.deploy(&model).await;
    it.apply(&model_route("tiny", json!({ "match": { "models": ["tiny", "tiny-sql"] } }))).await;
    it.apply(&model_route(
        "astray",
        json!({ "target": { "service": null, "url": "http://10.77.0.1:6443" } }),
    ))
    .await;
    let their = json!({
        "target": { "service": "tiny", "portName": "http" },
        "rules": [{ "hosts": ["app.example.com"] }],
        "scalingMetric": { "concurrency": {} },
    });
    it.apply(&interceptor_route("app", their)).await;

    let shell = it.shell();
    let before = shell.anteroom("status").await.stdout_of_success();
    assert!(before.contains("not reported by a proxy yet"), "{before}");
    let _anteroom = it.anteroom(1, json!({})).await;

    it.await_route_condition("tiny", "Ready", "EndpointsReady").await;
    it.await_route_condition("tiny", "Accepted", "Accepted").await;
    let refused = it.await_route_condition("astray", "Accepted", "Invalid").await;
    assert_eq!(refused["status"], "False");
    let why = refused["message"].as_str().unwrap();
    assert!(why.contains("kubernetes.allowedHosts"), "{why}");
    it.await_interceptor_route_ready("app", "Accepted").await;

    let table = shell.kubectl("get mr").await;
    let table = table.table();
    assert_eq!(table[0], ["NAME", "MODELS", "TARGET", "STATE", "ENDPOINTS", "HELD", "AGE"]);
    assert_eq!(table[1][..3], ["astray", "[\"astray\"]", "refused"]);
    assert_eq!(table[2][..7], ["tiny", "[\"tiny\",\"tiny-sql\"]", "service", "tiny:80", "ready", "1", "0"]);
    let wide = shell.kubectl("get mr tiny -o wide").await;
    assert_eq!(wide.table()[0][6..], ["ACCEPTED", "SCALED-BY", "COLD-START", "AGE"]);
    let by_category = shell.kubectl("get anteroom -o name").await.stdout_of_success();
    assert_eq!(by_category.lines().count(), 2, "{by_category}");

    let status = shell.anteroom("status").await;
    let lines = status.table();
    assert_eq!(lines[1][..3], ["app", "app.example.com", "service"]);
    assert!(lines[1].contains(&"served"), "{}", status.out);
    assert_eq!(lines[2][..4], ["astray", "astray", "-", "refused"]);
    assert_eq!(lines[3][..6], ["tiny", "tiny,tiny-sql", "service", "tiny:80", "ready", "1/1"]);
    assert!(status.out.contains(why), "{}", status.out);
    let everywhere = shell.anteroom("status -A").await.stdout_of_success();
    assert!(everywhere.lines().any(|line| line.starts_with(&it.namespace)), "{everywhere}");

    // The error for a user without rights names the missing ones.
    let said = it.shell_of("default").await.anteroom("status").await.stderr_of_failure();
    assert!(said.contains("request the permission to `list` modelroutes.anteroom.dev"), "{said}");
}
