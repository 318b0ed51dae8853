//! Watches workloads: desired replicas, failures, and relevant pods.

use std::{pin::pin, sync::Arc};

use futures_util::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind, ObjectMeta},
    core::{DeserializeGuard, Selector},
    runtime::{WatchStreamExt, watcher::watch_object},
};
use serde_json::Value;
use tokio::sync::watch;

use super::{
    Cluster, PodWatches, PodsOf,
    error_chain::error_chain,
    own_pods::OwnPods,
    reasons::WorkloadFacts,
    starts::{CONTROL_PLANE, stamp},
    watch::{WatchBackoff, is_resumed},
};
use crate::{domain::Workload, state::Observation};

/// A workload in a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WorkloadRef {
    /// Namespace.
    pub namespace: String,
    /// Kind and name.
    pub workload: Workload,
}

// === impl WorkloadRef ===

impl WorkloadRef {
    /// Returns the API resource of its kind.
    pub fn resource(&self) -> ApiResource {
        let (group, version) = match self.workload.api_version.split_once('/') {
            Some((group, version)) => (group, version),
            None => ("", &*self.workload.api_version),
        };
        ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &self.workload.kind))
    }

    /// Returns kind, namespace and name for messages.
    pub fn full_name(&self) -> String {
        format!("{} `{}/{}`", self.workload.kind, self.namespace, self.workload.name)
    }
}

impl Cluster {
    /// Watches a workload and its pods for the lifetime of the receiver.
    pub fn follow(
        &self,
        workload: WorkloadRef,
        pods: Arc<PodWatches>,
    ) -> watch::Receiver<Arc<WorkloadFacts>> {
        let unknown = WorkloadFacts::unknown(&workload.namespace, &workload.workload);
        let (facts, receiver) = watch::channel(Arc::new(unknown));
        let cluster = self.clone();
        self.spawn(async move {
            tokio::select! {
                biased; // stop first: no reader is left
                () = facts.closed() => {}
                () = follow(&cluster, &workload, &pods, &facts) => {}
            }
        });
        receiver
    }
}

async fn follow(
    cluster: &Cluster,
    workload: &WorkloadRef,
    all_pods: &PodWatches,
    facts: &watch::Sender<Arc<WorkloadFacts>>,
) {
    type Object = DeserializeGuard<DynamicObject>;
    let api: Api<Object> =
        Api::namespaced_with(cluster.client().clone(), &workload.namespace, &workload.resource());
    let mut objects = pin!(watch_object(api, &workload.workload.name).backoff(WatchBackoff::new()));
    let mut known = WorkloadFacts::unknown(&workload.namespace, &workload.workload);
    let mut own = OwnPods::default();
    let mut pods: Option<(String, PodsOf)> = None;
    let mut failing = false;
    loop {
        tokio::select! {
            biased; // the workload first: it determines the selector of its pods
            object = objects.next() => match object {
                Some(Ok(object)) => {
                    failing = false;
                    let object = object.and_then(|object| object.0.ok());
                    known.is_missing = object.is_none();
                    let (meta, data) = object.map(|object| (object.metadata, object.data)).unwrap_or_default();
                    let before = known.replicas;
                    known.replicas = replicas(&data).filter(|_| !known.is_missing);
                    match (before, known.replicas) {
                        (Some(0), Some(1..)) => known.raised = Some(raised(&meta)),
                        (_, Some(1..)) => {}
                        _ => known.raised = None,
                    }
                    known.failure = failure(&data);
                    own = OwnPods::of(&workload.workload, &meta, &data, known.raised.as_ref());
                    let selector = selector(&data);
                    if pods.as_ref().map(|(selector, _)| selector) != selector.as_ref() {
                        pods = selector.map(|selector| {
                            let watched = all_pods.watch(&workload.namespace, &selector);
                            (selector, watched)
                        });
                    }
                }
                // The watcher retries with backoff; log only the first failure.
                Some(Err(error)) if !failing && !is_resumed(&error) => {
                    failing = true;
                    let error = error_chain(&error);
                    tracing::warn!(workload = %workload.full_name(), error, "workload watch failed; retrying");
                }
                Some(Err(_)) => {}
                None => return,
            },
            () = changed(&mut pods) => {}
        }
        known.pods = pods.as_ref().map(|(_, pods)| own.relevant(&pods.all())).unwrap_or_default();
        facts.send_if_modified(|before| {
            let changed = **before != known;
            if changed {
                *before = Arc::new(known.clone());
            }
            changed
        });
    }
}

async fn changed(pods: &mut Option<(String, PodsOf)>) {
    match pods {
        Some((_, pods)) => pods.changed().await,
        None => std::future::pending().await,
    }
}

