//! Statuses as kubelets and schedulers write them.

use serde_json::{Value, json};

use super::*;

fn pod(status: Value) -> Pod {
    let value = json!({
        "metadata": { "name": "chat-6f7d-x2k9p", "namespace": "team-a" },
        "spec": { "containers": [{ "name": "vllm", "startupProbe": { "httpGet": { "port": 8000 } } }] },
        "status": status,
    });
    serde_json::from_value(value).unwrap()
}

fn container(state: Value, last: Value, restarts: u32) -> Value {
    json!({
        "phase": "Running",
        "containerStatuses": [{
            "name": "vllm", "image": "vllm/vllm-openai:v0.99", "imageID": "", "ready": false, "started": false,
            "restartCount": restarts, "state": state, "lastState": last,
        }],
    })
}

fn waiting(reason: &str, message: &str) -> Value {
    json!({ "waiting": { "reason": reason, "message": message } })
}

fn ended(code: i32, reason: &str) -> Value {
    json!({ "terminated": {
        "exitCode": code, "reason": reason,
        "startedAt": "2026-11-24T20:00:00Z", "finishedAt": "2026-11-24T20:00:42Z",
    } })
}

fn running() -> Value {
    json!({ "running": { "startedAt": "2026-11-24T20:01:00Z" } })
}

fn trouble_message(status: Value, kind: ObstacleKind, words: &[&str]) {
    let trouble = trouble(&pod(status.clone())).unwrap_or_else(|| panic!("nothing is wrong with {status}"));
    assert_eq!(trouble.kind, kind, "{}", trouble.message);
    for word in words {
        assert!(trouble.message.contains(word), "{word} in: {}", trouble.message);
    }
}

#[test]
fn failed_image_pull_names_image() {
    let pull = "Back-off pulling image \"vllm/vllm-openai:v0.99\": ErrImagePull: failed to resolve reference \
                \"docker.io/vllm/vllm-openai:v0.99\": not found";
    for reason in ["ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"] {
        let status = container(waiting(reason, pull), json!({}), 0);
        trouble_message(
            status,
            ObstacleKind::ImagePull,
            &["chat-6f7d-x2k9p", "`vllm`", "v0.99", reason, "failed to resolve reference"],
        );
    }
}

#[test]
fn crash_loop_reports_last_exit() {
    let back_off = waiting("CrashLoopBackOff", "back-off 40s restarting failed container=vllm pod=chat");
    trouble_message(
        container(back_off.clone(), ended(1, "Error"), 3),
        ObstacleKind::CrashLoop,
        &["exit code 1", "after 42 s", "restarted 3 times"],
    );
    trouble_message(container(back_off.clone(), json!({}), 3), ObstacleKind::CrashLoop, &["back-off 40s"]);
    let mut last = ended(1, "Error");
    last["terminated"]["message"] = json!("CUDA error:\n no kernel image is available");
    trouble_message(
        container(back_off, last, 1),
        ObstacleKind::CrashLoop,
        &["once", "CUDA error: no kernel image"],
    );
    trouble_message(
        container(ended(2, "Error"), json!({}), 0),
        ObstacleKind::CrashLoop,
        &["exit code 2 (Error)"],
    );
    trouble_message(
        container(waiting("CreateContainerConfigError", "secret \"hf-token\" not found"), json!({}), 0),
        ObstacleKind::CrashLoop,
        &["cannot be started", "hf-token"],
    );
}

#[test]
fn startup_probe_kill_hints_at_probe() {
    let words = ["exit code 137", "startup probe", "failureThreshold"];
    trouble_message(container(running(), ended(137, "Error"), 2), ObstacleKind::CrashLoop, &words);
    trouble_message(
        container(waiting("CrashLoopBackOff", ""), ended(137, "Error"), 2),
        ObstacleKind::CrashLoop,
        &words,
    );
}

#[test]
fn oom_kill_is_out_of_memory() {
    let words = ["OOMKilled", "memory limit"];
    let back_off = waiting("CrashLoopBackOff", "back-off 10s");
    trouble_message(container(back_off, ended(137, "OOMKilled"), 1), ObstacleKind::OutOfMemory, &words);
    trouble_message(container(ended(137, "OOMKilled"), json!({}), 0), ObstacleKind::OutOfMemory, &words);
    trouble_message(container(running(), ended(137, "OOMKilled"), 1), ObstacleKind::OutOfMemory, &words);
}

