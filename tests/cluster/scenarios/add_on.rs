//! Requirements of the HTTP Add-on's own end-to-end tests; docs/http-add-on.md maps each of them to a test.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    anteroom::{Anteroom, AnteroomReplica},
    client,
    model::{ModelDeployment, ScaledObjectManifest},
    routes::interceptor_route,
    scenario::Scenario,
    wait,
};

/// Paths to which the simulator responds with the app's name. Without a route, Anteroom itself lists models, but does
/// not serve such metrics.
const MODELS_PATH: &str = "/v1/models";
const METRICS: &str = "/metrics";

/// Time from the last request to zero replicas: an InterceptorRoute's linger is a minute.
const TO_ZERO: Duration = Duration::from_secs(180);

/// Host, path, header, and the app that serves such a request; `None`: 404, from no app.
const REQUEST_CASES: &[(&str, &str, &str, Option<&str>)] = &[
    // One host, several hosts, and unknown hosts.
    ("one.test", MODELS_PATH, "", Some("app-a")),
    ("both-1.test", MODELS_PATH, "", Some("app-a")),
    ("both-2.test", MODELS_PATH, "", Some("app-a")),
    ("both-3.test", METRICS, "", None),
    ("unknown.test", METRICS, "", None),
    ("unknown.test", "/", "", None),
    // A wildcard, and a more specific rule.
    ("exact.wild.test", MODELS_PATH, "", Some("app-a")),
    ("any.wild.test", MODELS_PATH, "", Some("app-b")),
    ("wild.other.test", "/", "", None),
    // Paths of one host.
    ("paths.test", MODELS_PATH, "", Some("app-a")),
    ("paths.test", METRICS, "", Some("app-b")),
    ("paths.test", "/unknown", "", None),
    ("paths.test", "/", "", None),
    // The same path of two hosts.
    ("svc-a.test", MODELS_PATH, "", Some("app-a")),
    ("svc-b.test", MODELS_PATH, "", Some("app-b")),
    ("svc-c.test", METRICS, "", None),
    // Headers, by value and by presence.
    ("headers.test", MODELS_PATH, "x-route: foo", Some("app-a")),
    ("headers.test", MODELS_PATH, "x-route: bar", Some("app-b")),
    ("headers.test", METRICS, "", None),
    ("headers.test", "/", "", None),
    ("debug.test", MODELS_PATH, "x-debug: verbose", Some("app-a")),
    ("debug.test", MODELS_PATH, "x-debug: minimal", Some("app-b")),
    // Two rules of one route.
    ("host-only.test", "/v1/models?x=1", "", Some("app-a")),
    ("with-path.test", MODELS_PATH, "", Some("app-a")),
    ("with-path.test", "/other", "", None),
    // A named port.
    ("named.test", MODELS_PATH, "", Some("app-b")),
];

pub(super) async fn rules_lead_to_their_apps_and_nowhere_else(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    for name in ["app-a", "app-b"] {
        it.deploy_app(name).await;
    }
    let path = |value: &str| json!([{ "value": value }]);
    let header = |value: Value| json!([{ "name": "X-Route", "value": value }]);
    for (name, app, rules) in [
        ("one", "app-a", json!([{ "hosts": ["one.test"] }])),
        ("both", "app-a", json!([{ "hosts": ["both-1.test", "both-2.test"] }])),
        ("exact", "app-a", json!([{ "hosts": ["exact.wild.test"] }])),
        ("wild", "app-b", json!([{ "hosts": ["*.wild.test"] }])),
        ("path-a", "app-a", json!([{ "hosts": ["paths.test"], "paths": path("/v1") }])),
        ("path-b", "app-b", json!([{ "hosts": ["paths.test"], "paths": path("/metrics") }])),
        ("svc-a", "app-a", json!([{ "hosts": ["svc-a.test"], "paths": path("/v1") }])),
        ("svc-b", "app-b", json!([{ "hosts": ["svc-b.test"], "paths": path("/v1") }])),
        ("foo", "app-a", json!([{ "hosts": ["headers.test"], "headers": header("foo".into()) }])),
        ("bar", "app-b", json!([{ "hosts": ["headers.test"], "headers": header("bar".into()) }])),
        (
            "verbose",
            "app-a",
            json!([{ "hosts": ["debug.test"], "headers": [{ "name": "X-Debug", "value": "verbose" }] }]),
        ),
        ("debug", "app-b", json!([{ "hosts": ["debug.test"], "headers": [{ "name": "X-Debug" }] }])),
        (
            "multi",
            "app-a",
            json!([{ "hosts": ["host-only.test"] }, { "hosts": ["with-path.test"], "paths": path("/v1") }]),
        ),
    ] {
        it.apply(&interceptor_route(name, to(app, rules))).await;
    }
    let mut named = to("app-b", json!([{ "hosts": ["named.test"] }]));
    named["target"] = json!({ "service": "app-b", "portName": "http" });
    it.apply(&interceptor_route("named", named)).await;
    it.await_interceptor_route_ready("named", "Accepted").await;
    for &(host, path, header, app) in REQUEST_CASES {
        assert_eq!(
            responding_app(replica, host, path, header).await.as_deref(),
            app,
            "{host}{path} {header}"
        );
    }
}

