//! Sessions: the command run by a user with the documented rights, and the end of sessions with or without that user.

use serde_json::{Value, json};

use crate::{
    model::{ModelDeployment, ScaledObjectManifest},
    scenario::Scenario,
    shell::Shell,
    wait,
};

const KEDA_API_VERSION: &str = "keda.sh/v1alpha1";
const PAUSED: &str = "autoscaling.keda.sh/paused";
const PAUSED_REPLICAS: &str = "autoscaling.keda.sh/paused-replicas";
const UNTIL: &str = "anteroom.dev/session-until";

pub(super) async fn session_serves_and_ends_unattended(it: Scenario) {
    let anteroom = it.anteroom(2, json!({})).await;
    let mut model =
        ModelDeployment::new("tiny").sim("--load-time 200ms --tokens 100000 --inter-token-time 50ms");
    model.probe_period = 1;
    it.serve(&anteroom, &model, json!({})).await;
    it.pause("tiny", PAUSED, json!("true")).await;
    let user = it.user().await;
    let told = user.anteroom("session status").await.stdout_of_success();
    assert!(told.contains("No session in namespace") && told.contains("1 of them paused"), "{told}");

    let told = user.anteroom("session start tiny --for 1h").await.stdout_of_success();
    for part in ["scales until", "Removed the pause (autoscaling.keda.sh/paused: \"true\")", "paused again"] {
        assert!(told.contains(part), "{told}");
    }
    let status = user.anteroom("session status").await;
    assert_eq!(status.table()[0], ["NAMESPACE", "SCALEDOBJECT", "STATE", "UNTIL", "THEN"]);
    assert_eq!(status.table()[1][..3], [it.namespace.as_str(), "tiny", "running"]);
    it.stream_of_keda(&anteroom, "tiny").await;
    let [one, _] = anteroom.replicas.as_slice() else { panic!("there are two") };
    // Each replica learns of the session by its own watch.
    it.obstacle(one, "tiny", None).await;
    // Demand keeps the model up while this stream lasts.
    let flow = one.flow("tiny").await;

    user.anteroom("session start tiny --for 2s").await.stdout_of_success();
    it.ended("tiny").await;
    let annotations = it.annotations("tiny").await;
    assert_eq!((annotations[PAUSED].as_str(), &annotations[PAUSED_REPLICAS]), (Some("true"), &Value::Null));
    let told = user.anteroom("session status tiny").await.stdout_of_success();
    assert!(told.contains("has no session and is paused"), "{told}");
    it.assert_one_session_event("tiny").await;
    // Running pods stay unless the user asks for zero.
    flow.await_next_part().await;
    drop(flow);
    one.read("tiny", 4).await.unwrap().unwrap();
    it.await_spec_replicas("tiny", 1, wait::WAIT_LIMIT).await;
    user.anteroom("session start tiny --for 2s --to-zero").await.stdout_of_success();
    it.ended("tiny").await;
    assert_eq!(it.annotations("tiny").await[PAUSED_REPLICAS], "0");
    it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
    it.obstacle(one, "tiny", Some("autoscaling_paused")).await;
    let refused = one.ask("tiny", false).await.unwrap();
    assert_eq!(refused.json().await["error"]["code"], "autoscaling_paused");
}

pub(super) async fn later_replica_ends_the_session(it: Scenario) {
    it.deploy(&ModelDeployment::new("tiny")).await;
    let mut scaled = ScaledObjectManifest::new("tiny", "10.77.0.1:1", json!({ "route": "tiny" }));
    scaled.annotations.insert(PAUSED_REPLICAS.into(), "2".into());
    it.apply(&scaled.object()).await;
    it.await_spec_replicas("tiny", 2, wait::WAIT_LIMIT).await;
    let user = it.user().await;
    let told = user.anteroom("session start tiny --for 1s").await.stdout_of_success();
    assert!(told.contains("with 2 replicas as before"), "{told}");
    assert_eq!(it.annotations("tiny").await[PAUSED_REPLICAS], Value::Null);
    // No replica runs to end the session.
    wait::until("the end that nobody sees to", wait::WAIT_LIMIT, async || {
        let told = user.anteroom("session status tiny").await.stdout_of_success();
        if told.contains(" ago)") { Ok(()) } else { Err(told) }
    })
    .await;
    assert!(it.annotations("tiny").await[UNTIL].is_string());

    let _anteroom = it.anteroom(1, json!({})).await;
    it.ended("tiny").await;
    let annotations = it.annotations("tiny").await;
    assert_eq!(
        (annotations[PAUSED].as_str(), annotations[PAUSED_REPLICAS].as_str()),
        (Some("true"), Some("2"))
    );
    it.await_spec_replicas("tiny", 2, wait::WAIT_LIMIT).await;
}

