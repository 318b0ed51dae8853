//! Direct scaling without KEDA, through the scale subresource.

use std::{collections::HashMap, sync::Arc, time::Duration};

use k8s_openapi::api::autoscaling::{v1::Scale as ScaleObject, v2::HorizontalPodAutoscaler};
use kube::{
    Api,
    api::{DynamicObject, ListParams, Patch, PatchParams},
};
use serde_json::json;
use tokio::{sync::watch, time::timeout};

use super::{Cluster, scaled_objects::ScaledObjects, workloads::WorkloadRef};
use crate::{
    domain::Workload,
    state::{Replicas, Scale, ScaleError, ScaleFuture},
};

/// Reasons of the last failure to scale, by workload.
pub type ScaleRefusals = watch::Receiver<Arc<HashMap<WorkloadRef, Arc<str>>>>;

/// Timeout of a request. Otherwise a half-open connection would delay a cold start until the kernel gives up after 15
/// minutes.
const SCALE_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Scaler for workloads without another scaler.
pub struct DirectScale {
    cluster: Cluster,
    scaled_objects: watch::Receiver<ScaledObjects>,
    refusals: watch::Sender<Arc<HashMap<WorkloadRef, Arc<str>>>>,
}

// === impl DirectScale ===

impl DirectScale {
    /// Creates a scaler that refuses workloads owned by any of `scaled_objects`.
    pub fn new(cluster: Cluster, scaled_objects: watch::Receiver<ScaledObjects>) -> Self {
        Self { cluster, scaled_objects, refusals: watch::Sender::default() }
    }

    /// Returns the current refusals.
    pub fn refusals(&self) -> ScaleRefusals {
        self.refusals.subscribe()
    }

    async fn read(&self, workload: &WorkloadRef) -> Result<Replicas, ScaleError> {
        if let Some(owner) = self.owner(workload).await? {
            let reason = format!(
                "{} is scaled by {owner} already, and two writers would undo each other's work: remove that, or let the \
                 route say `scaleBy: keda`",
                workload.full_name()
            );
            return Err(ScaleError::Refused(reason.into()));
        }
        let scale = self.api(workload).get_scale(&workload.workload.name).await;
        let scale: ScaleObject = scale.map_err(|error| refused(workload, "get", error))?;
        let wanted = scale.spec.and_then(|spec| spec.replicas).unwrap_or_default();
        Ok(Replicas {
            wanted: u32::try_from(wanted).unwrap_or_default(),
            version: scale.metadata.resource_version,
        })
    }

    async fn write(
        &self,
        workload: &WorkloadRef,
        current: &Replicas,
        replicas: u32,
    ) -> Result<(), ScaleError> {
        let patch = json!({
            // Conditional: the API server rejects the patch if the object has changed.
            "metadata": { "resourceVersion": current.version },
            "spec": { "replicas": replicas },
        });
        let params = PatchParams { field_manager: Some("anteroom".into()), ..PatchParams::default() };
        let patched =
            self.api(workload).patch_scale(&workload.workload.name, &params, &Patch::Merge(patch)).await;
        patched.map(drop).map_err(|error| refused(workload, "patch", error))
    }

    /// Returns a description of another scaler of the workload.
    async fn owner(&self, workload: &WorkloadRef) -> Result<Option<String>, ScaleError> {
        let objects = self.scaled_objects.borrow().clone();
        match objects {
            ScaledObjects::Absent => {}
            ref known if known.is_complete() => {}
            _ => return Err(ScaleError::Unavailable("the ScaledObjects are not known yet".into())),
        }
        let owned = objects.all().into_iter().find_map(|object| {
            let object = object.0.as_ref().ok()?;
            let same = object.namespace() == workload.namespace
                && object.workload().is_some_and(|owned| is_same(&owned, &workload.workload));
            same.then(|| format!("ScaledObject `{}/{}`", object.namespace(), object.name()))
        });
        if owned.is_some() {
            return Ok(owned);
        }
        // Best effort: missing permission to list them must not prevent scaling.
        let api: Api<HorizontalPodAutoscaler> = self.cluster.api(&workload.namespace);
        let listed = api.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
        Ok(listed.into_iter().find_map(|scaler| {
            let target = scaler.spec?.scale_target_ref;
            let owned = Workload {
                api_version: target.api_version.unwrap_or_else(|| workload.workload.api_version.clone()),
                kind: target.kind,
                name: target.name,
            };
            is_same(&owned, &workload.workload)
                .then(|| format!("HorizontalPodAutoscaler `{}`", scaler.metadata.name.unwrap_or_default()))
        }))
    }

