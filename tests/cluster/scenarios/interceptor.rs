//! Routes of the HTTP Add-on, from the examples in its documentation and with the behaviour described there.

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    anteroom::AnteroomReplica,
    client::{self, StreamingResponse},
    model::{self, ModelDeployment, ScaledObjectManifest},
    routes::interceptor_route,
    scenario::Scenario,
    wait,
};

const ADD_ON_COLD_START_HEADER: &str = "x-keda-http-cold-start";

/// Routes that respond with their own names: host, path prefix, headers.
const RULES: &[(&str, &str)] = &[
    ("single", r#"{"hosts": ["api.example.com"]}"#),
    ("wildcard", r#"{"hosts": ["*.example.com"]}"#),
    ("deeper", r#"{"hosts": ["*.staging.example.com"]}"#),
    ("paths", r#"{"hosts": ["api.example.com"], "paths": [{"value": "/api/v1"}, {"value": "/api/v2"}]}"#),
    ("path", r#"{"hosts": ["api.example.com"], "paths": [{"value": "/api"}]}"#),
    ("header", r#"{"hosts": ["api.example.com"], "headers": [{"name": "X-Route", "value": "canary"}]}"#),
    ("presence", r#"{"hosts": ["*.example.com"], "headers": [{"name": "X-Preview"}]}"#),
    ("any", r#"{"hosts": ["*"], "paths": [{"value": "/everywhere"}]}"#),
];

/// Requests and their routes: host, path, header, route.
const REQUEST_CASES: &[(&str, &str, &str, Option<&str>)] = &[
    ("api.example.com", "/", "", Some("single")),
    ("api.example.com:8080", "/", "", Some("single")),
    ("API.example.com", "/", "", Some("single")),
    ("www.example.com", "/", "", Some("wildcard")),
    ("a.b.example.com", "/", "", Some("wildcard")),
    ("www.staging.example.com", "/", "", Some("deeper")),
    ("api.example.com", "/api/v2/users", "", Some("paths")),
    ("api.example.com", "/api/v3", "", Some("path")),
    ("api.example.com", "/apiary", "", Some("single")),
    ("api.example.com", "/", "x-route: canary", Some("header")),
    ("api.example.com", "/", "x-route: other", Some("single")),
    ("api.example.com", "/api", "x-route: canary", Some("path")),
    ("www.example.com", "/", "x-preview: 1", Some("presence")),
    ("elsewhere.test", "/everywhere/and/below", "", Some("any")),
    ("www.example.com", "/everywhere", "", Some("wildcard")),
    ("elsewhere.test", "/carts", "", None),
];

pub(super) async fn first_request_starts_the_app_through_keda(it: Scenario) {
    it.deploy(&ModelDeployment::new("my-app").sim("--load-time 300ms")).await;
    it.apply(&service("my-app-svc", "my-app", 8080)).await;
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let route = json!({
        "target": { "service": "my-app-svc", "port": 8080 },
        "rules": [{ "hosts": ["app.example.com"], "paths": [{ "value": "/v1" }, { "value": "/healthz" }] }],
        "scalingMetric": {
            "concurrency": { "targetValue": 50 },
            "requestRate": { "targetValue": 200, "window": "1m", "granularity": "1s" },
        },
        "timeouts": { "request": "60s", "responseHeader": "30s", "readiness": "30s" },
        "staticRoutes": [{
            "rules": [{ "paths": [{ "value": "/healthz" }] }],
            "response": { "statusCode": 200, "body": "OK" },
        }],
    });
    it.apply(&interceptor_route("my-app", route)).await;
    it.await_interceptor_route_ready("my-app", "Accepted").await;
    it.scale(&ScaledObjectManifest::new(
        "my-app",
        &anteroom.scaler(),
        json!({ "interceptorRoute": "my-app" }),
    ))
    .await;
    let names = it.metrics_of("my-app").await;
    assert!(names.len() == 2 && names[0] != names[1], "{names:?}");

    // Health checks of a load balancer are not demand.
    let answer = ask(replica, "app.example.com", "/healthz", "").await;
    assert_eq!((answer.status.as_u16(), answer.headers.get(ADD_ON_COLD_START_HEADER)), (200, None));
    assert_eq!(answer.text().await.unwrap(), "OK");
    assert_eq!(ask(replica, "other.example.com", "/carts", "").await.status, 404);
    let demand = format!("anteroom_scaler_active{{route=\"{}/my-app\"", it.namespace);
    assert_eq!(replica.metric(&demand).await.unwrap_or(0.0), 0.0);

    // Requests with any path and method are demand.
    let answer = ask(replica, "app.example.com", "/v1/models", "").await;
    assert_eq!(
        (answer.status.as_u16(), &answer.headers[ADD_ON_COLD_START_HEADER]),
        (200, &"true".parse().unwrap())
    );
    assert_eq!(answer.json().await["object"], "list");
    it.endpoints("my-app", 1).await;
    let answer = ask(replica, "app.example.com", "/v1/models", "").await;
    assert_eq!(
        (answer.status.as_u16(), &answer.headers[ADD_ON_COLD_START_HEADER]),
        (200, &"false".parse().unwrap())
    );
    // The simulator has no such path, so the 404 is its response.
    assert_eq!(ask(replica, "app.example.com", "/healthz", "").await.status, 404);
    let answer = client::send(replica.proxy(), client::completion("app.example.com", "any", true)).await;
    assert!(answer.unwrap().text().await.unwrap().ends_with("data: [DONE]\n\n"));
}

pub(super) async fn most_specific_rule_gets_the_request(it: Scenario) {
    for (name, rule) in RULES {
        let rule: Value = serde_json::from_str(rule).unwrap();
        it.apply(&interceptor_route(name, json!({
            "target": { "service": "nowhere", "port": 80 },
            "scalingMetric": { "concurrency": { "targetValue": 100 } },
            "rules": [{ "hosts": ["only.test"], "paths": [{ "value": format!("/{name}") }] }, rule],
            "staticRoutes": [{
                "rules": [{ "paths": [{ "value": "/" }] }],
                "responseMode": "Always",
                "response": { "statusCode": 200, "headers": { "X-Name": name }, "body": format!("{name}\n") },
            }],
        })))
        .await;
    }
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    for &(host, path, header, name) in REQUEST_CASES {
        let answer = ask(replica, host, path, header).await;
        let seen = answer.headers.get("x-name").map(|name| name.to_str().unwrap());
        assert_eq!(seen, name, "{host}{path} {header}");
        assert_eq!(answer.status, if name.is_some() { 200 } else { 404 });
    }
    for (name, _) in RULES {
        let answer = ask(replica, "only.test", &format!("/{name}"), "").await;
        assert_eq!(answer.text().await.unwrap(), format!("{name}\n"));
    }
}

pub(super) async fn placeholder_is_served_while_app_is_down(it: Scenario) {
    // This app never starts; the other one is running.
    it.deploy(&ModelDeployment::new("my-app")).await;
    let mut fallback = ModelDeployment::new("other");
    (fallback.replicas, fallback.probe_period) = (1, 1);
    it.deploy(&fallback).await;
    it.apply(&service("fallback-svc", "other", 8000)).await;
    it.endpoints("fallback-svc", 1).await;
    let page = "<!DOCTYPE html>\n<h1>Loading, please wait...</h1>\n";
    it.apply(&json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": "placeholder-page", "labels": { "http.keda.sh/response-body": "true" } },
        "data": { "index.html": page },
    }))
    .await;
    let loading = json!({ "response": {
        "body": "<h1>Loading...</h1>", "headers": { "Content-Type": "text/html", "Refresh": "5" }, "statusCode": 503,
    } });
    let from_map = json!({ "response": {
        "bodyFromConfigMap": { "name": "placeholder-page", "key": "index.html" }, "headers": { "Refresh": "5" },
    } });
    let to_other = json!({ "service": { "name": "fallback-svc", "port": 8000 } });
    let readiness = json!({ "readiness": "1s" });
    let routes = [
        ("placeholder", json!({ "coldStart": { "placeholder": loading } })),
        ("map", json!({ "coldStart": { "placeholder": from_map } })),
        ("fallback", json!({ "coldStart": { "fallback": to_other }, "timeouts": readiness })),
        ("deadline", json!({ "timeouts": readiness })),
        ("reject", json!({ "coldStart": { "maxPendingRequests": 1, "overflow": "Reject" } })),
        (
            "overflow",
            json!({ "coldStart": {
            "maxPendingRequests": 1, "overflow": "Placeholder", "placeholder": loading,
        } }),
        ),
    ];
    for (name, more) in routes {
        let mut spec = json!({
            "target": { "service": "my-app", "port": 80 },
            "scalingMetric": { "concurrency": { "targetValue": 100 } },
            "rules": [{ "hosts": [format!("{name}.test")] }],
        });
        model::merge(&mut spec, &more);
        it.apply(&interceptor_route(name, spec)).await;
    }
    let anteroom = it.anteroom_with(1, json!({}), &["kubernetes.responseBodies=true"]).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };

    for (host, body) in [("placeholder.test", "<h1>Loading...</h1>"), ("map.test", page)] {
        let answer = ask(replica, host, "/", "").await;
        assert_eq!((answer.status.as_u16(), &answer.headers["refresh"]), (503, &"5".parse().unwrap()));
        let kind = answer.headers["content-type"].to_str().unwrap();
        assert!(kind.starts_with("text/html"), "{host}: {kind}");
        assert_eq!(answer.text().await.unwrap(), body);
    }
    // Requests answered with the placeholder wake the app.
    let demand = format!("anteroom_scaler_active{{route=\"{}/placeholder\"", it.namespace);
    assert!(replica.metric(&demand).await.unwrap() >= 1.0);

    let began = Instant::now();
    let answer = ask(replica, "fallback.test", "/v1/models", "").await;
    assert_eq!((answer.status.as_u16(), answer.headers.get(ADD_ON_COLD_START_HEADER)), (200, None));
    assert!(began.elapsed().as_secs() >= 1, "it waits for the app first");
    assert_eq!(ask(replica, "deadline.test", "/", "").await.status, 504);

    for (host, name, body) in [("reject.test", "reject", None), ("overflow.test", "overflow", Some("<h1>"))] {
        let held = Box::pin(ask(replica, host, "/", ""));
        let more = async {
            let held = format!("anteroom_held_requests{{route=\"{}/{name}\"", it.namespace);
            wait::until("one to be held", wait::WAIT_LIMIT, async || match replica.metric(&held).await {
                Some(1.0) => Ok(()),
                other => Err(format!("{other:?}")),
            })
            .await;
            let answer = ask(replica, host, "/", "").await;
            assert_eq!(answer.status, 503);
            let text = answer.text().await.unwrap();
            assert_eq!(text.starts_with("<h1>Loading"), body.is_some(), "{text}");
        };
        tokio::select! {
            biased; // Polls the first request first, so that it is held.
            answer = held => panic!("{host}: it was answered: {}", answer.status),
            () = more => {}
        }
    }
}

/// Builds a Service with this name and port, for the pods of a model.
fn service(name: &str, model: &str, port: u16) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name },
        "spec": { "selector": { "app": model }, "ports": [{ "name": "web", "port": port, "targetPort": "http" }] },
    })
}

/// Sends a GET; `header` is `name: value` or empty.
async fn ask(replica: &AnteroomReplica, host: &str, path: &str, header: &str) -> StreamingResponse {
    let mut request = Request::get(path).header("host", host);
    if let Some((name, value)) = header.split_once(": ") {
        request = request.header(name, value);
    }
    let request = request.body(Full::<Bytes>::default()).unwrap();
    let answer = client::send(replica.proxy(), request);
    wait::within(&format!("{host}{path}"), wait::WAIT_LIMIT, answer).await.unwrap()
}

// === impl Scenario ===

impl Scenario {
    /// Returns the names of KEDA's metrics for a ScaledObject.
    async fn metrics_of(&self, scaled: &str) -> Vec<String> {
        let api = self.dynamic("keda.sh/v1alpha1", "ScaledObject");
        wait::object(&api, scaled, "its metrics", wait::WAIT_LIMIT, |object| {
            let names = object?.data.pointer("/status/externalMetricNames")?;
            serde_json::from_value(names.clone()).ok()
        })
        .await
    }
}
