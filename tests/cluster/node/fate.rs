//! Behaviour that the node simulates according to annotations of a pod, since it would require hardware or a registry.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

/// Duration of the image pull, such as `2s`. By default the image is present.
pub(crate) const PULL_DELAY_ANNOTATION: &str = "test.anteroom.dev/pull";
/// Duration from the pulled image to the start of the process; 0 by default.
pub(crate) const START_DELAY_ANNOTATION: &str = "test.anteroom.dev/start";
/// Delay before the node reports a running container: 0 by default; up to 1 s with the kubelet, which checks that
/// often.
pub(crate) const REPORT_DELAY_ANNOTATION: &str = "test.anteroom.dev/lag";
/// Failure of the pod: one of [`PodFailure`], such as `image-pull-back-off`.
pub(crate) const FAILURE_ANNOTATION: &str = "test.anteroom.dev/fate";
/// First back-off, which then doubles; 10 s by default, like the kubelet's.
pub(crate) const BACKOFF_ANNOTATION: &str = "test.anteroom.dev/back-off";
/// Time until the process runs out of memory; 200 ms by default.
pub(crate) const OOM_DELAY_ANNOTATION: &str = "test.anteroom.dev/oom-after";
/// Further arguments for the simulator that runs instead of a model server.
pub(crate) const SIM_ARGS_ANNOTATION: &str = "test.anteroom.dev/sim";

/// Failure of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PodFailure {
    /// The image cannot be pulled.
    ImagePullBackOff,
    /// The process exits with 1 at once.
    CrashLoop,
    /// The kernel kills the process after a while (OOM).
    Oom,
}

impl PodFailure {
    /// Returns the failure in the pod's current annotations, which can change.
    pub(crate) fn of(pod: &Pod) -> Option<Self> {
        match pod.annotations().get(FAILURE_ANNOTATION)?.as_str() {
            "image-pull-back-off" => Some(Self::ImagePullBackOff),
            "crash-loop" => Some(Self::CrashLoop),
            "oom" => Some(Self::Oom),
            "" => None,
            other => panic!("{FAILURE_ANNOTATION}: {other} is none"),
        }
    }
}

/// Returns the duration in an annotation, or the default.
pub(crate) fn duration(pod: &Pod, annotation: &str, default: Duration) -> Duration {
    given(pod, annotation, 0).unwrap_or(default)
}

/// Returns the duration in an annotation, if present. Of several, separated by commas, each applies to one pod of the
/// namespace, by its number; the last applies to all further pods.
pub(crate) fn given(pod: &Pod, annotation: &str, number: usize) -> Option<Duration> {
    let text = pod.annotations().get(annotation)?;
    let of_each: Vec<_> = text.split(',').map(str::trim).collect();
    let text = of_each[number.min(of_each.len() - 1)];
    Some(humantime::parse_duration(text).unwrap_or_else(|error| panic!("{annotation}: {text}: {error}")))
}
