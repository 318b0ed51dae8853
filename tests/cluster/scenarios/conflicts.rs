//! Routes of which some or all cannot be served: the winner, the reasons given to the others, and the absence of side
//! effects.

use kube::api::{DeleteParams, DynamicObject, PostParams};
use serde_json::{Value, json};

use crate::{
    anteroom::AnteroomReplica,
    client,
    model::ModelDeployment,
    routes::{ANTEROOM_API_VERSION, interceptor_route, model_route},
    scenario::Scenario,
    wait,
};

pub(super) async fn older_route_wins_and_the_younger_follows(it: Scenario) {
    deploy_shared_target(&it).await;
    // The names are in reverse order, so that they do not decide.
    let same = json!({ "match": { "models": ["shared"] }, "target": { "service": { "name": "tiny" } } });
    it.apply(&model_route("z-older", same.clone())).await;
    it.await_later_timestamp((ANTEROOM_API_VERSION, "ModelRoute"), "z-older").await;
    it.apply(&model_route("a-younger", same)).await;
    let partly =
        json!({ "match": { "models": ["shared", "own"] }, "target": { "service": { "name": "tiny" } } });
    it.apply(&model_route("partly", partly)).await;
    let anteroom = it.anteroom(2, json!({})).await;

    let lost = it.await_route_condition("a-younger", "Accepted", "Conflict").await;
    let winner =
        format!("ModelRoute {}/z-older matches model \"shared\" as well, and takes precedence", it.namespace);
    assert_eq!(lost["status"], "False");
    assert!(lost["message"].as_str().unwrap().contains(&winner), "{lost}");
    it.await_route_condition("a-younger", "Ready", "NotAccepted").await;
    let partly = it.await_route_condition("partly", "Accepted", "PartlyConflicting").await;
    assert_eq!(partly["status"], "True");
    assert!(
        partly["message"].as_str().unwrap().contains("1 of its 2 matches belong to other routes"),
        "{partly}"
    );
    for replica in &anteroom.replicas {
        it.await_served_by(replica, "shared", "z-older").await;
        it.await_served_by(replica, "own", "partly").await;
    }

    it.dynamic(ANTEROOM_API_VERSION, "ModelRoute").delete("z-older", &DeleteParams::default()).await.unwrap();
    it.await_route_condition("a-younger", "Accepted", "Accepted").await;
    for replica in &anteroom.replicas {
        it.await_served_by(replica, "shared", "a-younger").await;
    }
}

pub(super) async fn file_takes_precedence_and_names_are_unique(it: Scenario) {
    let address = deploy_shared_target(&it).await;
    it.apply(&model_route("mine", json!({ "match": { "models": ["from-file"] } }))).await;
    it.apply(&model_route("twin", json!({ "target": { "service": { "name": "tiny" } } }))).await;
    let rule = json!({
        "target": { "service": "tiny", "port": 80 },
        "rules": [{ "hosts": ["twin.example.com"] }],
        "scalingMetric": { "concurrency": {} },
    });
    it.apply(&interceptor_route("twin", rule)).await;
    let url = format!("http://{address}:8000");
    let file = json!([{ "name": "file", "match": { "models": ["from-file"] }, "target": { "url": url } }]);
    let anteroom = it.anteroom(1, json!({ "routes": file })).await;

    let lost = it.await_route_condition("mine", "Accepted", "Conflict").await;
    assert!(
        lost["message"].as_str().unwrap().contains("the route \"file\" of the proxy's configuration"),
        "{lost}"
    );
    let lost = it.await_interceptor_route_ready("twin", "Conflict").await;
    assert!(lost["message"].as_str().unwrap().contains("has this name already"), "{lost}");
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    assert_eq!(replica.ask("from-file", false).await.unwrap().status, 200);
    assert_eq!(replica.metric("anteroom_requests_total{route=\"file\"").await, Some(1.0));
    it.await_served_by(replica, "twin", "twin").await;
    let status = it.shell().anteroom("status").await.stdout_of_success();
    assert!(status.contains(&format!("InterceptorRoute {}/twin: ", it.namespace)), "{status}");
}

