//! Accuracy of cold-start records: the end of each phase is compared with the time at which the node's agent actually
//! ended it.
//!
//! Checks follow causality: a phase cannot be observed before it ended, so it must not be recorded too early, and if
//! the record states that the end may have been earlier, it must not have been earlier than that. [`MAX_WATCH_DELAY`] is the
//! maximum delay: watches deliver within milliseconds on an otherwise idle machine.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde_json::{Value, json};

use crate::{
    anteroom::AnteroomReplica,
    cloud::NodeTemplate,
    envoy::Envoy,
    model::{ModelDeployment, ScaledObjectManifest},
    node::{clock::NodeClock, fate, history::NodeEventKind},
    record::{Record, TimeRange},
    routes::model_route,
    scenario::Scenario,
    serving::ReplicaChanges,
    wait,
};

/// Maximum delay of an event seen by a watch. Polling would be several seconds late.
const MAX_WATCH_DELAY: Duration = Duration::from_secs(3);
/// Maximum delay with which the agent notes that a server listens: it reads the server's output.
const MAX_OUTPUT_DELAY: Duration = Duration::from_secs(1);
/// Time for which this module's node does not report a running container.
const RUNNING_REPORT_DELAY: Duration = Duration::from_millis(700);

/// A client's observations of its cold start.
struct ClientObservations {
    asked: SystemTime,
    first_token: SystemTime,
    server_timing: String,
    request_id: String,
    /// Pods during the response; they may be deleted afterwards.
    pods: Vec<Pod>,
}

pub(super) async fn every_phase_matches_the_history(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.serve(&anteroom, &model(), json!({})).await;
    let replicas = it.replicas("tiny").await;
    let client = ClientObservations::ask(&it, replica).await;
    let record = record(&it, replica).await;
    assert_record_matches_history(&it, &record, &client, &replicas).await;

    // The numbers are the same everywhere: in an Event, in the route's status, and in the response.
    println!("  {}\n  {}", record.value, client.server_timing);
    let note = it.await_route_event("tiny", "Normal", "ColdStartCompleted").await;
    for span in &record.spans {
        let says = format!("{} {}", span.name, in_words(span.duration));
        assert!(note.contains(&says), "{says:?} is not in {note}");
    }
    assert!(note.contains(record.value["pod"].as_str().unwrap()), "{note}");
    let routes = it.dynamic("anteroom.dev/v1alpha1", "ModelRoute");
    let status = wait::object(&routes, "tiny", "its last cold start", wait::WAIT_LIMIT, |route| {
        route?.data.pointer("/status/lastColdStart").cloned()
    })
    .await;
    let phases =
        record.spans.iter().map(|span| json!({ "name": span.name, "duration": in_words(span.duration) }));
    assert_eq!(status["phases"], phases.collect::<Value>());
    assert_eq!(status["duration"], in_words(record.total()));
    assert_eq!(status["actuation"], in_words(record.value["t_actuation_ms"].as_f64().unwrap()));
    for (theirs, ours) in
        [("startedAt", "started_at"), ("pod", "pod"), ("node", "node"), ("outcome", "outcome")]
    {
        assert_eq!(status[theirs], record.value[ours], "{status}");
    }
    assert_eq!(record.value["request_id"], client.request_id);
    for span in
        record.spans.iter().filter(|span| !["dispatch", "first_byte", "first_token"].contains(&&*span.name))
    {
        let entry =
            client.timing(&span.name).unwrap_or_else(|| panic!("{} of {}", span.name, client.server_timing));
        // The header has one decimal digit.
        assert!(
            (entry - span.duration).abs() < 0.2,
            "{}: {} {}",
            span.name,
            client.server_timing,
            record.value
        );
    }
}

/// Formats a duration as in the cluster's objects.
fn in_words(ms: f64) -> String {
    if ms < 999.5 { format!("{ms:.0}ms") } else { format!("{:.1}s", ms / 1e3) }
}

