//! Models that do not start: waiting clients and operators get the reason.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use crate::{
    anteroom::AnteroomReplica,
    client::StreamingResponse,
    model::{ModelDeployment, ScaledObjectManifest},
    node::fate,
    routes::model_route,
    scenario::Scenario,
    wait,
};

/// Cause of a failed start.
struct Case {
    model: ModelDeployment,
    /// Kind in the API and the metric.
    kind: &'static str,
    /// Reason of the Event.
    word: &'static str,
    /// Part of the message.
    says: &'static str,
}

pub(super) async fn held_requests_fail_early_with_the_reason(it: Scenario) {
    // The namespace has no quota for GPUs; only one of the models requests one.
    it.apply(&json!({
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": { "name": "no-gpus" },
        "spec": { "hard": { "requests.nvidia.com/gpu": "0" } },
    }))
    .await;
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let model = |name: &str| {
        let mut model = ModelDeployment::new(name).play(fate::BACKOFF_ANNOTATION, "200ms");
        model.resources = json!({});
        model
    };
    let mut nowhere = model("nowhere");
    nowhere.node_selector = BTreeMap::from([("pool".to_owned(), "nowhere".to_owned())]);
    let cases = [
        Case {
            model: model("image").play(fate::FAILURE_ANNOTATION, "image-pull-back-off"),
            kind: "image_pull",
            word: "ImagePull",
            says: "container `server` cannot have its image `anteroom`",
        },
        Case {
            model: model("crash").play(fate::FAILURE_ANNOTATION, "crash-loop"),
            kind: "crash_loop",
            word: "CrashLoop",
            says: "with exit code 1 (Error, restarted",
        },
        Case {
            model: model("memory").sim("--hang-load").play(fate::FAILURE_ANNOTATION, "oom"),
            kind: "out_of_memory",
            word: "OutOfMemory",
            says: "was ended for want of memory (OOMKilled",
        },
        Case {
            model: nowhere,
            kind: "unschedulable",
            word: "Unschedulable",
            says: "No node takes pod `nowhere-",
        },
        Case {
            model: ModelDeployment::new("quota"),
            kind: "quota",
            word: "Quota",
            says: "exceeded quota: no-gpus",
        },
    ];
    join_all(cases.iter().map(|case| fails(&it, replica, &anteroom, case))).await;
    let shell = it.shell();
    wait::until("the reasons in the table", wait::WAIT_LIMIT, async || {
        let table = shell.anteroom("status").await.stdout_of_success();
        match cases.iter().find(|case| !table.contains(case.says)) {
            None => Ok(()),
            Some(missing) => Err(format!("{} is not in {table}", missing.says)),
        }
    })
    .await;
}

pub(super) async fn failed_starts_report_the_reason(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let model = |name: &str| {
        let mut model = ModelDeployment::new(name);
        model.resources = json!({});
        model.probe_period = 1;
        model
    };
    let mut elsewhere = model("elsewhere");
    elsewhere.port = json!({ "targetPort": 9999 });
    let mut unready = model("unready");
    unready.container = json!({ "readinessProbe": { "httpGet": { "path": "/nowhere" } } });
    let cases = [
        Case {
            model: model("absent"),
            kind: "no_service",
            word: "NoService",
            says: "/absent does not exist",
        },
        Case {
            model: model("strangers"),
            kind: "no_pods_selected",
            word: "NoPodsSelected",
            says: "it wants the labels app=nobody, and pod `strangers-",
        },
        Case {
            model: elsewhere,
            kind: "port_refused",
            word: "PortRefused",
            says: "leads port 80 to 9999, and its containers expose 8000 (http)",
        },
        Case {
            model: model("unmounted"),
            kind: "volume",
            word: "Volume",
            says: "cannot be mounted (FailedMount): ",
        },
        Case {
            model: unready,
            kind: "not_ready",
            word: "NotReady",
            says: "is not ready: Readiness probe failed: HTTP probe failed with statuscode: 404",
        },
    ];
    let [absent, strangers, elsewhere, unmounted, unready] = &cases;
    for case in &cases {
        let mut spec = with_graces();
        if case.kind == "not_ready" {
            // A pod that is not ready may still become ready, so only the activation timeout ends the start.
            spec["readiness"] = json!({ "probe": false, "activationTimeout": "10s" });
        }
        it.serve(&anteroom, &case.model, spec).await;
    }
    it.api::<Service>().delete("absent", &<_>::default()).await.unwrap();
    it.patch("v1", "Service", "strangers", &json!({ "spec": { "selector": { "app": "nobody" } } })).await;
    let mounts = json!({ "spec": {
        "volumes": [{ "name": "models", "configMap": { "name": "none" } }],
        "containers": [{ "name": "server", "volumeMounts": [{ "name": "models", "mountPath": "/models" }] }],
    } });
    it.change_template("unmounted", &mounts).await;
    // One after the other, so that each has its own cold start and none is queued.
    for case in [absent, strangers, elsewhere, unmounted, unready] {
        assert_reason_everywhere(&it, replica, case).await;
    }
}

