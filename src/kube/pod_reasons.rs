//! Maps the status of a pod to an obstacle with a message.

use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStateWaiting, ContainerStatus, Pod};

use crate::domain::{ObstacleKind, Reason};

/// A problem of a pod, workload or target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeProblem {
    /// Kind of obstacle.
    pub kind: ObstacleKind,
    /// Sentence with the object, the cause and, where there is one, the remedy.
    pub message: Reason,
}

// === impl KubeProblem ===

impl KubeProblem {
    pub(super) fn new(kind: ObstacleKind, message: impl Into<Reason>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// Maximum length of texts from the cluster, in characters: schedulers and registries can be verbose.
const MAX_TEXT_CHARS: usize = 400;

/// Returns whether the pod has terminated or is terminating: it will not become ready again.
pub fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_some() || matches!(phase, Some("Succeeded" | "Failed"))
}

/// Returns the problem of the pod, if any is apparent yet.
pub fn trouble(pod: &Pod) -> Option<KubeProblem> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let status = pod.status.as_ref()?;
    if status.phase.as_deref() == Some("Failed") {
        return Some(failed_pod(name, status.reason.as_deref(), status.message.as_deref()));
    }
    let init = status.init_container_statuses.iter().flatten().map(|container| (container, "init container"));
    let main = status.container_statuses.iter().flatten().map(|container| (container, "container"));
    let container = init.chain(main).filter_map(|(container, what)| {
        container_trouble(container, &format!("Pod `{name}`: {what} `{}`", container.name))
    });
    container.min_by_key(|trouble| trouble.kind).or_else(|| unscheduled_pod(pod, name))
}

/// Describes a failed pod: rejected by the node or kubelet, or terminated permanently.
fn failed_pod(name: &str, reason: Option<&str>, message: Option<&str>) -> KubeProblem {
    let reason = reason.unwrap_or("Failed");
    let kind = match reason {
        // The node lacks a resource the pod was scheduled for, such as a GPU that its device plugin has lost.
        "UnexpectedAdmissionError" | "NodeAffinity" | "NodeShutdown" | "Terminated" => {
            ObstacleKind::Unschedulable
        }
        _ if reason.starts_with("OutOf") => ObstacleKind::Unschedulable,
        _ => ObstacleKind::CrashLoop,
    };
    let message = message.map(|message| format!(": {}", shorten(message))).unwrap_or_default();
    KubeProblem::new(kind, format!("Pod `{name}` has failed ({reason}){message}"))
}

fn unscheduled_pod(pod: &Pod, name: &str) -> Option<KubeProblem> {
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let scheduled = conditions.find(|condition| condition.type_ == "PodScheduled")?;
    if scheduled.status != "False" {
        return None;
    }
    let message = match scheduled.reason.as_deref()? {
        "Unschedulable" => {
            let why = scheduled.message.as_deref().unwrap_or("the scheduler gives no reason");
            format!("No node takes pod `{name}`: {}", shorten(why))
        }
        "SchedulingGated" => format!("Pod `{name}` waits until its scheduling gates are removed"),
        _ => return None,
    };
    Some(KubeProblem::new(ObstacleKind::Unschedulable, message))
}

fn container_trouble(container: &ContainerStatus, what: &str) -> Option<KubeProblem> {
    let state = container.state.as_ref()?;
    let last = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    if let Some(waiting) = &state.waiting {
        return waiting_trouble(waiting, last, container, what);
    }
    if let Some(terminated) = &state.terminated {
        return (terminated.exit_code != 0).then(|| exit_trouble(terminated, container, what));
    }
    // The container runs again. A single exit may be an accident, except out-of-memory, which will recur.
    let last = last.filter(|_| state.running.is_some() && !container.ready)?;
    let enough = if is_out_of_memory(last) { 1 } else { 2 };
    (container.started != Some(true) && container.restart_count >= enough)
        .then(|| exit_trouble(last, container, what))
}

fn waiting_trouble(
    waiting: &ContainerStateWaiting,
    last: Option<&ContainerStateTerminated>,
    container: &ContainerStatus,
    what: &str,
) -> Option<KubeProblem> {
    let reason = waiting.reason.as_deref()?;
    let detail = waiting.message.as_deref().map(shorten).unwrap_or_default();
    let (kind, message) = match reason {
        "ErrImagePull"
        | "ImagePullBackOff"
        | "InvalidImageName"
        | "ErrImageNeverPull"
        | "ImageInspectError"
        | "RegistryUnavailable"
        | "SignatureValidationFailed" => (
            ObstacleKind::ImagePull,
            format!("{what} cannot have its image `{}` ({reason}): {detail}", container.image),
        ),
        "CrashLoopBackOff" => {
            return Some(last.map_or_else(
                || {
                    KubeProblem::new(
                        ObstacleKind::CrashLoop,
                        format!("{what} ends again and again: {detail}"),
                    )
                },
                |last| exit_trouble(last, container, what),
            ));
        }
        "CreateContainerConfigError"
        | "CreateContainerError"
        | "RunContainerError"
        | "PreCreateHookError"
        | "PostStartHookError"
        | "StartError" => (ObstacleKind::CrashLoop, format!("{what} cannot be started ({reason}): {detail}")),
        // ContainerCreating and PodInitializing are normal.
        _ => return None,
    };
    Some(KubeProblem::new(kind, message))
}

fn exit_trouble(end: &ContainerStateTerminated, container: &ContainerStatus, what: &str) -> KubeProblem {
    let times = container.restart_count;
    let again = match times {
        0 => String::new(),
        1 => ", restarted once".into(),
        _ => format!(", restarted {times} times"),
    };
    if is_out_of_memory(end) {
        let message = format!(
            "{what} was ended for want of memory (OOMKilled{again}): raise its memory limit, or load less at once"
        );
        return KubeProblem::new(ObstacleKind::OutOfMemory, message);
    }
    let reason = end.reason.as_deref().unwrap_or("Error");
    let lived =
        end.started_at.as_ref().zip(end.finished_at.as_ref()).map(|(from, to)| to.0.duration_since(from.0));
    let lived = lived.map(|lived| format!(" after {} s", lived.as_secs())).unwrap_or_default();
    let detail = end.message.as_deref().map(|detail| format!(": {}", shorten(detail))).unwrap_or_default();
    // SIGTERM or SIGKILL. A container that never became ready was most likely killed by its own probe.
    let hint = match end.exit_code {
        137 | 143 if detail.is_empty() => {
            "; if its startup probe ended it, let failureThreshold × periodSeconds be longer than the load takes"
        }
        _ => "",
    };
    let code = end.exit_code;
    let text =
        |detail: &str| format!("{what} ended{lived} with exit code {code} ({reason}{again}){detail}{hint}");
    // The message in a terminated state is output of the container.
    KubeProblem::new(ObstacleKind::CrashLoop, Reason::with_output(&text(""), &text(&detail)))
}

fn is_out_of_memory(end: &ContainerStateTerminated) -> bool {
    end.reason.as_deref() == Some("OOMKilled")
}

/// Collapses whitespace and truncates to [`MAX_TEXT_CHARS`].
pub(super) fn shorten(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_TEXT_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests;