pub(super) async fn record_is_accurate_without_keda(it: Scenario) {
    let anteroom = it.anteroom_with(1, json!({}), &["directScaling.enabled=true"]).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.deploy(&model()).await;
    let spec = json!({ "scaleBy": "kubernetes", "workload": { "kind": "Deployment", "name": "tiny" } });
    it.apply(&model_route("tiny", spec)).await;
    it.await_route_condition("tiny", "Scalable", "Direct").await;
    let replicas = it.replicas("tiny").await;
    let client = ClientObservations::ask(&it, replica).await;
    assert_record_matches_history(&it, &record(&it, replica).await, &client, &replicas).await;
}

pub(super) async fn fast_clock_of_new_node_is_part_of_the_wait(it: Scenario) {
    waits_for_a_node(it, NodeClock::Ahead(Duration::from_secs(3))).await;
}

pub(super) async fn slow_clock_of_new_node_is_part_of_the_wait(it: Scenario) {
    waits_for_a_node(it, NodeClock::Behind(Duration::from_secs(3))).await;
}

async fn waits_for_a_node(it: Scenario, clock: NodeClock) {
    // Nodes are visible only with rights for the whole cluster.
    let anteroom = it.anteroom_with(1, json!({}), &["kubernetes.namespaces=null"]).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let mut model = model();
    model.node_selector = it.pool();
    it.serve(&anteroom, &model, json!({})).await;
    let replicas = it.replicas("tiny").await;
    let boot = Duration::from_millis(1500);
    let cloud = it.cloud(Duration::from_secs(1), NodeTemplate { boot, clock, ..it.machine() });
    let client = ClientObservations::ask(&it, replica).await;
    let record = record(&it, replica).await;
    let node = cloud.node().await;
    println!("  {}", record.value);
    assert_record_matches_history(&it, &record, &client, &replicas).await;
    assert_eq!(record.value["node"], node.name);
    let [registers, registered, ready] =
        [NodeEventKind::Registers, NodeEventKind::Registered, NodeEventKind::NodeReady]
            .map(|what| it.history().iter().find(|moment| moment.what == what).unwrap().at);
    record.assert_part_end("schedule", "node_create", TimeRange(registers, registered), MAX_WATCH_DELAY);
    record.assert_part_end("schedule", "node_ready", ready, MAX_WATCH_DELAY);
    it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
    it.await_node_events(NodeEventKind::Gone, 1).await;
    node.leave(&it.kube).await;
}

pub(super) async fn gateway_delay_is_a_phase(it: Scenario) {
    let number = 40;
    let config = json!({ "kubernetes": { "allowedHosts": [it.address(number).to_string()] } });
    let anteroom = it.anteroom(1, config).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let envoy = Envoy::start(&it, number, "tiny").await;
    let target = json!({
        "service": { "name": "tiny", "port": 80 },
        "gateway": format!("http://{}", envoy.address),
    });
    let mut model = model();
    // When the server is ready, the kubelet's next probe is seconds away.
    model.probe_period = 5;
    it.serve(&anteroom, &model, json!({ "target": target })).await;
    let replicas = it.replicas("tiny").await;
    let client = ClientObservations::ask(&it, replica).await;
    let record = record(&it, replica).await;
    println!("  {}", record.value);
    assert_record_matches_history(&it, &record, &client, &replicas).await;
    // The gateway uses addresses that the kubelet found ready; Anteroom's probe is faster.
    let ready = it.await_node_events(NodeEventKind::Ready, 1).await[0].at;
    assert!(record.end("load") < ready, "{} {ready:?}", record.value);
    assert!(record.end("propagate") > ready, "{} {ready:?}", record.value);
}