pub(super) async fn routes_that_change_or_go_are_followed(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    for name in ["app-a", "app-b"] {
        it.deploy_app(name).await;
        it.apply(&interceptor_route(name, to(name, json!([{ "hosts": [format!("{name}.test")] }])))).await;
        it.await_interceptor_route_ready(name, "Accepted").await;
        assert_eq!(
            responding_app(replica, &format!("{name}.test"), MODELS_PATH, "").await.as_deref(),
            Some(name)
        );
    }
    // The route gets another target for the same host.
    let patch = json!({ "spec": { "target": { "service": "app-b" } } });
    it.patch("http.keda.sh/v1beta1", "InterceptorRoute", "app-a", &patch).await;
    await_app(replica, "app-a.test", MODELS_PATH, Some("app-b")).await;
    // Requests for a deleted route are rejected; the other route stays.
    let routes = it.dynamic("http.keda.sh/v1beta1", "InterceptorRoute");
    routes.delete("app-a", &kube::api::DeleteParams::default()).await.unwrap();
    await_app(replica, "app-a.test", METRICS, None).await;
    assert_eq!(responding_app(replica, "app-a.test", "/", "").await, None);
    assert_eq!(responding_app(replica, "app-b.test", MODELS_PATH, "").await.as_deref(), Some("app-b"));
}

pub(super) async fn load_scales_only_its_app_and_back_to_zero(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let metrics = [
        ("rate", json!({ "requestRate": { "targetValue": 5, "window": "5s" } })),
        ("busy", json!({ "concurrency": { "targetValue": 5 } })),
        ("quiet", json!({ "requestRate": { "targetValue": 5 } })),
    ];
    for (name, metric) in metrics {
        it.deploy_scaled_app(&anteroom, name, metric).await;
    }
    let (rate, busy) = (it.replicas("rate").await, it.replicas("busy").await);
    let quiet = it.replicas("quiet").await;
    // 10 in flight at 5 for each replica: two replicas. The streams last as long as needed.
    let streams: Vec<_> = (0..10)
        .map(|_| {
            let address = replica.proxy();
            AbortOnDropHandle::new(tokio::spawn(async move {
                let answer =
                    client::send(address, client::completion("busy.test", "busy", true)).await.unwrap();
                answer.text().await
            }))
        })
        .collect();
    // 10 requests a second at 5 for each replica: two replicas.
    let address = replica.proxy();
    let load = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        loop {
            tick.tick().await;
            tokio::spawn(async move {
                let request =
                    Request::get(MODELS_PATH).header("host", "rate.test").body(Full::<Bytes>::default());
                let _ = client::send(address, request.unwrap()).await;
            });
        }
    }));
    for (name, replicas) in [("busy", &busy), ("rate", &rate)] {
        wait::until(&format!("two replicas of {name}"), wait::WAIT_LIMIT, async || {
            match replicas.value_history() {
                course if course.iter().any(|replicas| *replicas >= 2) => Ok(()),
                course => Err(format!("{course:?}")),
            }
        })
        .await;
    }
    assert_eq!(quiet.value_history(), [0], "nobody asked for it");
    drop((streams, load));
    for name in ["busy", "rate"] {
        it.await_spec_replicas(name, 0, TO_ZERO).await;
    }
}

pub(super) async fn another_target_value_reaches_the_hpa(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    it.deploy_scaled_app(&anteroom, "app", json!({ "concurrency": { "targetValue": 5 } })).await;
    it.await_hpa_target("app", "5").await;
    let patch = json!({ "spec": { "scalingMetric": { "concurrency": { "targetValue": 10 } } } });
    it.patch("http.keda.sh/v1beta1", "InterceptorRoute", "app", &patch).await;
    it.await_hpa_target("app", "10").await;
}

/// Objects may be created in any order: KEDA has its HPA and its stream before the route exists, and receives pushes
/// over that stream.
pub(super) async fn scaled_object_before_its_route_starts_it(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.deploy(&ModelDeployment::new("app").sim("--model app")).await;
    let mut scaled =
        ScaledObjectManifest::new("app", &anteroom.scaler(), json!({ "interceptorRoute": "app" }));
    // Polls are too infrequent to affect this test.
    scaled.polling = 300;
    it.scale(&scaled).await;
    it.await_hpa_target("app", "100").await;
    let metric = json!({ "concurrency": { "targetValue": 7 } });
    it.apply(&interceptor_route("app", scaled_by("app", metric))).await;
    it.await_interceptor_route_ready("app", "Accepted").await;
    it.await_hpa_target("app", "7").await;
    assert_eq!(responding_app(replica, "app.test", MODELS_PATH, "").await.as_deref(), Some("app"));
}