/// Returns the desired replicas; the default is 1.
fn replicas(object: &Value) -> Option<u32> {
    match &object["spec"]["replicas"] {
        Value::Null => Some(1),
        replicas => u32::try_from(replicas.as_u64()?).ok(),
    }
}

/// Records a scale-up from zero observed now, with the time at which a field manager last set `spec.replicas`.
fn raised(meta: &ObjectMeta) -> Observation {
    let managers = meta.managed_fields.iter().flatten();
    let since = managers.filter_map(|manager| {
        let fields = &manager.fields_v1.as_ref()?.0;
        fields["f:spec"].get("f:replicas")?;
        manager.time.as_ref()
    });
    Observation { stamp: since.max().map(|time| stamp(time.0, CONTROL_PLANE)), ..Observation::now() }
}

/// Returns the message of the condition `ReplicaFailure`.
fn failure(object: &Value) -> Option<String> {
    let mut conditions = object["status"]["conditions"].as_array()?.iter();
    let failure = conditions
        .find(|condition| condition["type"] == "ReplicaFailure" && condition["status"] == "True")?;
    Some(failure["message"].as_str().unwrap_or("its controller gives no reason").to_owned())
}

/// Returns the pod selector. An empty one would match all pods of the namespace, and counts as absent.
fn selector(object: &Value) -> Option<String> {
    let selector: LabelSelector = serde_json::from_value(object["spec"]["selector"].clone()).ok()?;
    let selector = Selector::try_from(selector).ok()?.to_string();
    (!selector.is_empty()).then_some(selector)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use serde_json::json;
    use tokio::time::Instant;

    use super::*;

    #[test]
    fn deployment_yields_replicas_selector_and_failure() {
        let object = json!({
            "spec": { "replicas": 0, "selector": { "matchLabels": { "app": "vllm" }, "matchExpressions": [
                { "key": "tier", "operator": "In", "values": ["gpu"] },
            ] } },
            "status": { "conditions": [
                { "type": "Progressing", "status": "True", "message": "no" },
                { "type": "ReplicaFailure", "status": "True", "message": "exceeded quota" },
            ] },
        });
        assert_eq!(replicas(&object), Some(0));
        assert_eq!(failure(&object).as_deref(), Some("exceeded quota"));
        let selector = selector(&object).unwrap();
        assert!(selector.contains("app=vllm") && selector.contains("tier in (gpu)"), "{selector}");
    }

    #[tokio::test(start_paused = true)]
    async fn raised_uses_time_of_replicas_manager() {
        let meta = json!({ "managedFields": [
            { "manager": "kubectl", "operation": "Apply", "time": "2026-11-24T20:00:00Z", "fieldsType": "FieldsV1",
              "fieldsV1": { "f:spec": { "f:selector": {} } } },
            { "manager": "keda", "operation": "Update", "subresource": "scale", "time": "2026-11-24T20:00:07Z",
              "fieldsType": "FieldsV1", "fieldsV1": { "f:spec": { "f:replicas": {} } } },
            { "manager": "kube-controller-manager", "operation": "Update", "subresource": "status",
              "time": "2026-11-24T20:00:09Z", "fieldsType": "FieldsV1", "fieldsV1": { "f:status": { "f:replicas": {} } } },
        ] });
        let seen = raised(&serde_json::from_value(meta).unwrap());
        let stamp = seen.stamp.unwrap();
        assert_eq!(stamp.time, SystemTime::from("2026-11-24T20:00:07Z".parse::<jiff::Timestamp>().unwrap()));
        assert_eq!((seen.at, &*stamp.clock), (Instant::now(), CONTROL_PLANE));
        assert_eq!(raised(&ObjectMeta::default()), Observation::now());
    }

    #[test]
    fn unknown_fields_yield_none() {
        let object = json!({ "spec": { "replicas": "many", "selector": "app=x" }, "status": 1 });
        assert_eq!((replicas(&object), selector(&object), failure(&object)), (None, None, None));
        assert_eq!(replicas(&json!({ "spec": {} })), Some(1));
        assert_eq!(selector(&json!({ "spec": { "selector": {} } })), None, "not the pods of everybody");
    }

    #[test]
    fn resource_follows_api_version_and_kind() {
        let workload = |api_version: &str, kind: &str| WorkloadRef {
            namespace: "team-a".into(),
            workload: Workload { api_version: api_version.into(), kind: kind.into(), name: "chat".into() },
        };
        for (api_version, kind, path) in [
            ("apps/v1", "Deployment", "apps/v1 deployments"),
            (
                "leaderworkerset.x-k8s.io/v1",
                "LeaderWorkerSet",
                "leaderworkerset.x-k8s.io/v1 leaderworkersets",
            ),
            ("v1", "ReplicationController", "v1 replicationcontrollers"),
        ] {
            let resource = workload(api_version, kind).resource();
            assert_eq!(format!("{} {}", resource.api_version, resource.plural), path);
        }
    }
}