pub(super) async fn failed_start_records_completed_phases(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let model =
        model().play(fate::FAILURE_ANNOTATION, "image-pull-back-off").play(fate::BACKOFF_ANNOTATION, "200ms");
    // The pod must still exist afterwards.
    let spec = json!({ "failureGrace": { "imagePull": "1s" }, "scaling": { "linger": "60s" } });
    it.serve(&anteroom, &model, spec).await;
    let replicas = it.replicas("tiny").await;
    let asked = SystemTime::now();
    let answer = wait::within("the answer", wait::WAIT_LIMIT, replica.ask("tiny", true)).await.unwrap();
    assert_eq!(answer.status, 503);
    let answered = SystemTime::now();
    let record = record(&it, replica).await;
    println!("  {}", record.value);
    assert_eq!(record.value["outcome"], "failed");
    let reason = record.value["reason"].as_str().unwrap();
    assert!(reason.contains("container `server` cannot have its image `anteroom`"), "{reason}");
    assert_eq!(record.ended_phase_names(), ["signal", "scale", "create", "schedule"], "{}", record.value);
    assert_scheduling_phases(&it, &record, &replicas, asked, &it.pods().await).await;
    let last = record.spans.last().unwrap();
    assert_eq!((last.name.as_str(), last.unfinished), ("pull", true), "{}", record.value);
    // The last phase lasts until the failure that the client received.
    let given_up = record.began + Duration::from_secs_f64(record.total() / 1e3);
    assert!(given_up <= answered && answered <= given_up + MAX_WATCH_DELAY, "{}", record.value);
    for missing in ["t_actuation_ms", "t_first_token_ms", "t_e2e_ms"] {
        assert!(record.value.get(missing).is_none_or(Value::is_null), "{missing}: {}", record.value);
    }
}

pub(super) async fn record_of_two_pods_is_of_the_first_to_respond(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    // The first pod runs last.
    let model = model()
        .play(fate::PULL_DELAY_ANNOTATION, "300ms,600ms")
        .play(fate::START_DELAY_ANNOTATION, "4s,400ms");
    let mut scaled = ScaledObjectManifest::of(&model, &anteroom);
    scaled.min = 2;
    it.serve_scaled(&anteroom, &model, json!({}), &scaled).await;
    let replicas = it.replicas("tiny").await;
    let client = ClientObservations::ask(&it, replica).await;
    let record = record(&it, replica).await;
    println!("  {}", record.value);
    assert_eq!(replicas.value_history()[..2], [0, 2]);
    assert_record_matches_history(&it, &record, &client, &replicas).await;
    it.await_node_events(NodeEventKind::Started, 2).await;
    let started = it.history().into_iter().filter(|moment| moment.what == NodeEventKind::Started);
    assert_eq!(started.count(), 2, "the other one comes later: {:?}", it.history());
}

pub(super) async fn readable_logs_split_the_load_phase(it: Scenario) {
    let config = json!({ "kubernetes": { "podLogs": true } });
    let anteroom = it.anteroom_with(1, config, &["report.podLogs=true"]).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    // The pod's log is read afterwards.
    it.serve(&anteroom, &model(), json!({ "scaling": { "linger": "60s" } })).await;
    let replicas = it.replicas("tiny").await;
    let client = ClientObservations::ask(&it, replica).await;
    let record = record(&it, replica).await;
    println!("  {}", record.value);
    assert_record_matches_history(&it, &record, &client, &replicas).await;

    let pod = it.history()[0].pod.clone();
    let log = it.shell().kubectl(&format!("logs --timestamps {pod}")).await.stdout_of_success();
    // Returns the time at which a line was printed, and the number that follows these words.
    let line = |words: &str| {
        let line = log.lines().find(|line| line.contains(words)).unwrap_or_else(|| panic!("{words}: {log}"));
        let number = line.split_once(words).unwrap().1.split_whitespace().next().unwrap();
        let at = humantime::parse_rfc3339(line.split_once(' ').unwrap().0).unwrap();
        (at, number.parse::<f64>().unwrap_or_default())
    };
    for (part, words) in [("weights", "Loading weights took "), ("compile", "torch.compile took ")] {
        let (at, seconds) = line(words);
        record.assert_part_end("load", part, at, MAX_WATCH_DELAY);
        let took = record.span("load").part(part).duration / 1e3;
        // The log has two decimal digits and is a few milliseconds late.
        assert!(
            (took - seconds).abs() < 0.25,
            "{part} took {took}, and its log says {seconds}: {}",
            record.value
        );
    }
}

