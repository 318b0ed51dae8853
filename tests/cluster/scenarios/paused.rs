//! Paused ScaledObjects: requests at zero fail at once, and running pods keep serving.

use serde_json::{Value, json};

use crate::{
    anteroom::AnteroomReplica, client::StreamingResponse, model::ModelDeployment, scenario::Scenario, wait,
};

const KEDA_API_VERSION: &str = "keda.sh/v1alpha1";
const PAUSED: &str = "autoscaling.keda.sh/paused";
const PAUSED_REPLICAS: &str = "autoscaling.keda.sh/paused-replicas";

pub(super) async fn request_at_zero_gets_the_resume_command(it: Scenario) {
    let anteroom = it.anteroom(2, json!({})).await;
    it.serve(&anteroom, &model(), json!({})).await;
    it.pause("tiny", PAUSED, json!("true")).await;
    let replicas = it.replicas("tiny").await;
    for replica in &anteroom.replicas {
        it.obstacle(replica, "tiny", Some("autoscaling_paused")).await;
        let refused = replica.ask("tiny", true).await.unwrap();
        assert_eq!(refused.status, 503);
        assert_eq!(refused.headers["x-should-retry"], "false");
        let error = refused.json().await;
        assert_eq!(error["error"]["code"], "autoscaling_paused", "{error}");
        let message = error["error"]["message"].as_str().unwrap();
        for part in [format!("ScaledObject `{}/tiny` is paused at zero", it.namespace), command(&it, "2h")] {
            assert!(message.contains(&part), "{message}");
        }
        assert_eq!(replica.gauge("anteroom_scaler_active", &it, "tiny").await, 0.0);
    }
    let said = it.await_route_condition("tiny", "Scalable", "AutoscalingPaused").await;
    assert!(said["message"].as_str().unwrap().contains(&command(&it, "2h")), "{said}");
    it.await_route_event("tiny", "Normal", "AutoscalingPaused").await;
    let shell = it.shell();
    let status = shell.anteroom("status").await.stdout_of_success();
    assert!(status.contains("(paused)") && status.contains(&command(&it, "2h")), "{status}");
    assert_eq!(replicas.value_history(), [0]);

    // The command as given in the message, except for the time.
    let command = command(&it, "1h");
    shell.anteroom(command.strip_prefix("anteroom ").unwrap()).await.stdout_of_success();
    it.wait_for_condition(KEDA_API_VERSION, "ScaledObject", "tiny", "Paused", "False").await;
    for replica in &anteroom.replicas {
        it.obstacle(replica, "tiny", None).await;
    }
    it.stream_of_keda(&anteroom, "tiny").await;
    assert_eq!(asks(&anteroom.replicas[1]).await.status, 200);
    it.await_route_condition("tiny", "Scalable", "ScaledObject").await;
    wait::until("the cold start in the table", wait::WAIT_LIMIT, async || {
        let table = shell.kubectl("get mr tiny -o wide").await;
        let row = table.table().remove(1);
        // Columns: name, models, target (two words), state, endpoints, held; then accepted, scaled by, cold start, age.
        let is = |column: usize, value: &str| row.get(column).is_some_and(|found| *found == value);
        let took = row
            .get(9)
            .is_some_and(|took| took.ends_with('s') && took.starts_with(|c: char| c.is_ascii_digit()));
        if is(7, "Accepted") && is(8, "tiny") && took { Ok(()) } else { Err(table.out.clone()) }
    })
    .await;
}

pub(super) async fn route_can_hold_until_pause_ends(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.serve(&anteroom, &model(), json!({ "whenPaused": "hold" })).await;
    it.pause("tiny", PAUSED, json!("true")).await;
    it.obstacle(replica, "tiny", Some("autoscaling_paused")).await;
    let waits = replica.read("tiny", 4);
    replica.await_held_count(&it, "tiny", 1).await;
    let api = it.dynamic(KEDA_API_VERSION, "ScaledObject");
    assert!(api.get("tiny").await.unwrap().metadata.annotations.unwrap().contains_key(PAUSED));

    it.pause("tiny", PAUSED, Value::Null).await;
    wait::within("the answer", wait::WAIT_LIMIT, waits).await.unwrap().unwrap();
    it.obstacle(replica, "tiny", None).await;
}

