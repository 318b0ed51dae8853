//! Watches ScaledObjects: pause state, triggers, and the routes they name.
//!
//! Parsing is lenient: an unknown or malformed field counts as absent, so that the rest of the object remains usable.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use kube::{
    Resource,
    api::ObjectMeta,
    core::{DeserializeGuard, NamespaceResourceScope},
    runtime::watcher,
};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{Cluster, Watched};
use crate::domain::{RouteKey, Workload};

/// Annotation: KEDA stops scaling while this is true.
pub const PAUSED_ANNOTATION: &str = "autoscaling.keda.sh/paused";
/// Annotation: KEDA scales to this number of replicas and keeps it.
pub const PAUSED_REPLICAS_ANNOTATION: &str = "autoscaling.keda.sh/paused-replicas";
/// Annotation: KEDA does not scale out while this is true.
pub const PAUSED_SCALE_OUT_ANNOTATION: &str = "autoscaling.keda.sh/paused-scale-out";

/// The parts of a ScaledObject used here.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ScaledObject {
    /// Name, namespace and annotations.
    #[serde(default)]
    pub metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
    #[serde(default)]
    status: Value,
}

/// Pause state of a ScaledObject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// Paused at the current number of replicas.
    Frozen,
    /// Paused at this number of replicas.
    At(u32),
    /// Only scaling out is paused; scaling in continues.
    ScaleOut,
}

/// An external trigger that names a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalTrigger {
    /// Index among the triggers of its object, by which KEDA names its metrics.
    pub index: usize,
    /// Name of the route.
    pub route: String,
    /// Address of the scaler.
    pub address: String,
    /// True if the type is `external-push`, with a stream for pushes.
    pub pushes: bool,
}

/// Known ScaledObjects of a cluster.
#[derive(Clone, Default)]
pub enum ScaledObjects {
    /// The API server has not answered yet.
    #[default]
    Unknown,
    /// KEDA is not installed.
    Absent,
    /// KEDA is installed; current objects.
    Known(Watched<DeserializeGuard<ScaledObject>>),
}

// === impl ScaledObject ===

impl Resource for ScaledObject {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> std::borrow::Cow<'_, str> {
        "ScaledObject".into()
    }

    fn group((): &()) -> std::borrow::Cow<'_, str> {
        "keda.sh".into()
    }

    fn version((): &()) -> std::borrow::Cow<'_, str> {
        "v1alpha1".into()
    }

    fn plural((): &()) -> std::borrow::Cow<'_, str> {
        "scaledobjects".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl ScaledObject {
    /// Returns the name.
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// Returns the namespace.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// Returns an annotation.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations().get(key).map(String::as_str)
    }

    fn annotations(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.metadata.annotations.as_ref().unwrap_or(&NONE)
    }

    /// Returns the pause state, with the semantics of KEDA: a replica count takes precedence, and any value other than
    /// false is true.
    pub fn pause(&self) -> Option<Pause> {
        let is_true = |key| self.annotation(key).is_some_and(|value| !is_false(value));
        match self.annotation(PAUSED_REPLICAS_ANNOTATION) {
            Some(replicas) => Some(replicas.parse().map_or(Pause::Frozen, Pause::At)),
            None if is_true(PAUSED_ANNOTATION) => Some(Pause::Frozen),
            None if is_true(PAUSED_SCALE_OUT_ANNOTATION) => Some(Pause::ScaleOut),
            None => None,
        }
    }

    /// Returns all annotations that pause it; scaling resumes once all are removed.
    pub fn active_pause_annotations(&self) -> Vec<&'static str> {
        let replicas = [PAUSED_REPLICAS_ANNOTATION].into_iter().filter(|key| self.annotation(key).is_some());
        let switches = [PAUSED_ANNOTATION, PAUSED_SCALE_OUT_ANNOTATION].into_iter();
        let switches = switches.filter(|key| self.annotation(key).is_some_and(|value| !is_false(value)));
        replicas.chain(switches).collect()
    }

    /// Returns the triggers that name a route, by our metadata key or by that of the HTTP Add-on.
    pub fn triggers(&self) -> impl Iterator<Item = ExternalTrigger> {
        let triggers = self.spec["triggers"].as_array().into_iter().flatten().enumerate();
        triggers.filter_map(|(index, trigger)| {
            let metadata = |key: &str| trigger["metadata"][key].as_str().map(str::to_owned);
            let pushes = match trigger["type"].as_str()? {
                "external-push" => true,
                "external" => false,
                _ => return None,
            };
            let route = metadata("route").or_else(|| metadata("interceptorRoute"))?;
            Some(ExternalTrigger {
                index,
                route,
                address: metadata("scalerAddress").unwrap_or_default(),
                pushes,
            })
        })
    }

    /// Returns whether the status lists a metric of this trigger. KEDA drops pushes of unlisted triggers.
    pub fn lists_metric_of(&self, trigger: &ExternalTrigger) -> bool {
        let prefix = format!("s{}-", trigger.index);
        let mut names = self.status["externalMetricNames"].as_array().into_iter().flatten();
        names.any(|name| name.as_str().is_some_and(|name| name.starts_with(&prefix)))
    }

    /// Returns the number of replicas requested by a push.
    pub fn push_replicas(&self) -> u32 {
        let count = |key: &str| self.spec[key].as_u64().and_then(|count| u32::try_from(count).ok());
        // With an idle count, a push scales from that count to the minimum. Otherwise the HPA controls all counts
        // above zero.
        let min = count("idleReplicaCount").and_then(|_| count("minReplicaCount"));
        min.unwrap_or_default().max(1)
    }

    /// Returns the scale target.
    pub fn workload(&self) -> Option<Workload> {
        let target = &self.spec["scaleTargetRef"];
        let text = |key: &str, default: &str| match target[key].as_str() {
            None | Some("") => default.to_owned(),
            Some(text) => text.to_owned(),
        };
        let name = target["name"].as_str().filter(|name| !name.is_empty())?.to_owned();
        let workload =
            Workload { api_version: text("apiVersion", "apps/v1"), kind: text("kind", "Deployment"), name };
        // KEDA cannot resolve a malformed reference either.
        workload.invalid_key().is_none().then_some(workload)
    }

    /// Returns reason and message of the condition `Ready`, if false.
    pub fn not_ready(&self) -> Option<(&str, &str)> {
        let mut conditions = self.status["conditions"].as_array().into_iter().flatten();
        let ready = conditions.find(|condition| condition["type"] == "Ready")?;
        let text = |key: &str| ready[key].as_str().unwrap_or_default();
        (text("status") == "False").then(|| (text("reason"), text("message")))
    }

    /// Returns the time at which KEDA last observed activity.
    pub fn last_active(&self) -> Option<Timestamp> {
        self.status["lastActiveTime"].as_str()?.parse().ok()
    }
}

