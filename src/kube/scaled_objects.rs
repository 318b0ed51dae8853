//! ScaledObjects: those of a cluster, whether they are paused, and which routes they name.
//!
//! Their type is written leniently: what we do not understand of one is as if it were not there, and the object still
//! counts.

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

/// KEDA stops scaling where this is true.
pub const PAUSED: &str = "autoscaling.keda.sh/paused";
/// KEDA scales to this number and stops there.
pub const PAUSED_REPLICAS: &str = "autoscaling.keda.sh/paused-replicas";
/// KEDA scales down only.
pub const PAUSED_SCALE_OUT: &str = "autoscaling.keda.sh/paused-scale-out";

/// A ScaledObject, as far as we read it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ScaledObject {
    /// Name, namespace, annotations.
    #[serde(default)]
    pub metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
    #[serde(default)]
    status: Value,
}

/// How a ScaledObject is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// With as many replicas as there are.
    Frozen,
    /// With this number of replicas.
    At(u32),
    /// It only scales down.
    ScaleOut,
}

/// A trigger that asks a scaler of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// Its place among the triggers of its object, by which KEDA names its metrics.
    pub index: usize,
    /// The name of the route that it is about.
    pub route: String,
    /// Where KEDA asks.
    pub address: String,
    /// Whether KEDA opens a stream for it, and so learns of demand at once.
    pub pushes: bool,
}

/// What is known of the ScaledObjects of a cluster.
#[derive(Clone, Default)]
pub enum ScaledObjects {
    /// Nothing: the API server has not answered yet.
    #[default]
    Unknown,
    /// KEDA is not installed.
    Absent,
    /// These.
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
    /// Its name.
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// One of its annotations.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations().get(key).map(String::as_str)
    }

    fn annotations(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.metadata.annotations.as_ref().unwrap_or(&NONE)
    }

    /// How it is paused, as KEDA reads it: a number of replicas goes first, and whatever is not false is true.
    pub fn pause(&self) -> Option<Pause> {
        let is_true = |key| self.annotation(key).is_some_and(|value| !is_false(value));
        match self.annotation(PAUSED_REPLICAS) {
            Some(replicas) => Some(replicas.parse().map_or(Pause::Frozen, Pause::At)),
            None if is_true(PAUSED) => Some(Pause::Frozen),
            None if is_true(PAUSED_SCALE_OUT) => Some(Pause::ScaleOut),
            None => None,
        }
    }

    /// The annotations that pause it, all of which must go for it to scale.
    pub fn pausing(&self) -> Vec<&'static str> {
        let replicas = [PAUSED_REPLICAS].into_iter().filter(|key| self.annotation(key).is_some());
        let switches = [PAUSED, PAUSED_SCALE_OUT].into_iter();
        let switches = switches.filter(|key| self.annotation(key).is_some_and(|value| !is_false(value)));
        replicas.chain(switches).collect()
    }

    /// Its triggers that name a route of ours, or of the HTTP Add-on that we stand in for.
    pub fn triggers(&self) -> impl Iterator<Item = Trigger> {
        let triggers = self.spec["triggers"].as_array().into_iter().flatten().enumerate();
        triggers.filter_map(|(index, trigger)| {
            let metadata = |key: &str| trigger["metadata"][key].as_str().map(str::to_owned);
            let pushes = match trigger["type"].as_str()? {
                "external-push" => true,
                "external" => false,
                _ => return None,
            };
            let route = metadata("route").or_else(|| metadata("interceptorRoute"))?;
            Some(Trigger { index, route, address: metadata("scalerAddress").unwrap_or_default(), pushes })
        })
    }

    /// Whether KEDA has a metric of this trigger on its list, without which it drops what the trigger pushes.
    pub fn lists(&self, trigger: &Trigger) -> bool {
        let prefix = format!("s{}-", trigger.index);
        let mut names = self.status["externalMetricNames"].as_array().into_iter().flatten();
        names.any(|name| name.as_str().is_some_and(|name| name.starts_with(&prefix)))
    }

    /// The replicas that a push asks for.
    pub fn floor(&self) -> u32 {
        let count = |key: &str| self.spec[key].as_u64().and_then(|count| u32::try_from(count).ok());
        // With an idle count a push leads from there to the minimum. Without, whatever is above zero is the HPA's.
        let min = count("idleReplicaCount").and_then(|_| count("minReplicaCount"));
        min.unwrap_or_default().max(1)
    }

    /// What it scales.
    pub fn workload(&self) -> Option<Workload> {
        let target = &self.spec["scaleTargetRef"];
        let text = |key: &str, default: &str| match target[key].as_str() {
            None | Some("") => default.to_owned(),
            Some(text) => text.to_owned(),
        };
        let name = target["name"].as_str().filter(|name| !name.is_empty())?.to_owned();
        let workload =
            Workload { api_version: text("apiVersion", "apps/v1"), kind: text("kind", "Deployment"), name };
        // KEDA finds no such thing, either.
        workload.misnamed().is_none().then_some(workload)
    }

    /// Why KEDA does not act on it: the reason and the message of its condition `Ready`, where that is false.
    pub fn not_ready(&self) -> Option<(&str, &str)> {
        let mut conditions = self.status["conditions"].as_array().into_iter().flatten();
        let ready = conditions.find(|condition| condition["type"] == "Ready")?;
        let text = |key: &str| ready[key].as_str().unwrap_or_default();
        (text("status") == "False").then(|| (text("reason"), text("message")))
    }

    /// When KEDA last found it active.
    pub fn last_active(&self) -> Option<Timestamp> {
        self.status["lastActiveTime"].as_str()?.parse().ok()
    }
}

