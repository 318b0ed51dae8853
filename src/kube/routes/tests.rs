//! Tests on a paused clock, which advances to the next timer whenever all tasks are idle.

use serde_json::{Value, json};
use tokio::time::timeout;

use super::*;
use crate::{config::Kubernetes, kube::stand_in::FakeApiServer};

const MODEL_ROUTES_PATH: &str = "/apis/anteroom.dev/v1alpha1/namespaces/models/modelroutes";
const INTERCEPTOR_ROUTES_PATH: &str = "/apis/http.keda.sh/v1beta1/namespaces/models/interceptorroutes";

struct RoutesTest {
    api: FakeApiServer,
    file: watch::Sender<Arc<Vec<Route>>>,
    objects: RouteObjects,
    routes: watch::Receiver<Arc<ClusterRoutes>>,
}

impl RoutesTest {
    fn new(api: &FakeApiServer, kubernetes: Kubernetes) -> Self {
        let (file, of_file) = watch::channel(Arc::default());
        let config = Config { kubernetes: Some(kubernetes.clone()), ..Config::default() };
        let (objects, routes) = api.cluster_with(&kubernetes).routes(config, of_file);
        Self { api: api.clone(), file, objects, routes }
    }

    /// Waits until `holds` is true of the published routes, and returns them.
    async fn until(&mut self, holds: impl FnMut(&Arc<ClusterRoutes>) -> bool) -> Arc<ClusterRoutes> {
        let waited = timeout(Duration::from_secs(600), self.routes.wait_for(holds)).await;
        waited.expect("it did not come").expect("the watcher ended").clone()
    }

    async fn until_named(&mut self, names: &[&str]) -> Arc<ClusterRoutes> {
        self.until(|now| now.is_settled && names_of(now) == names).await
    }
}

fn names_of(routes: &ClusterRoutes) -> Vec<&str> {
    routes.routes.iter().map(|route| route.name.as_str()).collect()
}

fn put(api: &FakeApiServer, collection: &str, name: &str, created: u32, spec: Value) {
    let object = json!({
        "metadata": {
            "name": name, "namespace": "models", "generation": 1,
            "creationTimestamp": format!("2026-01-01T00:00:{created:02}Z"),
        },
        "spec": spec,
    });
    api.put(&format!("{collection}/{name}"), object);
}

fn model(models: &[&str]) -> Value {
    json!({"match": {"models": models}, "target": {"service": {"name": "vllm", "port": 8000}}})
}

fn front(host: &str) -> Value {
    json!({
        "target": {"service": "front", "port": 80}, "rules": [{"hosts": [host]}],
        "scalingMetric": {"concurrency": {"targetValue": 100}},
    })
}

fn verdict(routes: &ClusterRoutes, kind: RouteKind, name: &str) -> (&'static str, String) {
    let object = RouteObject { kind, namespace: "models".into(), name: name.into() };
    let verdict = routes.verdicts.get(&object).unwrap_or_else(|| panic!("no verdict on {object}"));
    (verdict.reason(), verdict.message())
}

#[tokio::test(start_paused = true)]
async fn routes_of_both_kinds_appear_and_go() {
    let api = FakeApiServer::default();
    put(&api, MODEL_ROUTES_PATH, "tiny", 2, model(&["tiny"]));
    put(&api, INTERCEPTOR_ROUTES_PATH, "app", 1, front("app.example.com"));
    let mut watched = RoutesTest::new(&api, Kubernetes::default());
    let routes = watched.until_named(&["models/app", "models/tiny"]).await;
    assert!(routes.verdicts.values().all(Verdict::is_accepted));

    put(&api, MODEL_ROUTES_PATH, "big", 3, model(&["big"]));
    watched.until_named(&["models/app", "models/tiny", "models/big"]).await;
    put(&api, MODEL_ROUTES_PATH, "tiny", 2, model(&["tiny", "lora"]));
    watched.until(|now| now.routes.get(1).is_some_and(|route| route.matcher.models.len() == 2)).await;
    api.remove(&format!("{INTERCEPTOR_ROUTES_PATH}/app"));
    watched.until_named(&["models/tiny", "models/big"]).await;
}