pub(super) async fn sessions_are_stopped_prolonged_and_refused(it: Scenario) {
    it.deploy(&ModelDeployment::new("tiny")).await;
    let mut scaled = ScaledObjectManifest::new("tiny", "10.77.0.1:1", json!({ "route": "tiny" }));
    scaled.annotations.insert(PAUSED.into(), "true".into());
    it.apply(&scaled.object()).await;
    let _anteroom = it.anteroom(1, json!({})).await;
    let user = it.user().await;
    user.anteroom("session start tiny --for 1h").await.stdout_of_success();
    let first = it.annotations("tiny").await[UNTIL].clone();
    let told = user.anteroom("session start tiny --for 3h").await.stdout_of_success();
    assert!(told.contains("Replaces the previous end"), "{told}");
    assert!(it.annotations("tiny").await[UNTIL].as_str() > first.as_str());
    let told = user.anteroom("session stop tiny --to-zero").await.stdout_of_success();
    assert!(told.contains("scaled to zero and paused"), "{told}");
    let annotations = it.annotations("tiny").await;
    assert_eq!(
        (annotations[PAUSED].as_str(), annotations[PAUSED_REPLICAS].as_str()),
        (Some("true"), Some("0"))
    );
    assert_eq!(annotations[UNTIL], Value::Null);
    let told = user.anteroom("session stop tiny").await.stdout_of_success();
    assert!(told.contains("has no session and is paused"), "{told}");

    let told = user.anteroom("session start nothing --for 1h").await.stderr_of_failure();
    assert!(told.contains("there is no ScaledObject `nothing`") && told.contains("tiny"), "{told}");
    let told = user.anteroom("session start tiny --for 31d").await.stderr_of_failure();
    assert!(told.contains("at most 30d"), "{told}");
    // A user without rights gets an error that names the missing one.
    let told = it.shell_of("default").await.anteroom("session start tiny --for 1h").await.stderr_of_failure();
    assert!(told.contains("you may not get ScaledObjects"), "{told}");
    let told = user.anteroom("session status -n default").await.stderr_of_failure();
    assert!(told.contains("Ask for the verb `list` on scaledobjects.keda.sh"), "{told}");
}

// === impl Scenario ===

impl Scenario {
    /// Returns the terminal of a user with exactly the rights documented on the page on KEDA.
    async fn user(&self) -> Shell {
        let rules = json!([{ "apiGroups": ["keda.sh"], "resources": ["scaledobjects"], "verbs": ["get", "list", "patch"] }]);
        let rbac = "rbac.authorization.k8s.io";
        for object in [
            json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "user" } }),
            json!({ "apiVersion": format!("{rbac}/v1"), "kind": "Role", "metadata": { "name": "user" }, "rules": rules }),
            json!({
                "apiVersion": format!("{rbac}/v1"),
                "kind": "RoleBinding",
                "metadata": { "name": "user" },
                "roleRef": { "apiGroup": rbac, "kind": "Role", "name": "user" },
                "subjects": [{ "kind": "ServiceAccount", "name": "user", "namespace": self.namespace }],
            }),
        ] {
            self.apply(&object).await;
        }
        let shell = self.shell_of("user").await;
        wait::until("the rights of a user", wait::WAIT_LIMIT, async || {
            let said = shell.kubectl("auth can-i patch scaledobjects.keda.sh").await;
            if said.success { Ok(()) } else { Err(said.out) }
        })
        .await;
        shell
    }

    /// Returns the annotations of a ScaledObject.
    async fn annotations(&self, scaled: &str) -> Value {
        let object = self.dynamic(KEDA_API_VERSION, "ScaledObject").get(scaled).await.unwrap();
        json!(object.metadata.annotations.unwrap_or_default())
    }

    /// Waits until the session of a ScaledObject has ended.
    async fn ended(&self, scaled: &str) {
        wait::object(
            &self.dynamic(KEDA_API_VERSION, "ScaledObject"),
            scaled,
            "the end of its session",
            wait::WAIT_LIMIT,
            |object| {
                let annotations = object?.metadata.annotations.clone().unwrap_or_default();
                (annotations.contains_key(PAUSED) && !annotations.contains_key(UNTIL)).then_some(())
            },
        )
        .await;
    }

    /// Waits for the Event of the end of a session, and asserts that only one replica wrote it.
    async fn assert_one_session_event(&self, scaled: &str) {
        let selector = format!("involvedObject.name={scaled},reason=SessionEnded");
        let arguments = format!("get events --field-selector {selector} -o name");
        let shell = self.shell();
        let events = wait::until("an Event", wait::WAIT_LIMIT, async || {
            let events = shell.kubectl(&arguments).await.stdout_of_success();
            if events.is_empty() { Err("none".into()) } else { Ok(events) }
        })
        .await;
        assert_eq!(events.lines().count(), 1, "{events}");
    }
}
