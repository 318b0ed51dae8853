//! Why a pod does not come: its status, as a kind of obstacle and a sentence.

use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStateWaiting, ContainerStatus, Pod};

use crate::domain::{ObstacleKind, Reason};

/// What is wrong with a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What it is.
    pub kind: ObstacleKind,
    /// A sentence that names the pod, the cause and, where there is one, the way out.
    pub message: Reason,
}

// === impl Trouble ===

impl Trouble {
    pub(super) fn new(kind: ObstacleKind, message: impl Into<Reason>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// The longest text of the cluster that is passed on: schedulers and registries write much.
const LONGEST: usize = 400;

/// Whether the pod has run to its end or is about to be deleted: it never becomes ready again.
pub fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_some() || matches!(phase, Some("Succeeded" | "Failed"))
}

/// What is wrong with the pod; `None`: nothing, or nothing yet.
pub fn trouble(pod: &Pod) -> Option<Trouble> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let status = pod.status.as_ref()?;
    if status.phase.as_deref() == Some("Failed") {
        return Some(rejected(name, status.reason.as_deref(), status.message.as_deref()));
    }
    let init = status.init_container_statuses.iter().flatten().map(|container| (container, "init container"));
    let main = status.container_statuses.iter().flatten().map(|container| (container, "container"));
    let container = init.chain(main).filter_map(|(container, what)| {
        of_container(container, &format!("Pod `{name}`: {what} `{}`", container.name))
    });
    container.min_by_key(|trouble| rank(trouble.kind)).or_else(|| unscheduled(pod, name))
}

/// The place of a kind among those that explain most.
pub fn rank(kind: ObstacleKind) -> usize {
    ObstacleKind::ALL.iter().position(|known| *known == kind).unwrap_or(usize::MAX)
}

/// The node or the kubelet refused it, or ended it for good.
fn rejected(name: &str, reason: Option<&str>, message: Option<&str>) -> Trouble {
    let reason = reason.unwrap_or("Failed");
    let kind = match reason {
        // The node has not what the pod was promised, such as a GPU that its device plugin has lost.
        "UnexpectedAdmissionError" | "NodeAffinity" | "NodeShutdown" | "Terminated" => {
            ObstacleKind::Unschedulable
        }
        _ if reason.starts_with("OutOf") => ObstacleKind::Unschedulable,
        _ => ObstacleKind::CrashLoop,
    };
    let message = message.map(|message| format!(": {}", shorten(message))).unwrap_or_default();
    Trouble::new(kind, format!("Pod `{name}` has failed ({reason}){message}"))
}

fn unscheduled(pod: &Pod, name: &str) -> Option<Trouble> {
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let scheduled = conditions.find(|condition| condition.type_ == "PodScheduled")?;
    if scheduled.status != "False" {
        return None;
    }
    let message = match scheduled.reason.as_deref()? {
        "Unschedulable" => {
            let why = scheduled.message.as_deref().unwrap_or("the scheduler does not say why");
            format!("No node takes pod `{name}`: {}", shorten(why))
        }
        "SchedulingGated" => format!("Pod `{name}` waits until its scheduling gates are removed"),
        _ => return None,
    };
    Some(Trouble::new(ObstacleKind::Unschedulable, message))
}

fn of_container(container: &ContainerStatus, what: &str) -> Option<Trouble> {
    let state = container.state.as_ref()?;
    let last = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    if let Some(waiting) = &state.waiting {
        return of_waiting(waiting, last, container, what);
    }
    if let Some(ended) = &state.terminated {
        return (ended.exit_code != 0).then(|| of_end(ended, container, what));
    }
    // It runs. One end may have been an accident, but not for want of memory: what it needs, it will need again.
    let last = last.filter(|_| state.running.is_some() && !container.ready)?;
    let enough = if is_out_of_memory(last) { 1 } else { 2 };
    (container.started != Some(true) && container.restart_count >= enough)
        .then(|| of_end(last, container, what))
}

fn of_waiting(
    waiting: &ContainerStateWaiting,
    last: Option<&ContainerStateTerminated>,
    container: &ContainerStatus,
    what: &str,
) -> Option<Trouble> {
    let reason = waiting.reason.as_deref()?;
    let told = waiting.message.as_deref().map(shorten).unwrap_or_default();
    let (kind, message) = match reason {
        "ErrImagePull"
        | "ImagePullBackOff"
        | "InvalidImageName"
        | "ErrImageNeverPull"
        | "ImageInspectError"
        | "RegistryUnavailable"
        | "SignatureValidationFailed" => (
            ObstacleKind::ImagePull,
            format!("{what} cannot have its image `{}` ({reason}): {told}", container.image),
        ),
        "CrashLoopBackOff" => {
            return Some(last.map_or_else(
                || Trouble::new(ObstacleKind::CrashLoop, format!("{what} ends again and again: {told}")),
                |last| of_end(last, container, what),
            ));
        }
        "CreateContainerConfigError"
        | "CreateContainerError"
        | "RunContainerError"
        | "PreCreateHookError"
        | "PostStartHookError"
        | "StartError" => (ObstacleKind::CrashLoop, format!("{what} cannot be started ({reason}): {told}")),
        // ContainerCreating, PodInitializing: on its way.
        _ => return None,
    };
    Some(Trouble::new(kind, message))
}

fn of_end(end: &ContainerStateTerminated, container: &ContainerStatus, what: &str) -> Trouble {
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
        return Trouble::new(ObstacleKind::OutOfMemory, message);
    }
    let reason = end.reason.as_deref().unwrap_or("Error");
    let lived =
        end.started_at.as_ref().zip(end.finished_at.as_ref()).map(|(from, to)| to.0.duration_since(from.0));
    let lived = lived.map(|lived| format!(" after {} s", lived.as_secs())).unwrap_or_default();
    let told = end.message.as_deref().map(|told| format!(": {}", shorten(told))).unwrap_or_default();
    // SIGTERM and SIGKILL: somebody ended it, and where it never got ready that is mostly its own probe.
    let hint = match end.exit_code {
        137 | 143 if told.is_empty() => {
            "; if its startup probe ended it, let failureThreshold × periodSeconds be longer than the load takes"
        }
        _ => "",
    };
    let code = end.exit_code;
    let text =
        |told: &str| format!("{what} ended{lived} with exit code {code} ({reason}{again}){told}{hint}");
    // The kubelet's message is what the container has printed.
    Trouble::new(ObstacleKind::CrashLoop, Reason::with_output(&text(""), &text(&told)))
}

fn is_out_of_memory(end: &ContainerStateTerminated) -> bool {
    end.reason.as_deref() == Some("OOMKilled")
}

/// One line, and not endless.
pub(super) fn shorten(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests;