/// What is left: a second copy of the object, as it was applied, is most of its annotations.
fn trim(object: &mut DeserializeGuard<ScaledObject>) {
    if let Some(annotations) = &mut object.meta_mut().annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}

/// As Go's `strconv.ParseBool` says, which KEDA asks.
fn is_false(value: &str) -> bool {
    matches!(value, "0" | "f" | "F" | "false" | "FALSE" | "False")
}

/// The route that a ScaledObject of `namespace` means by `name`: that of its own namespace, else that of the file.
pub fn named(namespace: &str, name: &str, is_known: impl Fn(&RouteKey) -> bool) -> Option<RouteKey> {
    let own = RouteKey::from(&*format!("{namespace}/{name}"));
    // A name may have a namespace in it. Of the route of another one this object has no say.
    let is_elsewhere = name.split_once('/').is_some_and(|(other, _)| other != namespace);
    let of_file = (!is_elsewhere).then(|| RouteKey::from(name));
    [Some(own), of_file].into_iter().flatten().find(is_known)
}

// === impl ScaledObjects ===

impl ScaledObjects {
    /// The objects that can be read; empty where nothing is known.
    pub fn all(&self) -> Vec<Arc<DeserializeGuard<ScaledObject>>> {
        match self {
            Self::Known(watched) => watched.all(),
            Self::Unknown | Self::Absent => Vec::new(),
        }
    }

    /// Whether what is not among them does not exist.
    pub fn is_complete(&self) -> bool {
        match self {
            Self::Known(watched) => watched.is_synced(),
            Self::Unknown | Self::Absent => false,
        }
    }

    /// Waits for the next change among them. Cancel-safe.
    pub async fn changed(&mut self) {
        match self {
            Self::Known(watched) => watched.changed().await,
            Self::Unknown | Self::Absent => std::future::pending().await,
        }
    }
}

impl Cluster {
    /// Follows the ScaledObjects of the served namespaces, also when KEDA is installed later.
    pub fn scaled_objects(&self) -> watch::Receiver<ScaledObjects> {
        const AGAIN: Duration = Duration::from_secs(30);
        const PATIENCE: Duration = Duration::from_secs(10);
        let (known, receiver) = watch::channel(ScaledObjects::Unknown);
        let cluster = self.clone();
        self.spawn(async move {
            loop {
                let asked = cluster.client().list_api_group_resources("keda.sh/v1alpha1");
                let Ok(answer) = timeout(PATIENCE, asked).await else { continue };
                match answer {
                    Ok(_) => break,
                    Err(kube::Error::Api(status)) if status.code == 404 => {
                        let told = matches!(*known.borrow(), ScaledObjects::Absent);
                        if !told {
                            tracing::warn!(
                                "KEDA is not installed in this cluster: there are no ScaledObjects"
                            );
                            known.send_replace(ScaledObjects::Absent);
                        }
                    }
                    // Who may not ask which kinds there are may be allowed to watch this one.
                    Err(kube::Error::Api(status)) if status.code == 403 => break,
                    Err(error) => tracing::debug!(%error, "not known whether KEDA is installed"),
                }
                sleep(AGAIN).await;
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