    fn api(&self, workload: &WorkloadRef) -> Api<DynamicObject> {
        Api::namespaced_with(self.cluster.client().clone(), &workload.namespace, &workload.resource())
    }

    /// Publishes or clears the refusal of a workload.
    fn publish_result<T>(&self, workload: &WorkloadRef, result: &Result<T, ScaleError>) {
        let refusal = match result {
            Ok(_) => None,
            Err(ScaleError::Refused(reason)) => Some(reason.clone()),
            // Transient, and unrelated to the workload.
            Err(ScaleError::Conflict | ScaleError::Unavailable(_)) => return,
        };
        self.refusals.send_if_modified(|known| {
            if known.get(workload) == refusal.as_ref() {
                return false;
            }
            let mut now = HashMap::clone(known);
            match refusal {
                Some(reason) => now.insert(workload.clone(), reason),
                None => now.remove(workload),
            };
            *known = Arc::new(now);
            true
        });
    }
}

impl Scale for DirectScale {
    fn replicas<'a>(&'a self, namespace: &'a str, workload: &'a Workload) -> ScaleFuture<'a, Replicas> {
        let workload = WorkloadRef { namespace: namespace.to_owned(), workload: workload.clone() };
        Box::pin(async move {
            let result = with_timeout(self.read(&workload)).await;
            self.publish_result(&workload, &result);
            result
        })
    }

    fn set<'a>(
        &'a self,
        namespace: &'a str,
        workload: &'a Workload,
        current: &'a Replicas,
        replicas: u32,
    ) -> ScaleFuture<'a, ()> {
        let workload = WorkloadRef { namespace: namespace.to_owned(), workload: workload.clone() };
        Box::pin(async move {
            let result = with_timeout(self.write(&workload, current, replicas)).await;
            self.publish_result(&workload, &result);
            result
        })
    }
}

async fn with_timeout<T>(request: impl Future<Output = Result<T, ScaleError>>) -> Result<T, ScaleError> {
    let late = |_| {
        Err(ScaleError::Unavailable(format!("no answer within {} s", SCALE_REQUEST_TIMEOUT.as_secs()).into()))
    };
    timeout(SCALE_REQUEST_TIMEOUT, request).await.unwrap_or_else(late)
}

/// Returns whether both refer to the same object; versions of a group are equivalent.
fn is_same(a: &Workload, b: &Workload) -> bool {
    let group = |workload: &Workload| workload.api_version.split_once('/').map(|(group, _)| group.to_owned());
    a.kind == b.kind && a.name == b.name && group(a) == group(b)
}

fn refused(workload: &WorkloadRef, verb: &str, error: kube::Error) -> ScaleError {
    let kube::Error::Api(status) = error else { return ScaleError::Unavailable(error.to_string().into()) };
    let name = workload.full_name();
    match status.code {
        404 => ScaleError::Refused(format!("There is no {name} with a scale").into()),
        409 => ScaleError::Conflict,
        401 | 403 => {
            let plural = workload.resource().plural;
            let reason = format!(
                "Anteroom may not {verb} the scale of {name}: {}. Its role needs get and patch of {plural}/scale, which the \
                 chart grants with `directScaling.enabled=true`",
                status.message.trim_end_matches('.')
            );
            ScaleError::Refused(reason.into())
        }
        code if code >= 500 || code == 429 => ScaleError::Unavailable(status.message.into()),
        _ => ScaleError::Refused(format!("The scale of {name} cannot be changed: {}", status.message).into()),
    }
}

#[cfg(test)]
mod tests;