fn with_graces() -> Value {
    let grace = "1s";
    let graces = json!({
        "imagePull": grace, "crashLoop": grace, "unschedulable": grace, "quota": grace, "outOfMemory": grace,
        "volume": grace, "service": grace,
    });
    // Keeps the pods for inspection after the requests have failed.
    json!({ "failureGrace": graces, "keepalive": heartbeats(), "scaling": { "linger": "60s" } })
}

async fn fails(it: &Scenario, replica: &AnteroomReplica, anteroom: &crate::anteroom::Anteroom, case: &Case) {
    it.serve(anteroom, &case.model, with_graces()).await;
    assert_reason_everywhere(it, replica, case).await;
}

/// Requests a model that does not start: every output has the reason.
async fn assert_reason_everywhere(it: &Scenario, replica: &AnteroomReplica, case: &Case) {
    let Case { model, kind, word, says } = case;
    let (plain, stream) =
        tokio::join!(replica.ask(&model.name, false), read_with_heartbeat(it, replica, &model.name, says));
    assert!(stream.contains("cold_start_failed"), "{stream}");

    let plain = plain.unwrap();
    assert_eq!(plain.status, 503, "{}", model.name);
    let error = plain.json().await;
    assert_eq!(error["error"]["code"], "cold_start_failed");
    assert!(error["error"]["message"].as_str().unwrap().contains(says), "{error}");
    let obstacle = it.obstacle(replica, &model.name, Some(kind)).await;
    assert!(obstacle["message"].as_str().unwrap().contains(says), "{obstacle}");
    let series = format!("anteroom_obstacle{{route=\"{}/{}\",kind=\"{kind}\"", it.namespace, model.name);
    assert_eq!(replica.metric(&series).await, Some(1.0));
    let note = it.await_route_event(&model.name, "Warning", word).await;
    assert!(note.contains(says), "{note}");
    it.await_route_event(&model.name, "Warning", "ColdStartFailed").await;
    // Exactly one Event, even for a ready pod whose port refuses connections and whose endpoint opens and closes again.
    let failures = it.route_event_notes(&model.name, "Warning", "ColdStartFailed").await;
    assert!(matches!(failures.as_slice(), [note] if note.contains(says)), "{failures:?}");
    let said = it.await_route_condition(&model.name, "Ready", "Failed").await;
    assert!(said["message"].as_str().unwrap().contains(says), "{said}");
    let all = replica.cold_starts(it, &model.name).await;
    let [last] = all.as_slice() else { panic!("not one cold start: {all:?}") };
    assert_eq!(last["outcome"], "failed", "{last}");
    assert!(last["reason"].as_str().unwrap().contains(says), "{last}");
}

pub(super) async fn held_requests_are_served_after_the_fix(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let model = ModelDeployment::new("tiny")
        .play(fate::FAILURE_ANNOTATION, "image-pull-back-off")
        .play(fate::BACKOFF_ANNOTATION, "200ms");
    it.serve(&anteroom, &model, json!({ "keepalive": heartbeats() })).await;
    let mut waits = replica.ask("tiny", true).await.unwrap();
    read_until_words(&mut waits, "cannot have its image `anteroom`").await;

    let pod = it.pods().await.remove(0).metadata.name.unwrap();
    it.patch(
        "v1",
        "Pod",
        &pod,
        &json!({ "metadata": { "annotations": { fate::FAILURE_ANNOTATION: null } } }),
    )
    .await;
    read_until_words(&mut waits, "data: [DONE]").await;
    it.obstacle(replica, "tiny", None).await;
    it.await_route_condition("tiny", "Ready", "EndpointsReady").await;
}