pub(super) async fn invalid_objects_are_skipped_with_reason(it: Scenario) {
    deploy_shared_target(&it).await;
    let allowed = json!({ "kubernetes": { "allowedHosts": ["gateway.test", "*.models.test:8000"] } });
    let anteroom = it.anteroom(1, allowed).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.apply(&model_route("good", json!({ "target": { "service": { "name": "tiny" } } }))).await;
    it.await_served_by(replica, "good", "good").await;

    // The apiserver cannot detect any of these errors.
    let hosts: [(&str, Value); 4] = [
        ("metadata", json!({ "service": null, "url": "http://169.254.169.254" })),
        ("apiserver", json!({ "service": null, "url": "http://10.77.0.1:6443" })),
        ("gateway", json!({ "gateway": "http://gateway.test.example:80" })),
        ("port", json!({ "gateway": "http://a.models.test:8001" })),
    ];
    for (name, target) in &hosts {
        it.apply(&model_route(name, json!({ "target": target }))).await;
    }
    let gateway = json!({ "target": { "gateway": "http://a.models.test:8000" } });
    it.apply(&model_route("allowed", gateway)).await;
    let theirs = |more: Value| {
        let mut spec = json!({
            "target": { "service": "tiny", "port": 80 },
            "rules": [{ "hosts": ["app.example.com"] }],
            "scalingMetric": { "concurrency": {} },
        });
        crate::model::merge(&mut spec, &more);
        spec
    };
    let malformed: [(&str, Value, &str); 3] = [
        (
            "soon",
            json!({ "timeouts": { "readiness": "soon" } }),
            "spec.timeouts.readiness: \"soon\" is not a duration",
        ),
        (
            "mode",
            json!({ "staticRoutes": [{ "responseMode": "Never" }] }),
            "\"Never\" is not WhenUnavailable or Always",
        ),
        ("type", json!({ "staticRoutes": [{ "rules": 7 }] }), "it cannot be read: "),
    ];
    for (name, spec, _) in &malformed {
        it.apply(&interceptor_route(name, theirs(spec.clone()))).await;
    }
    for (name, _) in &hosts {
        let refused = it.await_route_condition(name, "Accepted", "Invalid").await;
        let why = refused["message"].as_str().unwrap();
        assert!(why.contains("kubernetes.allowedHosts"), "{name}: {why}");
    }
    it.await_route_condition("allowed", "Accepted", "Accepted").await;
    for (name, _, expected) in &malformed {
        let refused = it.await_interceptor_route_ready(name, "Invalid").await;
        let why = refused["message"].as_str().unwrap();
        assert!(why.contains(expected), "{name}: {why}");
    }

    // Existing routes are still served, and a corrected one is served from then on.
    it.await_served_by(replica, "good", "good").await;
    it.apply(&interceptor_route("soon", theirs(json!({ "timeouts": { "readiness": "10s" } })))).await;
    it.await_interceptor_route_ready("soon", "Accepted").await;
    assert_eq!(client::get(replica.admin(), "/readyz").await.unwrap().status, 200);
}

pub(super) async fn object_of_newer_crd_blocks_no_other(it: Scenario) {
    deploy_shared_target(&it).await;
    let definition = crate::chart::definitions().remove(0);
    let mut newer = definition.clone();
    let at = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    newer.pointer_mut(at).unwrap()["novelty"] = json!({ "type": "string" });
    it.apply(&newer).await;
    // The apiserver applies the new definition with a delay.
    let novel = model_route("novel", json!({ "novelty": "of next year" }));
    wait::until("the newer definition", wait::WAIT_LIMIT, async || {
        it.kube.try_apply(&novel, &it.namespace).await.map_err(|error| error.to_string())
    })
    .await;
    it.apply(&model_route("good", json!({ "target": { "service": { "name": "tiny" } } }))).await;

    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.await_served_by(replica, "good", "good").await;
    let refused = it.await_route_condition("novel", "Accepted", "Invalid").await;
    let status = it.shell().anteroom("status").await.stdout_of_success();
    it.dynamic(ANTEROOM_API_VERSION, "ModelRoute").delete("novel", &DeleteParams::default()).await.unwrap();
    // Restore the definition before any assertion: other scenarios need it.
    it.apply(&definition).await;
    let why = refused["message"].as_str().unwrap();
    assert!(why.contains("novelty") && why.contains("upgrade the proxy"), "{why}");
    assert!(status.contains("invalid object"), "{status}");
    it.await_served_by(replica, "good", "good").await;
}

/// Deploys the running model that all routes target, and returns its address.
async fn deploy_shared_target(it: &Scenario) -> String {
    let mut model = ModelDeployment::new("tiny");
    (model.replicas, model.probe_period) = (1, 1);
    it.deploy(&model).await;
    it.endpoints("tiny", 1).await.remove(0)
}

// === impl Scenario ===

impl Scenario {
    /// Waits until a replica serves a model by the route of this name in the namespace.
    async fn await_served_by(&self, replica: &AnteroomReplica, model: &str, route: &str) {
        let series = format!("anteroom_requests_total{{route=\"{}/{route}\"", self.namespace);
        wait::until(&format!("{model} to be served by {route}"), wait::WAIT_LIMIT, async || {
            let before = replica.metric(&series).await.unwrap_or(0.0);
            let status = replica.ask(model, false).await?.status;
            let after = replica.metric(&series).await.unwrap_or(0.0);
            if status == 200 && after == before + 1.0 {
                Ok(())
            } else {
                Err(format!("{status}, {before} requests by {route} became {after}"))
            }
        })
        .await;
    }

    /// Waits until new objects are younger than an object: ages are in whole seconds.
    async fn await_later_timestamp(&self, (api_version, kind): (&str, &str), name: &str) {
        let api = self.dynamic(api_version, kind);
        let older = api.get(name).await.unwrap();
        let next: DynamicObject = serde_json::from_value(json!({
            "apiVersion": api_version, "kind": kind, "metadata": { "generateName": "age-" }, "spec": older.data["spec"],
        }))
        .unwrap();
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        wait::until("the next second", wait::WAIT_LIMIT, async || {
            let age = api.create(&dry, &next).await.map_err(|error| error.to_string())?;
            let (age, older) = (age.metadata.creation_timestamp, older.metadata.creation_timestamp.clone());
            if age > older { Ok(()) } else { Err(format!("{age:?}")) }
        })
        .await;
    }
}