/// Drops the last applied configuration, a second copy of the object.
fn trim(object: &mut DeserializeGuard<ScaledObject>) {
    if let Some(annotations) = &mut object.meta_mut().annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}

/// Parses like `strconv.ParseBool` of Go, as KEDA does.
fn is_false(value: &str) -> bool {
    matches!(value, "0" | "f" | "F" | "false" | "FALSE" | "False")
}

/// Resolves a route name used by a ScaledObject: the route of its own namespace, else that of the configuration file.
pub fn resolve_route_name(
    namespace: &str,
    name: &str,
    is_known: impl Fn(&RouteKey) -> bool,
) -> Option<RouteKey> {
    let own = RouteKey::from(&*format!("{namespace}/{name}"));
    // A qualified name must not refer to a route of another namespace.
    let is_elsewhere = name.split_once('/').is_some_and(|(other, _)| other != namespace);
    let of_file = (!is_elsewhere).then(|| RouteKey::from(name));
    [Some(own), of_file].into_iter().flatten().find(is_known)
}

// === impl ScaledObjects ===

impl ScaledObjects {
    /// Returns the current objects, including malformed ones; empty if unknown.
    pub fn all(&self) -> Vec<Arc<DeserializeGuard<ScaledObject>>> {
        match self {
            Self::Known(watched) => watched.all(),
            Self::Unknown | Self::Absent => Vec::new(),
        }
    }

    /// Returns whether the list is complete.
    pub fn is_complete(&self) -> bool {
        match self {
            Self::Known(watched) => watched.is_synced(),
            Self::Unknown | Self::Absent => false,
        }
    }

    /// Waits for the next change. Cancel-safe.
    pub async fn changed(&mut self) {
        match self {
            Self::Known(watched) => watched.changed().await,
            Self::Unknown | Self::Absent => std::future::pending().await,
        }
    }
}

impl Cluster {
    /// Watches the ScaledObjects of the served namespaces, including after a later installation of KEDA.
    pub fn scaled_objects(&self) -> watch::Receiver<ScaledObjects> {
        const DETECT_INTERVAL: Duration = Duration::from_secs(30);
        const DETECT_TIMEOUT: Duration = Duration::from_secs(10);
        let (known, receiver) = watch::channel(ScaledObjects::Unknown);
        let cluster = self.clone();
        self.spawn(async move {
            loop {
                let request = cluster.client().list_api_group_resources("keda.sh/v1alpha1");
                let Ok(answer) = timeout(DETECT_TIMEOUT, request).await else { continue };
                match answer {
                    Ok(_) => break,
                    Err(kube::Error::Api(status)) if status.code == 404 => {
                        let is_logged = matches!(*known.borrow(), ScaledObjects::Absent);
                        if !is_logged {
                            tracing::warn!("KEDA is not installed; waiting for its installation");
                            known.send_replace(ScaledObjects::Absent);
                        }
                    }
                    // Discovery may be forbidden while watching the kind is permitted.
                    Err(kube::Error::Api(status)) if status.code == 403 => break,
                    Err(error) => tracing::debug!(%error, "failed to detect KEDA; retrying"),
                }
                sleep(DETECT_INTERVAL).await;
            }
            known.send_replace(ScaledObjects::Known(cluster.watch_in(
                cluster.apis(),
                watcher::Config::default(),
                trim,
            )));
            known.closed().await;
        });
        receiver
    }
}

#[cfg(test)]
mod tests;
