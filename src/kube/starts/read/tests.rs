//! Pods and Events as API server, scheduler and kubelet write them.

use serde_json::{Value, json};

use super::*;

fn pod(status: Value) -> Pod {
    let value = json!({
        "metadata": { "name": "chat-x2k9p", "namespace": "team-a", "uid": "u-1", "creationTimestamp": "2026-11-24T20:00:00Z" },
        "spec": {
            "nodeName": "gpu-1",
            "initContainers": [
                { "name": "fetch", "image": "fetch:1" },
                { "name": "proxy", "image": "proxy:1", "restartPolicy": "Always" },
            ],
            "containers": [
                { "name": "metrics", "image": "metrics:1", "ports": [{ "containerPort": 9000 }] },
                { "name": "vllm", "image": "vllm:1", "ports": [{ "containerPort": 8000 }] },
                { "name": "logs", "image": "logs:1" },
            ],
        },
        "status": status,
    });
    serde_json::from_value(value).unwrap()
}

fn condition(kind: &str, status: &str, second: u32) -> Value {
    json!({ "type": kind, "status": status, "lastTransitionTime": format!("2026-11-24T20:00:{second:02}Z") })
}

fn container(name: &str, ready: bool, state: Value, last: Value) -> Value {
    json!({ "name": name, "image": "x", "imageID": "", "ready": ready, "restartCount": 0, "state": state, "lastState": last })
}

fn running(second: u32) -> Value {
    json!({ "running": { "startedAt": format!("2026-11-24T20:00:{second:02}Z") } })
}

/// Returns each phase with the clock, second and resolution of its stamp.
fn phases_with_stamps(pod: &Pod) -> Vec<(&'static str, String)> {
    let phases = phases(pod, Some("vllm"), Instant::now());
    let told = phases.iter().map(|(phase, seen)| {
        assert_eq!(seen.at, Instant::now());
        let stamp = seen.stamp.as_ref().map_or("-".into(), |stamp| {
            let at = Timestamp::try_from(stamp.time).unwrap().as_second() - 1_795_550_400;
            format!("{} {at} +{}", stamp.clock, stamp.resolution.as_secs())
        });
        (phase.name(), stamp)
    });
    told.collect()
}