pub(super) async fn missing_scaled_object_is_reported(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let model = ModelDeployment::new("tiny");
    it.deploy(&model).await;
    it.apply(&model_route("tiny", json!({ "keepalive": heartbeats() }))).await;
    let why = format!("No ScaledObject names `{}/tiny`", it.namespace);
    let said = it.await_route_condition("tiny", "Scalable", "NoScaledObject").await;
    assert!(said["message"].as_str().unwrap().contains(&why), "{said}");
    it.obstacle(replica, "tiny", Some("no_scaled_object")).await;
    it.await_route_event("tiny", "Warning", "NoScaledObject").await;
    let mut waits = replica.ask("tiny", true).await.unwrap();
    read_until_words(&mut waits, &why).await;

    // Once created as instructed, the ScaledObject wakes the model for requests already waiting.
    it.apply(&ScaledObjectManifest::of(&model, &anteroom).object()).await;
    read_until_words(&mut waits, "data: [DONE]").await;
    let said = it.await_route_condition("tiny", "Scalable", "ScaledObject").await;
    assert_eq!(said["status"], "True");
}

pub(super) async fn scaled_object_of_another_scaler_is_recognised(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let model = ModelDeployment::new("tiny");
    it.deploy(&model).await;
    // Lower levels of detail omit addresses.
    let full = json!({ "keepalive": heartbeats(), "failure": { "detail": "full" } });
    it.apply(&model_route("tiny", full)).await;
    let nobody = it.socket(40, 9090).to_string();
    let mut scaled = ScaledObjectManifest::of(&model, &anteroom);
    scaled.scaler.clone_from(&nobody);
    it.apply(&scaled.object()).await;
    it.await_route_condition("tiny", "Accepted", "Accepted").await;
    let mut waits = replica.ask("tiny", true).await.unwrap();
    let why = format!("for this route it asks `{nobody}`");
    read_until_words(&mut waits, &why).await;
    let said = it.await_route_condition("tiny", "Scalable", "ScaleRefused").await;
    let said = said["message"].as_str().unwrap();
    assert!(said.contains(&why) && said.contains("no metric specs returned from scalers"), "{said}");
    it.await_route_event("tiny", "Warning", "ScaleRefused").await;

    it.apply(&ScaledObjectManifest::of(&model, &anteroom).object()).await;
    read_until_words(&mut waits, "data: [DONE]").await;
    it.obstacle(replica, "tiny", None).await;
}

pub(super) async fn absent_keda_operator_is_an_obstacle(it: Scenario) {
    let anteroom = it.anteroom(2, json!({})).await;
    it.serve(&anteroom, &ModelDeployment::new("tiny"), json!({ "keepalive": heartbeats() })).await;
    it.world.keda.kill_operator().await;
    let mut waits = anteroom.replicas[1].ask("tiny", true).await.unwrap();
    read_until_words(&mut waits, "KEDA has no stream to this proxy").await;
    it.await_route_condition("tiny", "Scalable", "NoKedaStream").await;
    for replica in &anteroom.replicas {
        it.obstacle(replica, "tiny", Some("no_keda_stream")).await;
    }
    it.world.keda.restart_operator().await;
    read_until_words(&mut waits, "data: [DONE]").await;
    it.obstacle(&anteroom.replicas[0], "tiny", None).await;
}

fn heartbeats() -> Value {
    json!({ "mode": "comment", "after": "100ms", "interval": "100ms" })
}

/// Reads a stream to its end; one of its heartbeats must contain `says`.
async fn read_with_heartbeat(it: &Scenario, replica: &AnteroomReplica, model: &str, says: &str) -> String {
    let answer = wait::within("a heartbeat", wait::WAIT_LIMIT, replica.ask(model, true)).await.unwrap();
    let text = wait::within("its end", wait::WAIT_LIMIT, answer.text()).await.unwrap();
    let told = text.lines().any(|line| line.starts_with(": ") && line.contains(&says.replace('"', "'")));
    assert!(told, "{model} of {}: {text}", it.namespace);
    text
}

/// Reads a stream until it contains `words`.
async fn read_until_words(answer: &mut StreamingResponse, words: &str) {
    let mut text = String::new();
    let reading = async {
        while !text.contains(words) {
            match answer.next().await.unwrap() {
                Some(part) => text += &String::from_utf8_lossy(&part),
                None => break,
            }
        }
    };
    let in_time = tokio::time::timeout(wait::WAIT_LIMIT, reading).await.is_ok();
    assert!(in_time && text.contains(words), "not told {words:?}, but {text}");
}