pub(super) async fn pause_ends_the_wait_only_at_zero(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let keepalive = json!({ "keepalive": { "mode": "comment", "after": "100ms", "interval": "100ms" } });
    // The model never becomes ready by itself.
    it.serve(&anteroom, &model().sim("--hang-load"), keepalive).await;
    let waits = replica.read("tiny", 4);
    it.await_spec_replicas("tiny", 1, wait::WAIT_LIMIT).await;
    it.pause("tiny", PAUSED_REPLICAS, json!("0")).await;
    it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
    let told = wait::within("an end of the wait", wait::WAIT_LIMIT, waits).await.unwrap().unwrap_err();
    for part in ["cold_start_failed", "is paused at zero", PAUSED_REPLICAS, "anteroom session start"] {
        assert!(told.contains(part), "{told}");
    }

    // Paused with one replica, the model can serve.
    let healthy = json!([{ "op": "replace", "path": "/spec/template/spec/containers/0/args",
        "value": ["sim", "--port", "8000", "--load-time", "300ms"] }]);
    let patch = format!("patch deployment tiny --type=json -p {}", healthy.to_string().replace(' ', ""));
    it.shell().kubectl(&patch).await.stdout_of_success();
    it.pause("tiny", PAUSED_REPLICAS, json!("1")).await;
    it.await_spec_replicas("tiny", 1, wait::WAIT_LIMIT).await;
    it.obstacle(replica, "tiny", None).await;
    assert_eq!(asks(replica).await.status, 200);
    // Running pods keep serving under both pause annotations.
    it.pause("tiny", PAUSED, json!("true")).await;
    it.pause("tiny", PAUSED_REPLICAS, Value::Null).await;
    it.endpoints("tiny", 1).await;
    assert_eq!(asks(replica).await.status, 200);
    let said = it.await_route_condition("tiny", "Ready", "EndpointsReady").await;
    assert_eq!(said["status"], "True");
}

fn model() -> ModelDeployment {
    let mut model = ModelDeployment::new("tiny").sim("--load-time 300ms");
    model.probe_period = 1;
    model
}

fn command(it: &Scenario, time: &str) -> String {
    format!("anteroom session start tiny -n {} --for {time}", it.namespace)
}

async fn asks(replica: &AnteroomReplica) -> StreamingResponse {
    wait::within("an answer", wait::WAIT_LIMIT, replica.ask("tiny", true)).await.unwrap()
}

// === impl Scenario ===

impl Scenario {
    /// Sets or removes an annotation of a ScaledObject.
    pub(super) async fn pause(&self, scaled: &str, annotation: &str, value: Value) {
        let patch = json!({ "metadata": { "annotations": { annotation: value } } });
        self.patch(KEDA_API_VERSION, "ScaledObject", scaled, &patch).await;
    }

    /// Waits until a replica reports this obstacle of a route, or none, and returns it.
    pub(super) async fn obstacle(&self, replica: &AnteroomReplica, route: &str, kind: Option<&str>) -> Value {
        wait::until(&format!("{kind:?} in the way of {route}"), wait::WAIT_LIMIT, async || {
            let found = replica.route(self, route).await["obstacle"].clone();
            if found["kind"].as_str() == kind { Ok(found) } else { Err(found.to_string()) }
        })
        .await
    }

    /// Waits for an Event of a ModelRoute with this type and reason, and returns its note.
    pub(super) async fn await_route_event(&self, route: &str, kind: &str, reason: &str) -> String {
        wait::until(&format!("an Event {reason}"), wait::WAIT_LIMIT, async || {
            self.route_event_notes(route, kind, reason).await.into_iter().next().ok_or("none".into())
        })
        .await
    }

    /// Returns the notes of all current Events of a ModelRoute with this type and reason.
    pub(super) async fn route_event_notes(&self, route: &str, kind: &str, reason: &str) -> Vec<String> {
        let selector =
            format!("involvedObject.name={route},involvedObject.kind=ModelRoute,type={kind},reason={reason}");
        let found = self.shell().kubectl(&format!("get events --field-selector {selector} -o json")).await;
        let list: Value = serde_json::from_str(&found.stdout_of_success()).unwrap();
        let notes = list["items"].as_array().unwrap().iter().filter_map(|event| event["message"].as_str());
        notes.map(str::to_owned).collect()
    }
}