#[test]
fn unschedulable_pod_reports_scheduler() {
    let scheduled = |reason: &str, message: &str| {
        json!({ "phase": "Pending", "conditions": [
            { "type": "PodScheduled", "status": "False", "reason": reason, "message": message },
        ] })
    };
    let message =
        "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available.";
    trouble_message(
        scheduled("Unschedulable", message),
        ObstacleKind::Unschedulable,
        &["chat-6f7d", "Insufficient nvidia"],
    );
    trouble_message(
        scheduled("SchedulingGated", "Scheduling is blocked"),
        ObstacleKind::Unschedulable,
        &["gates"],
    );
    let rejected = json!({
        "phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "Allocate failed: no healthy devices",
    });
    trouble_message(
        rejected,
        ObstacleKind::Unschedulable,
        &["UnexpectedAdmissionError", "no healthy devices"],
    );
    let evicted = json!({ "phase": "Failed", "reason": "Evicted", "message": "low on ephemeral-storage" });
    trouble_message(evicted, ObstacleKind::CrashLoop, &["Evicted", "ephemeral-storage"]);
}

#[test]
fn init_container_trouble_counts() {
    let status = json!({
        "phase": "Pending",
        "initContainerStatuses": [{
            "name": "fetch", "image": "fetch:1", "imageID": "", "ready": false, "restartCount": 4,
            "state": waiting("CrashLoopBackOff", "back-off"), "lastState": ended(3, "Error"),
        }],
        "containerStatuses": [{
            "name": "vllm", "image": "vllm:1", "imageID": "", "ready": false, "restartCount": 0,
            "state": waiting("PodInitializing", ""),
        }],
    });
    trouble_message(status, ObstacleKind::CrashLoop, &["init container `fetch`", "exit code 3"]);
}

#[test]
fn starting_pod_has_no_trouble() {
    let scheduled = json!({ "phase": "Pending", "conditions": [
        { "type": "PodScheduled", "status": "True" },
    ] });
    for status in [
        json!({}),
        json!({ "phase": "Pending" }),
        scheduled,
        container(waiting("ContainerCreating", ""), json!({}), 0),
        container(running(), json!({}), 0),
        // The container was restarted once, and may be healthy now.
        container(running(), ended(1, "Error"), 1),
        container(ended(0, "Completed"), json!({}), 0),
    ] {
        assert_eq!(trouble(&pod(status.clone())), None, "{status}");
    }
    let mut ready = container(running(), ended(137, "OOMKilled"), 1);
    ready["containerStatuses"][0]["ready"] = json!(true);
    assert_eq!(trouble(&pod(ready)), None, "it has come after all");
}

#[test]
fn failed_completed_and_terminating_pods_are_over() {
    let mut going = pod(json!({ "phase": "Running" }));
    assert!(!is_over(&going));
    going.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time("2026-11-24T20:00:00Z".parse().unwrap()));
    assert!(is_over(&going));
    for phase in ["Succeeded", "Failed"] {
        assert!(is_over(&pod(json!({ "phase": phase }))), "{phase}");
    }
}

#[test]
fn long_texts_are_truncated() {
    let trouble =
        trouble(&pod(container(waiting("ErrImagePull", &"é ".repeat(5000)), json!({}), 0))).unwrap();
    assert!(trouble.message.chars().count() < 600 && trouble.message.ends_with('…'), "{}", trouble.message);
}

#[test]
fn message_of_a_container_is_for_operators() {
    let mut last = ended(1, "Error");
    last["terminated"]["message"] = json!("CUDA error with HF_TOKEN=letmein");
    let trouble = trouble(&pod(container(waiting("CrashLoopBackOff", ""), last, 3))).unwrap();
    assert!(trouble.message.full().contains("CUDA error with HF_TOKEN=…"), "{}", trouble.message);
    let brief = trouble.message.brief();
    assert!(brief.contains("exit code 1 (Error, restarted 3 times)") && !brief.contains("CUDA"), "{brief}");
}
