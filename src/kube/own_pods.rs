//! The pods that speak for the start of a workload: its own, without what earlier starts left behind. Pure.

use std::{sync::Arc, time::SystemTime};

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::api::ObjectMeta;
use serde_json::Value;

use super::{
    pod_reasons::{is_over, trouble},
    reasons::PodFacts,
    workloads::WorkloadRef,
};
use crate::state::Seen;

/// Tells the pods of a workload from those that only have the same labels, and current ones from leftovers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct OwnPods {
    kind: String,
    name: String,
    uid: Option<String>,
    /// The ReplicaSet of a Deployment's current revision.
    current: Option<String>,
    /// When replicas were last raised from zero, by the API server's clock, cut to seconds.
    raised: Option<SystemTime>,
}

/// How much a pod says of the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Voice {
    /// It may still become ready.
    Live,
    /// It has failed during this start: counted only while no live pod is there.
    Failed,
    /// It is another owner's, on its way out, or of an earlier start.
    None,
}

// === impl OwnPods ===

impl OwnPods {
    /// Reads the workload's object, which has this metadata and these contents.
    pub(super) fn of(
        workload: &WorkloadRef,
        meta: &ObjectMeta,
        object: &Value,
        raised: Option<&Seen>,
    ) -> Self {
        Self {
            kind: workload.workload.kind.clone(),
            name: workload.workload.name.clone(),
            uid: meta.uid.clone(),
            current: current_replica_set(object).map(str::to_owned),
            raised: raised.and_then(|seen| seen.stamp.as_ref()).map(|stamp| stamp.time),
        }
    }

    /// The pods that count, with what is wrong with each. `all`: those with the labels of the workload's selector.
    ///
    /// The age of a pod that can still become ready never excludes it: an `ha` workload may have been in a crash loop for
    /// days.
    pub(super) fn speaking(&self, all: &[Arc<Pod>]) -> Vec<PodFacts> {
        let voices: Vec<_> = all.iter().map(|pod| (pod, self.voice(pod))).collect();
        let loudest = match voices.iter().any(|(_, voice)| *voice == Voice::Live) {
            true => Voice::Live,
            false => Voice::Failed,
        };
        let speaking = voices.into_iter().filter(|(_, voice)| *voice == loudest);
        speaking
            .map(|(pod, _)| PodFacts {
                name: pod.metadata.name.clone().unwrap_or_default(),
                labels: labels(pod),
                trouble: trouble(pod),
            })
            .collect()
    }

    fn voice(&self, pod: &Pod) -> Voice {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        if pod.metadata.deletion_timestamp.is_some() || phase == Some("Succeeded") || !self.owns(pod) {
            return Voice::None;
        }
        if is_over(pod) {
            return if self.is_of_this_start(pod) { Voice::Failed } else { Voice::None };
        }
        // The Deployment replaces what its template no longer says; until then it may serve.
        if self.is_outdated(pod) && trouble(pod).is_some() { Voice::None } else { Voice::Live }
    }

    /// Whether the pod is the workload's, and not a Job's or a canary's with the same labels. A pod without a controller
    /// and pods of kinds that are unknown here get the benefit of the doubt.
    fn owns(&self, pod: &Pod) -> bool {
        let Some(owner) = controller(pod) else { return true };
        match &*self.kind {
            "Deployment" => {
                let of = owner.name.strip_prefix(&*self.name).and_then(|rest| rest.strip_prefix('-'));
                let label = pod.metadata.labels.as_ref().and_then(|labels| labels.get("pod-template-hash"));
                let is_hash = |rest: &str| match label {
                    Some(hash) => rest == hash,
                    // Hashes have no hyphen, names of other Deployments with this prefix do.
                    None => !rest.is_empty() && !rest.contains('-'),
                };
                owner.kind == "ReplicaSet" && of.is_some_and(is_hash)
            }
            "StatefulSet" | "ReplicaSet" | "ReplicationController" | "DaemonSet" => {
                owner.kind == self.kind
                    && owner.name == self.name
                    && self.uid.as_ref().is_none_or(|uid| owner.uid == *uid)
            }
            _ => owner.kind != "Job",
        }
    }

    /// Whether a Deployment has a newer revision than the pod's. A StatefulSet replaces a pod under the same name, and
    /// may wait for one of an older revision to become ready first: there every pod counts.
    fn is_outdated(&self, pod: &Pod) -> bool {
        let current = self.current.as_ref().filter(|_| self.kind == "Deployment");
        current.zip(controller(pod)).is_some_and(|(current, owner)| owner.name != *current)
    }

    fn is_of_this_start(&self, pod: &Pod) -> bool {
        let created = pod.metadata.creation_timestamp.as_ref().map(|time| SystemTime::from(time.0));
        created.zip(self.raised).is_some_and(|(created, raised)| created >= raised)
    }
}

/// The labels that people gave the pod.
fn labels(pod: &Pod) -> String {
    const GENERATED: [&str; 4] = [
        "pod-template-hash",
        "controller-revision-hash",
        "statefulset.kubernetes.io/pod-name",
        "apps.kubernetes.io/pod-index",
    ];
    let labels = pod.metadata.labels.iter().flatten().filter(|(key, _)| !GENERATED.contains(&&***key));
    labels.map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

fn controller(pod: &Pod) -> Option<&OwnerReference> {
    pod.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

/// The current ReplicaSet of a Deployment. It is named only in the message of the condition `Progressing`, in quotes, in
/// each of its forms (`ReplicaSet "chat-6f7d" is progressing.`).
fn current_replica_set(object: &Value) -> Option<&str> {
    let mut conditions = object["status"]["conditions"].as_array()?.iter();
    let progressing = conditions.find(|condition| condition["type"] == "Progressing")?;
    progressing["message"].as_str()?.split('"').nth(1)
}

#[cfg(test)]
mod tests;