fn list(told: &[(&'static str, String)]) -> Vec<String> {
    told.iter().map(|(phase, stamp)| format!("{phase} {stamp}")).collect()
}

#[tokio::test(start_paused = true)]
async fn pod_phases_carry_the_reporting_clock() {
    let mut new = pod(json!({ "phase": "Pending" }));
    new.spec.as_mut().unwrap().node_name = None;
    assert_eq!(list(&phases_with_stamps(&new)), ["create control-plane 0 +1"]);
    let bound = pod(json!({ "conditions": [condition("PodScheduled", "True", 1)] }));
    assert_eq!(
        list(&phases_with_stamps(&bound)),
        ["create control-plane 0 +1", "schedule control-plane 1 +1"]
    );
    let loading = pod(json!({
        "conditions": [condition("PodScheduled", "True", 1), condition("Ready", "False", 2),
            condition("ContainersReady", "False", 2)],
        "containerStatuses": [
            container("metrics", true, running(3), json!({})),
            container("vllm", false, running(7), json!({})),
        ],
    }));
    assert_eq!(list(&phases_with_stamps(&loading))[2..], ["start gpu-1 7 +1"]);
    // Another container of the pod is not ready yet.
    let serves = pod(json!({
        "conditions": [condition("Ready", "False", 2), condition("ContainersReady", "False", 2)],
        "containerStatuses": [container("vllm", true, running(7), json!({}))],
    }));
    assert_eq!(list(&phases_with_stamps(&serves))[2..], ["start gpu-1 7 +1", "load -"]);
    let ready = pod(json!({
        "conditions": [condition("Ready", "True", 40), condition("ContainersReady", "True", 39)],
        "containerStatuses": [container("vllm", true, running(7), json!({}))],
    }));
    let known = list(&phases_with_stamps(&ready));
    assert_eq!(known[1..], ["schedule -", "start gpu-1 7 +1", "load gpu-1 39 +1"]);
}

#[tokio::test(start_paused = true)]
async fn first_container_start_counts_after_restarts() {
    let ended = |second: u32| json!({ "terminated": { "exitCode": 1, "startedAt": format!("2026-11-24T20:00:{second:02}Z"), "finishedAt": "2026-11-24T20:00:50Z" } });
    let waiting = json!({ "waiting": { "reason": "CrashLoopBackOff" } });
    for (state, last, start) in [
        (running(20), ended(7), Some("start gpu-1 7 +1")),
        (waiting.clone(), ended(7), Some("start gpu-1 7 +1")),
        (ended(9), json!({}), Some("start gpu-1 9 +1")),
        (waiting, json!({}), None),
    ] {
        let pod = pod(json!({ "containerStatuses": [container("vllm", false, state.clone(), last)] }));
        assert_eq!(list(&phases_with_stamps(&pod)).get(2).map(|told| &**told), start, "{state}");
    }
}

#[test]
fn serving_container_has_port_or_is_first() {
    let mut pod = pod(json!({}));
    assert_eq!(serving_container(&pod, &[8000]), Some("vllm"));
    assert_eq!(serving_container(&pod, &[1, 9000]), Some("metrics"));
    assert_eq!(serving_container(&pod, &[1]), Some("metrics"), "ports need not be declared");
    pod.spec = None;
    assert_eq!(serving_container(&pod, &[8000]), None);
}

#[test]
fn unschedulable_pod_awaits_node() {
    let waits = |condition: Value, node: Option<&str>| {
        let mut pod = pod(json!({ "conditions": [condition] }));
        pod.spec.as_mut().unwrap().node_name = node.map(Into::into);
        waits_for_a_node(&pod)
    };
    let mut unschedulable = condition("PodScheduled", "False", 0);
    unschedulable["reason"] = "Unschedulable".into();
    assert!(waits(unschedulable.clone(), None));
    assert!(!waits(unschedulable.clone(), Some("gpu-1")));
    unschedulable["reason"] = "SchedulingGated".into();
    assert!(!waits(unschedulable, None));
    assert!(!waits(condition("PodScheduled", "True", 0), None));
}

// === images ===

fn event(reason: &str, path: &str, message: &str, second: u32) -> Event {
    let time = format!("2026-11-24T20:00:{second:02}Z");
    serde_json::from_value(json!({
        "metadata": { "name": "chat.1", "namespace": "team-a" },
        "involvedObject": { "kind": "Pod", "name": "chat-x2k9p", "uid": "u-1", "fieldPath": path },
        "type": "Normal", "reason": reason, "message": message, "count": 1,
        "firstTimestamp": time, "lastTimestamp": time,
        "source": { "component": "kubelet", "host": "gpu-1" },
    }))
    .unwrap()
}

const PULLED: &str =
    "Successfully pulled image \"vllm:1\" in 41.2s (43.5s including waiting). Image size: 9876543 bytes.";
const PRESENT: &str = "Container image \"vllm:1\" already present on machine and can be accessed by the pod";

/// Applies the Events. Returns the second at which the last image was pulled, and whether a pull is in progress.
fn pull_state_after(events: &[Event]) -> (Option<i64>, bool) {
    let pod = pod(json!({}));
    let mut told = KubeletEvents::default();
    events.iter().for_each(|event| told.event(event, &pod, Some("vllm"), Instant::now()));
    let second = told.pulled.as_ref().map(|seen| {
        let stamp = seen.stamp.as_ref().unwrap();
        assert_eq!(&*stamp.clock, "gpu-1");
        Timestamp::try_from(stamp.time).unwrap().as_second() - 1_795_550_400
    });
    (second, told.is_pulling())
}

#[tokio::test(start_paused = true)]
async fn only_real_image_pulls_are_recorded() {
    let main = "spec.containers{vllm}";
    let running = event("Pulling", main, "Pulling image \"vllm:1\"", 2);
    assert_eq!(pull_state_after(std::slice::from_ref(&running)), (None, true));
    assert_eq!(pull_state_after(&[running.clone(), event("Pulled", main, PULLED, 43)]), (Some(43), false));
    assert_eq!(pull_state_after(&[event("Pulled", main, PRESENT, 2)]), (None, false));
    let failed = event("Failed", main, "Failed to pull image \"vllm:1\": not found", 3);
    assert_eq!(pull_state_after(&[running.clone(), failed]), (None, true), "it is tried again");
    let others =
        [event("Scheduled", "", "Successfully assigned", 1), event("Created", main, "Created container", 44)];
    assert_eq!(pull_state_after(&others), (None, false));
    // A pull after the container start does not count.
    let again = [event("Pulled", main, PULLED, 43), running, event("Pulled", main, PULLED, 59)];
    assert_eq!(
        pull_state_after(&again),
        (Some(43), false),
        "what comes after the first start is no more its way there"
    );
}

#[tokio::test(start_paused = true)]
async fn last_image_up_to_serving_container_counts() {
    let pulled = |path: &str, second: u32| event("Pulled", path, PULLED, second);
    let main = pulled("spec.containers{vllm}", 30);
    assert_eq!(pull_state_after(&[pulled("spec.initContainers{fetch}", 5), main.clone()]), (Some(30), false));
    assert_eq!(
        pull_state_after(&[
            pulled("spec.initContainers{fetch}", 5),
            event("Pulled", "spec.containers{vllm}", PRESENT, 6)
        ])
        .0,
        Some(5)
    );
    assert_eq!(pull_state_after(&[pulled("spec.containers{metrics}", 7)]).0, Some(7));
    assert_eq!(pull_state_after(&[main, pulled("spec.containers{logs}", 50)]).0, Some(30));
    let unknown = event("Pulling", "spec.containers{logs}", "Pulling image", 8);
    assert_eq!(pull_state_after(&[unknown]), (None, false));
    assert_eq!(pull_state_after(&[pulled("", 9)]).0, Some(9), "an agent that does not say for which");
}

#[tokio::test(start_paused = true)]
async fn serving_container_start_is_recorded_once() {
    let started = |events: &[(&str, u32)]| {
        let pod = pod(json!({}));
        let mut told = KubeletEvents::default();
        for (path, second) in events {
            told.event(
                &event("Started", path, "Container started", *second),
                &pod,
                Some("vllm"),
                Instant::now(),
            );
        }
        let stamp = told.started.and_then(|seen| seen.stamp);
        stamp.map(|stamp| Timestamp::try_from(stamp.time).unwrap().as_second() - 1_795_550_400)
    };
    let (fetch, main, logs) =
        ("spec.initContainers{fetch}", "spec.containers{vllm}", "spec.containers{logs}");
    assert_eq!(started(&[(fetch, 3), (logs, 4)]), None);
    assert_eq!(started(&[(fetch, 3), (main, 9), (logs, 10), (main, 40)]), Some(9));
    assert_eq!(started(&[("", 5)]), Some(5));
}

fn warned(events: &[(&str, &str)]) -> KubeletEvents {
    let mut told = KubeletEvents::default();
    for (reason, message) in events {
        told.event(&event(reason, "", message, 1), &pod(json!({})), Some("vllm"), Instant::now());
    }
    told
}

#[tokio::test(start_paused = true)]
async fn mount_failure_warns_until_mounted() {
    let missing = "MountVolume.SetUp failed for volume \"models\" : configmap \"models\" not found";
    for reason in ["FailedMount", "FailedAttachVolume", "FailedMapVolume"] {
        let told = warned(&[("Scheduled", "assigned"), (reason, missing)]);
        let warning = told.warning(false, false).unwrap();
        assert_eq!((warning.kind, warning.from), (ObstacleKind::Volume, Instant::now()));
        for words in ["`chat-x2k9p`", reason, "configmap \"models\" not found"] {
            assert!(warning.message.contains(words), "{words} in: {}", warning.message);
        }
        assert_eq!(told.warning(true, false), None, "an event of before the container ran, heard once more");
    }
    for over in ["SuccessfulAttachVolume", "Pulling", "Started"] {
        assert_eq!(warned(&[("FailedMount", missing), (over, "")]).warning(false, false), None, "{over}");
    }
    let sandbox = warned(&[("FailedCreatePodSandBox", "plugin type=\"calico\" failed")]);
    let warning = sandbox.warning(false, false).unwrap();
    assert_eq!(
        (warning.kind, warning.from),
        (ObstacleKind::NotReady, Instant::now() + Duration::from_secs(20))
    );
}

#[tokio::test(start_paused = true)]
async fn probe_client_error_warns_at_once() {
    let failed = |why: &str| format!("Readiness probe failed: {why}");
    for (why, after) in [
        ("HTTP probe failed with statuscode: 404", 0),
        ("HTTP probe failed with statuscode: 401", 0),
        ("HTTP probe failed with statuscode: 503", 120),
        ("HTTP probe failed with statuscode: 429", 120),
        ("Get \"http://10.0.0.1:8000/health\": dial tcp 10.0.0.1:8000: connect: connection refused", 120),
        ("command \"/ready\" timed out", 120),
    ] {
        let told = warned(&[("Started", ""), ("Unhealthy", &failed(why))]);
        let warning = told.warning(true, false).unwrap();
        assert_eq!(
            (warning.kind, warning.from),
            (ObstacleKind::NotReady, Instant::now() + Duration::from_secs(after))
        );
        assert!(warning.message.contains(why), "{}", warning.message);
        assert_eq!((told.warning(false, false), told.warning(true, true)), (None, None));
    }
    let mut told = warned(&[("Unhealthy", &failed("connection refused"))]);
    let began = Instant::now();
    tokio::time::advance(Duration::from_secs(60)).await;
    let again = event("Unhealthy", "", &failed("HTTP probe failed with statuscode: 503"), 1);
    told.event(&again, &pod(json!({})), Some("vllm"), Instant::now());
    let warning = told.warning(true, false).unwrap();
    assert_eq!(warning.from, began + Duration::from_secs(120), "it counts from the first of them");
    assert!(warning.message.ends_with("503"), "and the last one is told: {}", warning.message);
}
