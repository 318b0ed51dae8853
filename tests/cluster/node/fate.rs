//! What a pod's annotations say that its node shall play, since it would take hardware or a registry to happen here.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

/// How long its image takes to be pulled: `2s`. By default it is there already.
pub(crate) const PULL: &str = "test.anteroom.dev/pull";
/// How long it takes to start once its image is there: nothing by default.
pub(crate) const START: &str = "test.anteroom.dev/start";
/// How long after it runs the node says so: nothing by default; up to a second with kubelet, which looks so often.
pub(crate) const LAG: &str = "test.anteroom.dev/lag";
/// What becomes of it: one of [`Fate`]'s, as `image-pull-back-off`.
pub(crate) const FATE: &str = "test.anteroom.dev/fate";
/// How long the first back-off is, of those that double; 10 s by default, as kubelet's.
pub(crate) const BACK_OFF: &str = "test.anteroom.dev/back-off";
/// How long it runs until its memory is exhausted: 200 ms by default.
pub(crate) const OOM_AFTER: &str = "test.anteroom.dev/oom-after";
/// Further arguments for the stand-in that runs in the place of a real model server.
pub(crate) const SIM: &str = "test.anteroom.dev/sim";

/// What goes wrong with a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Its image cannot be pulled.
    ImagePullBackOff,
    /// What is in its image exits with 1 at once.
    CrashLoop,
    /// The kernel kills it, after a while.
    Oom,
}

impl Fate {
    /// The fate of a pod, as its annotations are now: it can be changed.
    pub(crate) fn of(pod: &Pod) -> Option<Self> {
        match pod.annotations().get(FATE)?.as_str() {
            "image-pull-back-off" => Some(Self::ImagePullBackOff),
            "crash-loop" => Some(Self::CrashLoop),
            "oom" => Some(Self::Oom),
            "" => None,
            other => panic!("{FATE}: {other} is none"),
        }
    }
}

/// A duration of the annotations.
pub(crate) fn duration(pod: &Pod, annotation: &str, default: Duration) -> Duration {
    given(pod, annotation, 0).unwrap_or(default)
}

/// A duration of the annotations, if there is one. Of several, between commas, that of the pod's number in its
/// namespace; of more pods than there are, the last.
pub(crate) fn given(pod: &Pod, annotation: &str, number: usize) -> Option<Duration> {
    let text = pod.annotations().get(annotation)?;
    let of_each: Vec<_> = text.split(',').map(str::trim).collect();
    let text = of_each[number.min(of_each.len() - 1)];
    Some(humantime::parse_duration(text).unwrap_or_else(|error| panic!("{annotation}: {text}: {error}")))
}