/// Model with a noticeable duration of every phase.
fn model() -> ModelDeployment {
    let model = ModelDeployment::new("tiny").sim("--load-time 2s --time-to-first-token 300ms");
    let silent = humantime::format_duration(RUNNING_REPORT_DELAY).to_string();
    model
        .play(fate::PULL_DELAY_ANNOTATION, "1200ms")
        .play(fate::START_DELAY_ANNOTATION, "400ms")
        .play(fate::REPORT_DELAY_ANNOTATION, &silent)
}

/// Returns the only record of the route, checked for consistency.
async fn record(it: &Scenario, replica: &AnteroomReplica) -> Record {
    let records = wait::until("the record", wait::WAIT_LIMIT, async || {
        let records = replica.cold_starts(it, "tiny").await;
        if records.len() == 1 { Ok(records) } else { Err(format!("{records:?}")) }
    });
    Record::read(records.await.remove(0))
}

/// Asserts that a record of a cold start with all phases matches the actual events.
async fn assert_record_matches_history(
    it: &Scenario,
    record: &Record,
    client: &ClientObservations,
    replicas: &ReplicaChanges,
) {
    let name = assert_scheduling_phases(it, record, replicas, client.asked, &client.pods).await;
    let value = &record.value;
    assert_eq!(value["outcome"], "completed", "{value}");
    let activation = ["signal", "scale", "create", "schedule", "pull", "start", "load"];
    let answer = ["dispatch", "first_byte", "first_token"];
    let mut over = record.ended_phase_names();
    over.retain(|phase| *phase != "propagate");
    assert_eq!(over, [activation.as_slice(), &answer].concat(), "{value}");

    let history = it.history();
    let moment = |what: NodeEventKind| {
        let found = history.iter().find(|moment| moment.what == what && moment.pod == name);
        found.unwrap_or_else(|| panic!("no {what:?} of {name} in {history:?}")).at
    };
    record.assert_phase_end("pull", moment(NodeEventKind::Pulled), MAX_WATCH_DELAY);
    record.assert_phase_end("start", moment(NodeEventKind::Started), RUNNING_REPORT_DELAY + MAX_WATCH_DELAY);
    let answers = moment(NodeEventKind::Answers);
    record.assert_phase_end("load", TimeRange(answers - MAX_OUTPUT_DELAY, answers), MAX_WATCH_DELAY);
    // The simulated duration is a lower bound for the recorded one, within the record's uncertainty.
    let sure = |from: &str, to: &str, least: u64| {
        let (from, to) = (record.span(from), record.span(to));
        let most = to.end() - (from.end() - from.early.unwrap_or_default());
        assert!(most + 2.0 >= least as f64, "{} is {most} after {}: {value}", to.name, from.name);
    };
    sure("pull", "start", 400);
    sure("start", "load", 2000);
    assert!(record.span("first_token").end() - record.span("dispatch").end() >= 300.0 - 2.0, "{value}");
    let told = record.end("first_token");
    assert!(told <= client.first_token + Duration::from_millis(2), "{value}");
    assert!(client.first_token <= told + MAX_WATCH_DELAY, "{value}");

    let number = |key: &str| value[key].as_f64().unwrap_or_else(|| panic!("no {key} in {value}"));
    let ready =
        over_at(record, if record.ended_phase_names().contains(&"propagate") { "propagate" } else { "load" });
    assert!((number("t_actuation_ms") - ready).abs() < 0.001, "{value}");
    assert!((number("t_e2e_ms") - over_at(record, "first_token")).abs() < 0.001, "{value}");
    assert!(
        (number("t_actuation_ms") + number("t_first_token_ms") - number("t_e2e_ms")).abs() < 0.001,
        "{value}"
    );
}

