//! The node's agent: durations of the steps of a start, their events and timestamps, and container logs. Cold-start
//! records are compared with its history.

use std::time::{Duration, SystemTime};

use futures_util::{AsyncBufReadExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::{ContainerStatus, Event, Node, Pod};
use kube::{
    ResourceExt as _,
    api::{DeleteParams, ListParams, LogParams},
};
use serde_json::json;

use crate::{
    cloud::NodeTemplate,
    model::ModelDeployment,
    node::{
        clock::NodeClock,
        fate,
        history::{NodeEvent, NodeEventKind},
    },
    scenario::Scenario,
    wait,
};

pub(super) async fn pull_and_start_are_timed_and_reported(it: Scenario) {
    let plays = [
        (fate::PULL_DELAY_ANNOTATION, "1200ms"),
        (fate::START_DELAY_ANNOTATION, "400ms"),
        (fate::REPORT_DELAY_ANNOTATION, "300ms"),
    ];
    let slow = plays.iter().fold(ModelDeployment::new("slow"), |model, (what, time)| model.play(what, time));
    for mut model in [slow, ModelDeployment::new("quick")] {
        (model.replicas, model.probe_period) = (1, 1);
        it.deploy(&model).await;
    }
    it.await_node_events(NodeEventKind::Pulling, 1).await;
    let pods = it.pods().await;
    let status = container(pods.iter().find(|pod| pod.name_any().starts_with("slow")).unwrap());
    if let Some(ContainerStatus { state: Some(state), .. }) = status {
        assert_eq!(state.waiting.unwrap().reason.as_deref(), Some("ContainerCreating"));
    }
    it.await_node_events(NodeEventKind::Ready, 2).await;
    let [pulling, pulled, started] = [NodeEventKind::Pulling, NodeEventKind::Pulled, NodeEventKind::Started]
        .map(|what| first_event_of(&it, "slow", what));
    assert!(between(&pulling, &pulled) >= Duration::from_millis(1200));
    assert!(between(&pulled, &started) >= Duration::from_millis(400));
    assert!(it.history().iter().all(|one| one.what != NodeEventKind::Pulling || one.pod.starts_with("slow")));

    // Messages and timestamps as from the kubelet: whole seconds, and nanoseconds in the name.
    let image = "Container image \"anteroom\" already present on machine and can be accessed by the pod";
    for (model, messages) in [
        ("quick", [image, "Container created", "Container started"].as_slice()),
        ("slow", &["Pulling image \"anteroom\"", "Container created", "Container started"]),
    ] {
        let events = events(&it, model, 3).await;
        for message in messages {
            assert!(events.iter().any(|event| event.message.as_deref() == Some(message)), "{events:?}");
        }
        for event in events {
            assert_eq!(event.involved_object.field_path.as_deref(), Some("spec.containers{server}"));
            assert_eq!(event.reporting_component.as_deref(), Some("kubelet"));
            let stamp = SystemTime::from(event.first_timestamp.as_ref().unwrap().0);
            assert_eq!(stamp, whole(named(&event)));
        }
    }
    let events = events(&it, "slow", 4).await;
    let event = events.iter().find(|event| event.reason.as_deref() == Some("Pulled")).unwrap();
    let message = event.message.as_deref().unwrap();
    let rest = message.strip_prefix("Successfully pulled image \"anteroom\" in ").unwrap();
    let (took, rest) = rest.split_once("s (").unwrap();
    assert_eq!((took.parse::<f64>().unwrap() * 1e3).round() as u128, between(&pulling, &pulled).as_millis());
    assert!(rest.ends_with(" including waiting). Image size: 10737418240 bytes."), "{message}");
    assert_eq!(named(event), pulled.at);
    let pods = it.pods().await;
    let slow = container(pods.iter().find(|pod| pod.name_any().starts_with("slow")).unwrap()).unwrap();
    let stamp = slow.state.unwrap().running.unwrap().started_at.unwrap();
    assert_eq!(SystemTime::from(stamp.0), whole(started.at));
}

pub(super) async fn cloud_node_joins_late_by_its_own_clock(it: Scenario) {
    let three = Duration::from_secs(3);
    let mut model = ModelDeployment::new("tiny");
    (model.replicas, model.probe_period, model.node_selector) = (1, 1, it.pool());
    let machine =
        NodeTemplate { boot: Duration::from_millis(600), clock: NodeClock::Ahead(three), ..it.machine() };
    let began = SystemTime::now();
    let cloud = it.cloud(Duration::from_millis(500), machine);
    it.deploy(&model).await;
    it.await_node_events(NodeEventKind::Ready, 1).await;
    let node = cloud.node().await;

    let [registers, registered, ready] =
        [NodeEventKind::Registers, NodeEventKind::Registered, NodeEventKind::NodeReady]
            .map(|what| first_event_of(&it, &node.name, what));
    assert!(registers.at.duration_since(began).unwrap() >= Duration::from_millis(500));
    assert!(between(&registered, &ready) >= Duration::from_millis(600));
    // Like a real node, it is tainted until it is ready.
    let [bound, started] =
        [NodeEventKind::Bound, NodeEventKind::Started].map(|what| first_event_of(&it, "tiny", what));
    assert!(bound.at > ready.at, "{:?}", it.history());
    let object = it.kube.all::<Node>().get(&node.name).await.unwrap();
    let created = SystemTime::from(object.creation_timestamp().unwrap().0);
    assert!(whole(registers.at) <= created && created <= registered.at, "by the clock of the apiserver");
    let conditions = object.status.unwrap().conditions.unwrap();
    let condition = conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
    let stamp = SystemTime::from(condition.last_transition_time.as_ref().unwrap().0);
    assert_eq!((condition.status.as_str(), stamp), ("True", whole(ready.at + three)));
    let stamp = container(&it.pods().await[0]).unwrap().state.unwrap().running.unwrap().started_at.unwrap();
    assert_eq!(SystemTime::from(stamp.0), whole(started.at + three));

    it.kube
        .namespaced::<Pod>(&it.namespace)
        .delete_collection(&DeleteParams::default(), &ListParams::default())
        .await
        .unwrap();
    it.await_node_events(NodeEventKind::Gone, 1).await;
    node.leave(&it.kube).await;
}

pub(super) async fn logs_are_read_by_authorized_clients(it: Scenario) {
    let mut model =
        ModelDeployment::new("tiny").sim("--load-time 500ms").play(fate::PULL_DELAY_ANNOTATION, "10s");
    (model.replicas, model.probe_period) = (1, 1);
    it.deploy(&model).await;
    it.await_node_events(NodeEventKind::Pulling, 1).await;
    let name = it.pods().await[0].name_any();
    let shell = it.shell();
    let waits = shell.kubectl(&format!("logs {name}")).await.stderr_of_failure();
    let kubelets = format!("container \"server\" in pod \"{name}\" is waiting to start: ContainerCreating");
    assert!(waits.contains(&kubelets), "{waits}");
    it.await_node_events(NodeEventKind::Ready, 1).await;
    let all = shell.kubectl(&format!("logs {name}")).await.stdout_of_success();
    assert!(all.contains("Loading weights took 0.1"), "{all}");
    let tail = shell.kubectl(&format!("logs --tail=1 --timestamps {name}")).await.stdout_of_success();
    let (time, line) = tail.trim_end().split_once(' ').unwrap();
    assert_eq!(Some(line), all.lines().last());
    let answers = first_event_of(&it, "tiny", NodeEventKind::Answers).at;
    let stamped = humantime::parse_rfc3339(time).unwrap();
    assert!(
        first_event_of(&it, "tiny", NodeEventKind::Started).at < stamped && stamped <= answers,
        "{time} {answers:?}"
    );

    // A service account may read logs if it has the right, and receives new lines at once.
    let file = it.world.plane.folders.run.join(format!("{}.go", it.namespace));
    let script =
        format!("echo one; until [ -e {} ]; do sleep 0.05; done; echo two; exec sleep 300", file.display());
    let mut talks = ModelDeployment::new("talks");
    talks.replicas = 1;
    talks.container = json!({ "command": ["sh", "-c", script], "args": null, "readinessProbe": null });
    it.deploy(&talks).await;
    it.apply(&json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "reader" } }))
        .await;
    it.await_node_events(NodeEventKind::Ready, 2).await;
    let name = first_event_of(&it, "talks", NodeEventKind::Started).pod;
    let pods = it.as_service_account("reader").await.namespaced::<Pod>(&it.namespace);
    let params = LogParams { follow: true, ..LogParams::default() };
    let Err(kube::Error::Api(refused)) = pods.log_stream(&name, &params).await.map(drop) else {
        panic!("it was not refused")
    };
    assert_eq!(refused.code, 403, "{refused:?}");
    for object in rights() {
        it.apply(&object).await;
    }
    // The authorizer is updated a moment later.
    let lines = wait::until("the log", wait::WAIT_LIMIT, async || {
        pods.log_stream(&name, &params).await.map_err(|error| error.to_string())
    });
    let mut lines = lines.await.lines();
    let mut next = async || wait::within("a line", wait::WAIT_LIMIT, lines.next()).await.map(Result::unwrap);
    assert_eq!(next().await.as_deref(), Some("one"));
    std::fs::write(&file, "").unwrap();
    assert_eq!(next().await.as_deref(), Some("two"));
    it.patch("apps/v1", "Deployment", "talks", &json!({ "spec": { "replicas": 0 } })).await;
    assert_eq!(next().await, None);
}