#[tokio::test(start_paused = true)]
async fn malformed_object_is_reported_and_skipped() {
    let api = FakeApiServer::default();
    put(&api, MODEL_ROUTES_PATH, "odd", 1, json!({"target": 7}));
    put(
        &api,
        MODEL_ROUTES_PATH,
        "new",
        1,
        json!({"target": {"service": {"name": "a", "port": 1}}, "tomorrow": 1}),
    );
    put(
        &api,
        MODEL_ROUTES_PATH,
        "bad",
        1,
        json!({"match": {"hosts": ["http://a"]}, "target": {"url": "http://10.0.0.1"}}),
    );
    put(&api, INTERCEPTOR_ROUTES_PATH, "odd-too", 1, json!({"target": {"service": "a", "port": -1}}));
    put(&api, MODEL_ROUTES_PATH, "tiny", 2, model(&["tiny"]));
    let mut watched = RoutesTest::new(&api, Kubernetes::default());
    let routes = watched.until_named(&["models/tiny"]).await;
    let told = |name: &str| verdict(&routes, RouteKind::ModelRoute, name);
    assert_eq!(told("odd").0, "Invalid");
    assert!(told("odd").1.contains("it cannot be read: Invalid type integer `7`"), "{}", told("odd").1);
    assert!(told("new").1.contains("upgrade the proxy, or leave the field out"), "{}", told("new").1);
    let bad = told("bad").1;
    assert!(bad.contains("spec.match.hosts[0]: \"http://a\" has a scheme"), "{bad}");
    assert!(
        bad.contains("spec.target.url: \"10.0.0.1\" is not a host")
            && bad.contains("kubernetes.allowedHosts"),
        "{bad}"
    );
    assert_eq!(verdict(&routes, RouteKind::InterceptorRoute, "odd-too").0, "Invalid");
    assert_eq!(routes.counts()[&(RouteKind::ModelRoute, "Invalid")], 3);

    // The watch continues, and a corrected object is served.
    put(&api, MODEL_ROUTES_PATH, "odd", 1, model(&["odd"]));
    watched.until_named(&["models/odd", "models/tiny"]).await;
    put(&api, MODEL_ROUTES_PATH, "odd", 1, json!({"target": 7}));
    watched.until_named(&["models/tiny"]).await;
}

#[tokio::test(start_paused = true)]
async fn missing_kind_is_watched_for_installation() {
    let api = FakeApiServer::default();
    api.uninstall_group("http.keda.sh");
    put(&api, MODEL_ROUTES_PATH, "tiny", 1, model(&["tiny"]));
    put(&api, INTERCEPTOR_ROUTES_PATH, "app", 2, front("app.example.com"));
    let mut watched = RoutesTest::new(&api, Kubernetes::default());
    watched.until_named(&["models/tiny"]).await;
    api.install_all_groups();
    watched.until_named(&["models/tiny", "models/app"]).await;
}

#[tokio::test(start_paused = true)]
async fn routes_are_published_once_all_are_listed() {
    let api = FakeApiServer::default();
    api.forbid("GET", "interceptorroutes");
    put(&api, MODEL_ROUTES_PATH, "tiny", 1, model(&["tiny"]));
    put(&api, INTERCEPTOR_ROUTES_PATH, "app", 2, front("app.example.com"));
    let mut watched = RoutesTest::new(&api, Kubernetes::default());
    // 60 s are twice the longest pause between two retries.
    assert!(timeout(Duration::from_secs(60), watched.routes.wait_for(|now| now.is_settled)).await.is_err());
    assert!(watched.routes.borrow().routes.is_empty(), "an older one of the other kind might have the match");
    assert!(watched.objects.failure().unwrap().contains("InterceptorRoute"));
    watched.api.allow_all();
    watched.until_named(&["models/tiny", "models/app"]).await;
}