pub(super) async fn in_flight_requests_outlive_a_restart(it: Scenario) {
    let mut anteroom = it.anteroom(1, json!({})).await;
    let mut app = ModelDeployment::new("app").sim("--model app --tokens 1000 --inter-token-time 20ms");
    (app.replicas, app.probe_period) = (1, 1);
    it.deploy(&app).await;
    it.endpoints("app", 1).await;
    it.apply(&interceptor_route("app", to("app", json!([{ "hosts": ["app.test"] }])))).await;
    it.await_interceptor_route_ready("app", "Accepted").await;
    let replica = &mut anteroom.replicas[0];
    let mut answer = client::send(replica.proxy(), client::limited("app.test", "app", 200)).await.unwrap();
    assert!(answer.next().await.unwrap().is_some(), "it streams");
    let (text, ()) = tokio::join!(answer.text(), replica.stop());
    assert!(text.unwrap().ends_with("data: [DONE]\n\n"));
    replica.start().await;
    await_app(replica, "app.test", MODELS_PATH, Some("app")).await;
}

/// Builds a route to an app, without scaling it.
fn to(app: &str, rules: Value) -> Value {
    json!({
        "target": { "service": app, "port": 80 },
        "scalingMetric": { "concurrency": { "targetValue": 100 } },
        "rules": rules,
    })
}

/// Builds a route from the host to the app of the same name.
fn scaled_by(app: &str, metric: Value) -> Value {
    let mut route = to(app, json!([{ "hosts": [format!("{app}.test")] }]));
    route["scalingMetric"] = metric;
    route
}

/// Returns the app that responds; `None`: 404, from Anteroom.
async fn responding_app(replica: &AnteroomReplica, host: &str, path: &str, header: &str) -> Option<String> {
    let mut request = Request::get(path).header("host", host);
    if let Some((name, value)) = header.split_once(": ") {
        request = request.header(name, value);
    }
    let request = request.body(Full::<Bytes>::default()).unwrap();
    let answer = client::send(replica.proxy(), request);
    let answer = wait::within(&format!("{host}{path}"), wait::WAIT_LIMIT, answer).await.unwrap();
    let status = answer.status.as_u16();
    let text = answer.text().await.unwrap();
    if status == 404 {
        assert!(text.contains("\"error\""), "an error of ours: {text}");
        return None;
    }
    assert_eq!(status, 200, "{text}");
    let app = ["app-a", "app-b", "app"].into_iter().find(|app| text.contains(&format!("\"{app}\"")));
    Some(app.unwrap_or_else(|| panic!("of no app: {text}")).to_owned())
}

/// Waits until this app responds.
async fn await_app(replica: &AnteroomReplica, host: &str, path: &str, app: Option<&str>) {
    wait::until(&format!("{host} to be {app:?}'s"), wait::WAIT_LIMIT, async || {
        let found = responding_app(replica, host, path, "").await;
        if found.as_deref() == app { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
}

// === impl Scenario ===

impl Scenario {
    /// Starts an app that reports its own name.
    async fn deploy_app(&self, name: &str) {
        let mut app = ModelDeployment::new(name).sim(&format!("--model {name}"));
        (app.replicas, app.probe_period) = (1, 1);
        self.deploy(&app).await;
        self.endpoints(name, 1).await;
    }

    /// Deploys an app at zero, its route and its ScaledObject.
    async fn deploy_scaled_app(&self, anteroom: &Anteroom, name: &str, metric: Value) {
        let mut app = ModelDeployment::new(name)
            .sim(&format!("--model {name} --tokens 100000 --inter-token-time 50ms"));
        app.probe_period = 1;
        self.deploy(&app).await;
        self.apply(&interceptor_route(name, scaled_by(name, metric))).await;
        self.await_interceptor_route_ready(name, "Accepted").await;
        let scaled = ScaledObjectManifest::new(name, &anteroom.scaler(), json!({ "interceptorRoute": name }));
        self.scale(&ScaledObjectManifest { cooldown: 1, ..scaled }).await;
    }

    /// Waits until the first metric of a KEDA HPA has this target.
    async fn await_hpa_target(&self, scaled: &str, target: &str) {
        let api = self.dynamic("autoscaling/v2", "HorizontalPodAutoscaler");
        let what = format!("a target of {target}");
        wait::object(&api, &format!("keda-hpa-{scaled}"), &what, wait::WAIT_LIMIT, |hpa| {
            let found = hpa?.data.pointer("/spec/metrics/0/external/target/averageValue")?.as_str()?;
            (found == target).then_some(())
        })
        .await;
    }
}