fn rights() -> [serde_json::Value; 2] {
    let name = json!({ "name": "reader" });
    let group = "rbac.authorization.k8s.io";
    [
        json!({
            "apiVersion": format!("{group}/v1"), "kind": "Role", "metadata": name,
            "rules": [{ "apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"] }],
        }),
        json!({
            "apiVersion": format!("{group}/v1"), "kind": "RoleBinding", "metadata": name,
            "roleRef": { "apiGroup": group, "kind": "Role", "name": "reader" },
            "subjects": [{ "kind": "ServiceAccount", "name": "reader" }],
        }),
    ]
}

/// Returns the first event of this kind of a pod or node whose name begins with `name`.
fn first_event_of(it: &Scenario, name: &str, what: NodeEventKind) -> NodeEvent {
    let history = it.history();
    let found = history.iter().find(|moment| moment.what == what && moment.pod.starts_with(name));
    found.unwrap_or_else(|| panic!("{what:?} of {name} is not in {history:?}")).clone()
}

fn between(from: &NodeEvent, to: &NodeEvent) -> Duration {
    to.at.duration_since(from.at).unwrap()
}

/// Truncates a time to whole seconds, like Kubernetes.
fn whole(at: SystemTime) -> SystemTime {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

/// Returns the time in an event's name.
fn named(event: &Event) -> SystemTime {
    let name = event.name_any();
    let nanos = u64::from_str_radix(name.rsplit_once('.').unwrap().1, 16).unwrap();
    SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos)
}

/// Waits for `number` events of the node about the pod of a model, and returns them.
async fn events(it: &Scenario, model: &str, number: usize) -> Vec<Event> {
    wait::until(&format!("{number} events"), wait::WAIT_LIMIT, async || {
        let mut events = it.api::<Event>().list(&ListParams::default()).await.unwrap().items;
        let of = |event: &Event| event.involved_object.name.clone().unwrap_or_default().starts_with(model);
        events.retain(|event| of(event) && event.reporting_component.as_deref() == Some("kubelet"));
        if events.len() >= number { Ok(events) } else { Err(format!("{events:?}")) }
    })
    .await
}

fn container(pod: &Pod) -> Option<ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.first().cloned()
}