#[tokio::test(start_paused = true)]
async fn only_configured_kinds_and_namespaces_count() {
    let api = FakeApiServer::default();
    put(&api, MODEL_ROUTES_PATH, "tiny", 1, model(&["tiny"]));
    put(&api, &MODEL_ROUTES_PATH.replace("models/", "other/"), "tiny", 1, model(&["other"]));
    put(&api, INTERCEPTOR_ROUTES_PATH, "app", 2, front("app.example.com"));
    let kubernetes = Kubernetes {
        namespaces: vec!["models".into(), "empty".into()],
        interceptor_routes: false,
        ..Kubernetes::default()
    };
    let mut watched = RoutesTest::new(&api, kubernetes);
    let routes = watched.until_named(&["models/tiny"]).await;
    assert_eq!(routes.verdicts.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn file_route_takes_match_and_returns_it() {
    let api = FakeApiServer::default();
    put(&api, MODEL_ROUTES_PATH, "tiny", 1, model(&["tiny"]));
    let mut watched = RoutesTest::new(&api, Kubernetes::default());
    watched.until_named(&["models/tiny"]).await;
    let file =
        Config::parse("routes: [{name: a, match: {models: [tiny]}, target: {url: 'http://a:1'}}]", "a")
            .unwrap();
    watched.file.send_replace(Arc::new(file.routes));
    let routes = watched.until_named(&[]).await;
    assert_eq!(verdict(&routes, RouteKind::ModelRoute, "tiny").0, "Conflict");
    watched.file.send_replace(Arc::default());
    watched.until_named(&["models/tiny"]).await;
}

#[tokio::test(start_paused = true)]
async fn burst_of_changes_is_published_once() {
    let api = FakeApiServer::default();
    put(&api, MODEL_ROUTES_PATH, "tiny", 1, model(&["tiny"]));
    let mut watched = RoutesTest::new(&api, Kubernetes::default());
    watched.until_named(&["models/tiny"]).await;
    watched.routes.mark_unchanged();
    for number in 0..200_u32 {
        put(&api, MODEL_ROUTES_PATH, &format!("r{number}"), 2, model(&[&format!("m{number}")]));
    }
    // The clock does not advance between the changes, so all of them fall within the quiet period of 50 ms.
    let routes = watched.until(|now| now.routes.len() > 1).await;
    assert_eq!(routes.routes.len(), 201);
    watched.routes.mark_unchanged();

    // Only the status changes, which the proxy itself writes.
    let mut object = api.object(&format!("{MODEL_ROUTES_PATH}/tiny"));
    object["status"] = json!({"state": "idle"});
    api.put(&format!("{MODEL_ROUTES_PATH}/tiny"), object);
    sleep(Duration::from_secs(5)).await;
    assert!(!watched.routes.has_changed().unwrap());
    assert!(Arc::ptr_eq(&routes.routes, &watched.routes.borrow().routes));
}

#[tokio::test(start_paused = true)]
async fn config_map_bodies_apply_once_available() {
    let api = FakeApiServer::default();
    let mut spec = front("app.example.com");
    spec["coldStart"] =
        json!({"placeholder": {"response": {"bodyFromConfigMap": {"name": "pages", "key": "wait"}}}});
    put(&api, INTERCEPTOR_ROUTES_PATH, "app", 1, spec);
    let mut watched = RoutesTest::new(&api, Kubernetes::default());
    let body = |routes: &ClusterRoutes| {
        let intercept = routes.routes.first()?.intercept.as_ref()?.placeholder.as_ref()?.body("/")?;
        Some(String::from_utf8(intercept.0.to_vec()).unwrap())
    };
    let routes = watched.until_named(&["models/app"]).await;
    assert_eq!(body(&routes), None);
    assert!(verdict(&routes, RouteKind::InterceptorRoute, "app").1.contains("no ConfigMap pages"));
    let pages = |text: &str| {
        let labels = json!({"http.keda.sh/response-body": "true"});
        json!({"metadata": {"name": "pages", "namespace": "models", "labels": labels}, "data": {"wait": text}})
    };
    for text in ["soon", "sooner"] {
        api.put("/api/v1/namespaces/models/configmaps/pages", pages(text));
        let routes = watched.until(|now| body(now).as_deref() == Some(text)).await;
        assert_eq!(
            verdict(&routes, RouteKind::InterceptorRoute, "app"),
            ("Accepted", "The route is served.".into())
        );
    }
}

#[test]
fn unknown_field_hints_at_newer_definition() {
    let read = |spec: serde_json::Value| {
        let object = serde_json::json!({ "metadata": { "name": "a" }, "spec": spec });
        let object: DeserializeGuard<ModelRoute> = serde_json::from_value(object).unwrap();
        malformed(&object.0.unwrap_err().error)
    };
    let newer = read(serde_json::json!({ "target": { "url": "http://a:1" }, "novelty": 1 }));
    assert!(newer.contains("novelty") && newer.contains("upgrade the proxy"), "{newer}");
    let wrong = read(serde_json::json!({ "target": 7 }));
    assert!(wrong.contains("kubectl explain"), "{wrong}");
}

#[tokio::test(start_paused = true)]
async fn fallback_follows_its_service() {
    let api = FakeApiServer::default();
    let mut spec = front("app.example.com");
    spec["coldStart"] = json!({"fallback": {"service": {"name": "spare", "port": 80}}});
    put(&api, INTERCEPTOR_ROUTES_PATH, "app", 1, spec);
    let service = |kind: &str| {
        api.put(
            "/api/v1/namespaces/models/services/spare",
            json!({"metadata": {"name": "spare", "namespace": "models"}, "spec": {"type": kind}}),
        );
    };
    let fallback = |now: &Arc<ClusterRoutes>| {
        let intercept = now.routes.first().and_then(|route| route.intercept.clone());
        intercept.and_then(|intercept| intercept.fallback.clone())
    };
    let mut watched = RoutesTest::new(&api, Kubernetes::default());
    let routes = watched.until_named(&["models/app"]).await;
    assert_eq!(fallback(&routes), None);
    let told = verdict(&routes, RouteKind::InterceptorRoute, "app").1;
    assert!(told.contains("spec.coldStart.fallback.service: the Service spare does not exist"), "{told}");
    service("ClusterIP");
    watched.until(|now| fallback(now).as_deref() == Some("spare.models.svc:80")).await;
    service("ExternalName");
    let routes = watched.until(|now| fallback(now).is_none()).await;
    let told = verdict(&routes, RouteKind::InterceptorRoute, "app").1;
    assert!(told.contains("the Service spare is an ExternalName"), "{told}");
}

#[tokio::test(start_paused = true)]
async fn unchanged_routes_keep_their_allocation() {
    let api = FakeApiServer::default();
    for (name, created) in [("one", 1), ("two", 2)] {
        put(&api, MODEL_ROUTES_PATH, name, created, model(&[name]));
    }
    let mut watched = RoutesTest::new(&api, Kubernetes::default());
    let before = watched.until_named(&["models/one", "models/two"]).await;

    // A status update changes the object, but not the route.
    watched.routes.mark_unchanged();
    let path = format!("{MODEL_ROUTES_PATH}/one");
    let mut object = api.object(&path);
    object["status"] = json!({"held": 7});
    api.put(&path, object);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(!watched.routes.has_changed().unwrap());

    put(&api, MODEL_ROUTES_PATH, "two", 2, {
        let mut spec = model(&["two"]);
        spec["hold"] = json!({"maxRequests": 7});
        spec
    });
    let after = watched.until(|now| now.routes[1].hold.max_requests == 7).await;
    assert!(Arc::ptr_eq(&before.routes[0], &after.routes[0]));
    assert!(!Arc::ptr_eq(&before.routes[1], &after.routes[1]));
}

#[tokio::test(start_paused = true)]
async fn endless_changes_act_within_half_a_second() {
    let api = FakeApiServer::default();
    put(&api, MODEL_ROUTES_PATH, "one", 1, model(&["one"]));
    let mut watched = RoutesTest::new(&api, Kubernetes::default());
    watched.until_named(&["models/one"]).await;
    let began = Instant::now();
    // A change every 10 ms never leaves the 50 ms of quiet that end a batch.
    let changing = async {
        for most in 100..300 {
            let mut spec = model(&["one"]);
            spec["hold"] = json!({"maxRequests": most});
            put(&api, MODEL_ROUTES_PATH, "one", 1, spec);
            sleep(Duration::from_millis(10)).await;
        }
    };
    let first = watched.until(|now| now.routes[0].hold.max_requests >= 100);
    let (took, ()) = tokio::join!(
        async {
            first.await;
            began.elapsed()
        },
        changing
    );
    assert!(took <= Duration::from_millis(520), "{took:?}: 500 ms, and the two steps of 10 ms around them");
}
