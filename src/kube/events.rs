//! Kubernetes Events: what happened to a route, where `kubectl describe` shows it.
//!
//! Several replicas see the same things. The name of an event is made of what it says and of the time in steps of ten
//! minutes, so that the first replica's is the only one.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    time::{Duration, SystemTime},
};

use jiff::Timestamp;
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::{sync::mpsc, time::Instant};

use super::Cluster;
use crate::domain::RouteKey;

/// Tells the cluster what happens. What it cannot take in time is forgotten: events are for people who look on.
#[derive(Clone)]
pub struct Events(mpsc::Sender<Notice>);

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Notice {
    /// To which object.
    pub about: About,
    /// Whether somebody should do something about it.
    pub is_warning: bool,
    /// What, in one word.
    pub reason: &'static str,
    /// What, in a sentence.
    pub note: String,
}

/// An object of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum About {
    /// The ModelRoute or InterceptorRoute of this route.
    Route(RouteKey),
    /// A ScaledObject.
    ScaledObject {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}

struct Writer {
    client: Client,
    instance: String,
    /// What has been told lately.
    told: HashMap<Notice, Told>,
    budgets: HashMap<About, Budget>,
}

struct Told {
    name: String,
    count: i32,
    first: Instant,
    last: Instant,
}

/// How many events an object may still have now.
struct Budget {
    left: f64,
    at: Instant,
}

/// The longest note that the API takes is 1024 bytes.
const LONGEST: usize = 1000;
/// How many notices may wait.
const WAITING: usize = 64;
/// How long what is told again is one event.
const SERIES: Duration = Duration::from_secs(600);
/// How often such an event is counted up.
const COUNT: Duration = Duration::from_secs(60);
/// How many events an object may have at once, and how often one more.
const BURST: f64 = 10.0;
const REFILL: Duration = Duration::from_secs(30);
/// How long the API server has.
const PATIENCE: Duration = Duration::from_secs(10);

// === impl Events ===

impl Events {
    /// Says it, at once or never.
    pub fn tell(&self, notice: Notice) {
        if self.0.try_send(notice).is_err() {
            tracing::debug!("an event is forgotten: others wait");
        }
    }
}

impl Cluster {
    /// Writes events for as long as somebody tells of any.
    pub fn events(&self) -> Events {
        let (sender, mut notices) = mpsc::channel::<Notice>(WAITING);
        let client = self.client().clone();
        self.spawn(async move {
            let instance = std::env::var("HOSTNAME").ok().filter(|name| !name.is_empty());
            let mut writer = Writer {
                client,
                instance: instance.unwrap_or_else(|| "anteroom".into()),
                told: HashMap::new(),
                budgets: HashMap::new(),
            };
            while let Some(notice) = notices.recv().await {
                let reason = notice.reason;
                match tokio::time::timeout(PATIENCE, writer.write(notice)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, reason, "an event could not be written"),
                    Err(_) => tracing::debug!(reason, "an event was not taken in time"),
                }
            }
        });
        Events(sender)
    }
}

// === impl Writer ===

impl Writer {
    async fn write(&mut self, notice: Notice) -> Result<(), kube::Error> {
        self.told.retain(|_, told| told.first.elapsed() < SERIES);
        self.budgets.retain(|_, budget| budget.refilled() < BURST);
        let now = Timestamp::try_from(SystemTime::now()).unwrap_or(Timestamp::UNIX_EPOCH);
        if let Some(told) = self.told.get_mut(&notice) {
            told.count = told.count.saturating_add(1);
            if told.last.elapsed() < COUNT {
                return Ok(());
            }
            told.last = Instant::now();
            let series = json!({ "series": { "count": told.count, "lastObservedTime": MicroTime(now) } });
            let (namespace, _) = notice.about.place();
            let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
            return api.patch(&told.name, &PatchParams::default(), &Patch::Merge(series)).await.map(drop);
        }
        let new = || Budget { left: BURST, at: Instant::now() };
        if !self.budgets.entry(notice.about.clone()).or_insert_with(new).take() {
            return Ok(());
        }
        let Some(regarding) = self.find(&notice.about).await? else { return Ok(()) };
        let event = event(&notice, regarding, &self.instance, now);
        let (namespace, _) = notice.about.place();
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        match api.create(&PostParams::default(), &event).await {
            // Another replica has said so.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            result => drop(result?),
        }
        let at = Instant::now();
        let name = event.metadata.name.unwrap_or_default();
        self.told.insert(notice, Told { name, count: 1, first: at, last: at });
        Ok(())
    }

    /// The object that is meant, if it is still there: `kubectl describe` finds events by its uid.
    async fn find(&self, about: &About) -> Result<Option<ObjectReference>, kube::Error> {
        let kinds: &[_] = match about {
            About::Route(_) => {
                &[("anteroom.dev", "v1alpha1", "ModelRoute"), ("http.keda.sh", "v1beta1", "InterceptorRoute")]
            }
            About::ScaledObject { .. } => &[("keda.sh", "v1alpha1", "ScaledObject")],
        };
        let (namespace, name) = about.place();
        for (group, version, kind) in kinds {
            let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
            let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource);
            if let Some(object) = api.get_opt(name).await? {
                return Ok(Some(ObjectReference {
                    api_version: Some(resource.api_version),
                    kind: Some(resource.kind),
                    namespace: Some(namespace.into()),
                    name: Some(name.into()),
                    uid: object.metadata.uid,
                    resource_version: object.metadata.resource_version,
                    ..ObjectReference::default()
                }));
            }
        }
        Ok(None)
    }
}

// === impl About ===

impl About {
    /// Namespace and name. A route of the file has no object.
    fn place(&self) -> (&str, &str) {
        match self {
            Self::Route(key) => key.namespaced().unwrap_or(("default", key.as_str())),
            Self::ScaledObject { namespace, name } => (namespace, name),
        }
    }
}

// === impl Budget ===

impl Budget {
    fn refilled(&self) -> f64 {
        BURST.min(self.left + self.at.elapsed().as_secs_f64() / REFILL.as_secs_f64())
    }

    fn take(&mut self) -> bool {
        let left = self.refilled();
        let enough = left >= 1.0;
        *self = Self { left: if enough { left - 1.0 } else { left }, at: Instant::now() };
        enough
    }
}

fn event(notice: &Notice, regarding: ObjectReference, instance: &str, now: Timestamp) -> Event {
    let mut hasher = DefaultHasher::new();
    (notice, now.as_second() / SERIES.as_secs().cast_signed()).hash(&mut hasher);
    let (namespace, name) = notice.about.place();
    let mut note = notice.note.clone();
    if note.len() > LONGEST {
        note.truncate(note.floor_char_boundary(LONGEST));
        note.push('…');
    }
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:016x}", hasher.finish())),
            namespace: Some(namespace.into()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        action: Some("Scale".into()),
        reason: Some(notice.reason.into()),
        note: Some(note),
        type_: Some(if notice.is_warning { "Warning" } else { "Normal" }.into()),
        regarding: Some(regarding),
        reporting_controller: Some("anteroom.dev/anteroom".into()),
        reporting_instance: Some(instance.into()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests;
