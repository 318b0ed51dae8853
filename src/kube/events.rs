//! Publishes Kubernetes Events about routes and ScaledObjects, as shown by `kubectl describe`.
//!
//! All replicas observe the same facts. The name of an Event is a hash of its content and of the current ten-minute
//! interval, so that only the first replica's create succeeds.

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

/// Queue of the Event writer. Notices that exceed its capacity are dropped: Events are informational.
#[derive(Clone)]
pub struct Events(mpsc::Sender<EventNotice>);

/// An Event to publish.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EventNotice {
    /// The object concerned.
    pub about: EventSubject,
    /// True if the type is `Warning` rather than `Normal`.
    pub is_warning: bool,
    /// Machine-readable reason in CamelCase.
    pub reason: &'static str,
    /// Human-readable sentence.
    pub note: String,
}

/// The object that an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EventSubject {
    /// The ModelRoute or InterceptorRoute behind a route.
    Route(RouteKey),
    /// A ScaledObject.
    ScaledObject {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}

struct EventWriter {
    client: Client,
    instance: String,
    /// Events published within the current series interval.
    published: HashMap<EventNotice, EventSeries>,
    budgets: HashMap<EventSubject, EventBudget>,
}

struct EventSeries {
    name: String,
    count: i32,
    first: Instant,
    last: Instant,
}

/// Token bucket of Events per object.
struct EventBudget {
    left: f64,
    at: Instant,
}

/// Maximum length of a note, in bytes; the API accepts 1,024.
const MAX_NOTE_BYTES: usize = 1000;
/// Maximum number of notices queued for the writer.
const QUEUE_CAPACITY: usize = 64;
/// Repetitions within this time update one Event.
const SERIES_WINDOW: Duration = Duration::from_secs(600);
/// Minimum interval between count updates of an Event.
const COUNT_INTERVAL: Duration = Duration::from_secs(60);
/// Rate of Events per object: burst, and refill time per Event.
const EVENT_BURST: f64 = 10.0;
const REFILL_INTERVAL: Duration = Duration::from_secs(30);
const EVENT_WRITE_TIMEOUT: Duration = Duration::from_secs(10);

// === impl Events ===

impl Events {
    /// Enqueues an Event, or drops it if the queue is full.
    pub fn publish(&self, notice: EventNotice) {
        if self.0.try_send(notice).is_err() {
            tracing::debug!("Event dropped: the queue is full");
        }
    }
}

impl Cluster {
    /// Spawns the Event writer, which runs until the last handle is dropped.
    pub fn events(&self) -> Events {
        let (sender, mut notices) = mpsc::channel::<EventNotice>(QUEUE_CAPACITY);
        let client = self.client().clone();
        self.spawn(async move {
            let instance = std::env::var("HOSTNAME").ok().filter(|name| !name.is_empty());
            let mut writer = EventWriter {
                client,
                instance: instance.unwrap_or_else(|| "anteroom".into()),
                published: HashMap::new(),
                budgets: HashMap::new(),
            };
            while let Some(notice) = notices.recv().await {
                let reason = notice.reason;
                match tokio::time::timeout(EVENT_WRITE_TIMEOUT, writer.write(notice)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, reason, "failed to write an Event"),
                    Err(_) => tracing::debug!(reason, "timed out writing an Event"),
                }
            }
        });
        Events(sender)
    }
}

// === impl EventWriter ===

impl EventWriter {
    async fn write(&mut self, notice: EventNotice) -> Result<(), kube::Error> {
        self.published.retain(|_, published| published.first.elapsed() < SERIES_WINDOW);
        self.budgets.retain(|_, budget| budget.refilled() < EVENT_BURST);
        let now = Timestamp::try_from(SystemTime::now()).unwrap_or(Timestamp::UNIX_EPOCH);
        if let Some(published) = self.published.get_mut(&notice) {
            published.count = published.count.saturating_add(1);
            if published.last.elapsed() < COUNT_INTERVAL {
                return Ok(());
            }
            published.last = Instant::now();
            let series =
                json!({ "series": { "count": published.count, "lastObservedTime": MicroTime(now) } });
            let (namespace, _) = notice.about.object_name();
            let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
            return api
                .patch(&published.name, &PatchParams::default(), &Patch::Merge(series))
                .await
                .map(drop);
        }
        let new = || EventBudget { left: EVENT_BURST, at: Instant::now() };
        if !self.budgets.entry(notice.about.clone()).or_insert_with(new).take() {
            return Ok(());
        }
        let Some(regarding) = self.find(&notice.about).await? else { return Ok(()) };
        let event = event(&notice, regarding, &self.instance, now);
        let (namespace, _) = notice.about.object_name();
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        match api.create(&PostParams::default(), &event).await {
            // Another replica has created it.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            result => drop(result?),
        }
        let at = Instant::now();
        let name = event.metadata.name.unwrap_or_default();
        self.published.insert(notice, EventSeries { name, count: 1, first: at, last: at });
        Ok(())
    }

    /// Returns a reference to the object if it exists: `kubectl describe` finds Events by uid.
    async fn find(&self, about: &EventSubject) -> Result<Option<ObjectReference>, kube::Error> {
        let kinds: &[_] = match about {
            EventSubject::Route(_) => {
                &[("anteroom.dev", "v1alpha1", "ModelRoute"), ("http.keda.sh", "v1beta1", "InterceptorRoute")]
            }
            EventSubject::ScaledObject { .. } => &[("keda.sh", "v1alpha1", "ScaledObject")],
        };
        let (namespace, name) = about.object_name();
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

// === impl EventSubject ===

impl EventSubject {
    /// Returns namespace and name. A route of the configuration file has no object, so its lookup finds none.
    fn object_name(&self) -> (&str, &str) {
        match self {
            Self::Route(key) => key.namespaced().unwrap_or(("default", key.as_str())),
            Self::ScaledObject { namespace, name } => (namespace, name),
        }
    }
}

// === impl EventBudget ===

impl EventBudget {
    fn refilled(&self) -> f64 {
        EVENT_BURST.min(self.left + self.at.elapsed().as_secs_f64() / REFILL_INTERVAL.as_secs_f64())
    }

    fn take(&mut self) -> bool {
        let left = self.refilled();
        let enough = left >= 1.0;
        *self = Self { left: if enough { left - 1.0 } else { left }, at: Instant::now() };
        enough
    }
}

fn event(notice: &EventNotice, regarding: ObjectReference, instance: &str, now: Timestamp) -> Event {
    let mut hasher = DefaultHasher::new();
    (notice, now.as_second() / SERIES_WINDOW.as_secs().cast_signed()).hash(&mut hasher);
    let (namespace, name) = notice.about.object_name();
    let mut note = notice.note.clone();
    if note.len() > MAX_NOTE_BYTES {
        note.truncate(note.floor_char_boundary(MAX_NOTE_BYTES));
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
