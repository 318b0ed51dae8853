//! Selects the pods relevant to the current start of a workload. Pure.

use std::{sync::Arc, time::SystemTime};

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::api::ObjectMeta;
use serde_json::Value;

use super::{
    pod_reasons::{is_over, trouble},
    reasons::PodFacts,
};
use crate::{domain::Workload, state::Observation};

/// Identity of a workload, to distinguish its current pods from leftovers and from pods that only share its labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct OwnPods {
    kind: String,
    name: String,
    uid: Option<String>,
    /// ReplicaSet of the current revision, for Deployments.
    revision_replica_set: Option<String>,
    /// Last scale-up from zero by the clock of the API server, truncated to seconds.
    raised: Option<SystemTime>,
}

/// Relevance of a pod to the current start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relevance {
    /// May still become ready.
    Live,
    /// Failed during this start; counts only without live pods.
    Failed,
    /// Owned by another controller, terminating, or from an earlier start.
    None,
}

// === impl OwnPods ===

impl OwnPods {
    /// Extracts the identity from the metadata and content of the workload object.
    pub(super) fn of(
        workload: &Workload,
        meta: &ObjectMeta,
        object: &Value,
        raised: Option<&Observation>,
    ) -> Self {
        Self {
            kind: workload.kind.clone(),
            name: workload.name.clone(),
            uid: meta.uid.clone(),
            revision_replica_set: current_replica_set(object).map(str::to_owned),
            raised: raised.and_then(|seen| seen.stamp.as_ref()).map(|stamp| stamp.time),
        }
    }

    /// Returns the relevant pods of `all`, the pods matched by the selector of the workload.
    ///
    /// The age of a pod that may still become ready does not matter: a workload that is not scaled to zero may have
    /// been crash-looping for days.
    pub(super) fn relevant(&self, all: &[Arc<Pod>]) -> Vec<PodFacts> {
        let ranked: Vec<_> = all.iter().map(|pod| (pod, self.relevance(pod))).collect();
        let highest = match ranked.iter().any(|(_, relevance)| *relevance == Relevance::Live) {
            true => Relevance::Live,
            false => Relevance::Failed,
        };
        let relevant = ranked.into_iter().filter(|(_, relevance)| *relevance == highest);
        relevant
            .map(|(pod, _)| PodFacts {
                name: pod.metadata.name.clone().unwrap_or_default(),
                labels: labels(pod),
                trouble: trouble(pod),
            })
            .collect()
    }

    fn relevance(&self, pod: &Pod) -> Relevance {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        if pod.metadata.deletion_timestamp.is_some() || phase == Some("Succeeded") || !self.owns(pod) {
            return Relevance::None;
        }
        if is_over(pod) {
            return if self.is_from_this_start(pod) { Relevance::Failed } else { Relevance::None };
        }
        // A Deployment replaces outdated pods; until then they may serve.
        if self.is_outdated(pod) && trouble(pod).is_some() { Relevance::None } else { Relevance::Live }
    }

    /// Returns whether the workload controls the pod, as opposed to a Job or a canary with the same labels. Pods
    /// without a controller, and pods of unknown workload kinds, count as owned.
    fn owns(&self, pod: &Pod) -> bool {
        let Some(owner) = controller(pod) else { return true };
        match &*self.kind {
            "Deployment" => {
                let of = owner.name.strip_prefix(&*self.name).and_then(|rest| rest.strip_prefix('-'));
                let label = pod.metadata.labels.as_ref().and_then(|labels| labels.get("pod-template-hash"));
                let is_hash = |rest: &str| match label {
                    Some(hash) => rest == hash,
                    // Hashes contain no hyphen; names of other Deployments with this prefix do.
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

    /// Returns whether a Deployment has a newer revision than the pod. Always false for StatefulSets, which keep pod
    /// names and may wait for an older pod to become ready: all their pods count.
    fn is_outdated(&self, pod: &Pod) -> bool {
        let current = self.revision_replica_set.as_ref().filter(|_| self.kind == "Deployment");
        current.zip(controller(pod)).is_some_and(|(current, owner)| owner.name != *current)
    }

    fn is_from_this_start(&self, pod: &Pod) -> bool {
        let created = pod.metadata.creation_timestamp.as_ref().map(|time| SystemTime::from(time.0));
        created.zip(self.raised).is_some_and(|(created, raised)| created >= raised)
    }
}

/// Formats the labels set by users.
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

/// Returns the current ReplicaSet of a Deployment. The only source is the quoted name in the message of the condition
/// `Progressing`, in all of its forms (`ReplicaSet "chat-6f7d" is progressing.`).
fn current_replica_set(object: &Value) -> Option<&str> {
    let mut conditions = object["status"]["conditions"].as_array()?.iter();
    let progressing = conditions.find(|condition| condition["type"] == "Progressing")?;
    progressing["message"].as_str()?.split('"').nth(1)
}

#[cfg(test)]
mod tests;