fn over_at(record: &Record, phase: &str) -> f64 {
    record.span(phase).end()
}

/// Asserts that the phases up to the scheduling match the control plane's. Returns the pod's name.
async fn assert_scheduling_phases(
    it: &Scenario,
    record: &Record,
    replicas: &ReplicaChanges,
    asked: SystemTime,
    pods: &[Pod],
) -> String {
    let value = &record.value;
    let began = record.began;
    assert!(
        asked <= began + Duration::from_millis(2) && began <= asked + MAX_WATCH_DELAY,
        "{asked:?}: {value}"
    );
    let name = value["pod"].as_str().unwrap_or_else(|| panic!("no pod in {value}"));
    let (namespace, name) = name.split_once('/').unwrap();
    assert_eq!(namespace, it.namespace);
    let pod = pods.iter().find(|pod| pod.name_any() == name).unwrap();
    assert_eq!(value["node"].as_str(), pod.spec.as_ref().unwrap().node_name.as_deref(), "{value}");
    let bound =
        it.history().into_iter().find(|moment| moment.what == NodeEventKind::Bound && moment.pod == name);
    let bound = bound.unwrap().at;

    // The push was the cause, and the watch of this test shows the result later.
    let seen = replicas.await_nonzero(asked).await;
    record.assert_phase_end("scale", TimeRange(record.end("signal"), seen), MAX_WATCH_DELAY);
    let created = SystemTime::from(pod.creation_timestamp().unwrap().0);
    record.assert_phase_end("create", TimeRange::written(created, bound), MAX_WATCH_DELAY);
    let conditions = pod.status.as_ref().unwrap().conditions.as_ref().unwrap();
    let scheduled = conditions.iter().find(|condition| condition.type_ == "PodScheduled").unwrap();
    let stamp = SystemTime::from(scheduled.last_transition_time.as_ref().unwrap().0);
    record.assert_phase_end("schedule", TimeRange::written(stamp, bound), MAX_WATCH_DELAY);
    name.to_owned()
}

// === impl ClientObservations ===

impl ClientObservations {
    /// Returns the duration of a phase in the response's `server-timing`.
    fn timing(&self, phase: &str) -> Option<f64> {
        let mut entries = self.server_timing.split(", ").filter_map(|entry| entry.split_once(";dur="));
        entries.find(|(name, _)| *name == phase)?.1.parse().ok()
    }

    /// Requests a stream, and reads it to its end.
    async fn ask(it: &Scenario, replica: &AnteroomReplica) -> Self {
        let asked = SystemTime::now();
        let mut answer =
            wait::within("the answer", wait::WAIT_LIMIT, replica.ask("tiny", true)).await.unwrap();
        assert_eq!(answer.status, 200);
        let header = |name: &str| {
            let values = answer.headers.get_all(name).iter();
            values.filter_map(|value| value.to_str().ok()).collect::<Vec<_>>().join(", ")
        };
        let (server_timing, request_id) = (header("server-timing"), header("x-request-id"));
        let mut text = String::new();
        // The first part only has the role, without content.
        let speaks = |text: &str| text.split("\"content\":\"").skip(1).any(|words| !words.starts_with('"'));
        while !speaks(&text) {
            let part = wait::within("a part", wait::WAIT_LIMIT, answer.next()).await.unwrap();
            text += &String::from_utf8_lossy(&part.unwrap_or_else(|| panic!("it ended: {text}")));
        }
        let first_token = SystemTime::now();
        let pods = it.pods().await;
        text += &wait::within("the rest", wait::WAIT_LIMIT, answer.text()).await.unwrap();
        assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
        Self { asked, first_token, server_timing, request_id, pods }
    }
}
