//! Writes what is to be said of routes into their status.
//!
//! Every replica of the proxy may write, and none is told to. They agree on most of it, as it follows from the cluster;
//! what they do not agree on, [`plan`] keeps them from writing over each other again and again.

mod plan;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use kube::{
    Api, Resource,
    api::{Patch, PatchParams},
    core::{DeserializeGuard, NamespaceResourceScope},
};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Cluster, InterceptorRoute, ModelRoute, REST, RouteObjects,
    conflicts::{RouteKind, RouteObject},
    report::{Condition, ModelRouteStatus, RouteReport},
    routes::{ClusterRoutes, object},
};
use crate::domain::RouteKey;
use plan::{Observed, Plan, Said};

/// How the routes are, by their key.
pub type RouteReports = HashMap<RouteKey, RouteReport>;

/// What became of writing.
#[derive(Debug, Default)]
pub struct StatusCounts {
    /// Written.
    pub written: AtomicU64,
    /// Refused, as somebody else has said it.
    pub conflicts: AtomicU64,
    /// Refused, as we have no right to it.
    pub denied: AtomicU64,
    /// Failed otherwise.
    pub failed: AtomicU64,
}

struct Writer {
    cluster: Cluster,
    objects: RouteObjects,
    routes: watch::Receiver<Arc<ClusterRoutes>>,
    reports: watch::Receiver<Arc<RouteReports>>,
    said: HashMap<RouteObject, Said>,
    counts: Arc<StatusCounts>,
    /// Nothing is written before: we have no right to it.
    muted: Option<Instant>,
}

/// Something to write.
struct Letter {
    object: RouteObject,
    status: ModelRouteStatus,
}

enum Reply {
    Written,
    /// Somebody else has said it.
    Conflict,
    Denied(String),
    /// The object is gone.
    Gone,
    Failed(String),
}

/// Who we are to the API server, over all replicas.
const MANAGER: &str = "anteroom";
/// How many are written at most at a time, and then how long nothing is.
const BATCH: usize = 50;
const PAUSE: Duration = Duration::from_secs(1);
/// How many are under way at once.
const AT_ONCE: usize = 8;
/// How long changes are gathered, or for [`REST`] times as long as it takes to look at all objects.
const GATHER: Duration = Duration::from_millis(100);
/// How long the API server may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long nothing is written where we have no right to.
const MUTED: Duration = Duration::from_secs(60);

// === impl Cluster ===

impl Cluster {
    /// Writes the status of routes, as `routes` has verdicts on them and `reports` says how they are.
    pub fn write_status(
        &self,
        objects: RouteObjects,
        routes: watch::Receiver<Arc<ClusterRoutes>>,
        reports: watch::Receiver<Arc<RouteReports>>,
    ) -> Arc<StatusCounts> {
        let counts = Arc::<StatusCounts>::default();
        let writer = Writer {
            cluster: self.clone(),
            objects,
            routes,
            reports,
            said: HashMap::new(),
            counts: counts.clone(),
            muted: None,
        };
        self.spawn(writer.run());
        counts
    }
}

// === impl Writer ===

impl Writer {
    async fn run(mut self) {
        loop {
            let began = Instant::now();
            let (letters, due) = self.letters();
            let rest = began.elapsed() * REST;
            let full = letters.len() == BATCH;
            self.send(letters).await;
            if full {
                sleep(PAUSE.max(rest)).await;
                continue;
            }
            let due = due.into_iter().chain(self.muted.filter(|muted| *muted > Instant::now())).min();
            tokio::select! {
                biased; // any of them will do
                Ok(()) = self.routes.changed() => {}
                Ok(()) = self.reports.changed() => {}
                () = self.objects.changed() => {}
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
            sleep(GATHER.max(rest)).await;
        }
    }

    /// What is to be written now, [`BATCH`] at most, and when to look again.
    fn letters(&mut self) -> (Vec<Letter>, Option<Instant>) {
        let now = Instant::now();
        let routes = self.routes.borrow_and_update().clone();
        let reports = self.reports.borrow_and_update().clone();
        self.said.retain(|object, _| routes.verdicts.contains_key(object));
        if self.muted.is_some_and(|muted| muted > now) {
            return (Vec::new(), None);
        }
        let (mut letters, mut due) = (Vec::new(), None);
        let none = RouteReport::default();
        for (object, observed) in self.observed() {
            let Some(verdict) = routes.verdicts.get(&object) else { continue };
            // Of a route that is served, there is one soon.
            let wants_report = object.kind == RouteKind::ModelRoute && verdict.is_accepted();
            let report = match reports.get(&object.key()) {
                Some(report) => report,
                None if wants_report => continue,
                None => &none,
            };
            let said = self.said.entry(object.clone()).or_default();
            match said.plan(&object, verdict, report, &observed, now) {
                Plan::Nothing => {}
                Plan::Later(when) => due = due.into_iter().chain([when]).min(),
                Plan::Write(status) => letters.push(Letter { object, status: *status }),
            }
            if letters.len() == BATCH {
                break;
            }
        }
        (letters, due)
    }

    fn observed(&self) -> Vec<(RouteObject, Observed)> {
        let ours = self.objects.ours.iter().flat_map(super::Watched::all).map(|guarded| {
            let status = guarded.0.as_ref().ok().map(|object| object.status.clone().unwrap_or_default());
            let generation = guarded.meta().generation;
            (object(RouteKind::ModelRoute, guarded.meta()), Observed { generation, status })
        });
        let theirs = self.objects.theirs.iter().flat_map(super::Watched::all).map(|guarded| {
            let status = guarded.0.as_ref().ok().map(|object| ModelRouteStatus {
                conditions: object.status.clone().unwrap_or_default().conditions,
                ..ModelRouteStatus::default()
            });
            let generation = guarded.meta().generation;
            (object(RouteKind::InterceptorRoute, guarded.meta()), Observed { generation, status })
        });
        ours.chain(theirs).collect()
    }

    async fn send(&mut self, letters: Vec<Letter>) {
        let cluster = self.cluster.clone();
        let mut replies = futures_util::stream::iter(letters)
            .map(|letter| {
                let cluster = cluster.clone();
                async move {
                    let reply = match timeout(PATIENCE, letter.send(&cluster)).await {
                        Ok(reply) => reply,
                        Err(_) => Reply::Failed(format!("no answer within {PATIENCE:?}")),
                    };
                    (letter, reply)
                }
            })
            .buffer_unordered(AT_ONCE);
        while let Some((letter, reply)) = replies.next().await {
            let now = Instant::now();
            let said = self.said.entry(letter.object.clone()).or_default();
            let object = &letter.object;
            let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
            match reply {
                Reply::Written => {
                    count(&self.counts.written);
                    said.written(letter.status, now);
                }
                Reply::Gone => said.failed(now),
                Reply::Conflict => {
                    if count(&self.counts.conflicts) == 0 {
                        tracing::info!(%object, "somebody else writes its conditions, such as the HTTP Add-on's operator: left to them");
                    }
                    said.left_to_others(letter.status, now);
                }
                Reply::Denied(error) => {
                    if count(&self.counts.denied) == 0 {
                        tracing::warn!(%object, error, "its status cannot be written; grant `patch` on modelroutes/status \
                             and interceptorroutes/status to the service account");
                    }
                    said.failed(now);
                    self.muted = Some(now + MUTED);
                }
                Reply::Failed(error) => {
                    if count(&self.counts.failed) == 0 {
                        tracing::warn!(%object, error, "its status could not be written; tried again");
                    }
                    said.failed(now);
                }
            }
        }
    }
}

// === impl Letter ===

impl Letter {
    async fn send(&self, cluster: &Cluster) -> Reply {
        let RouteObject { kind, namespace, .. } = &self.object;
        match kind {
            // Its definition is ours, and so is every word of its status.
            RouteKind::ModelRoute => {
                self.apply(cluster.api::<DeserializeGuard<ModelRoute>>(namespace), json!(self.status), true)
                    .await
            }
            RouteKind::InterceptorRoute => {
                let status = json!({ "conditions": self.status.conditions });
                self.apply(cluster.api::<DeserializeGuard<InterceptorRoute>>(namespace), status, false).await
            }
        }
    }

    async fn apply<K>(&self, api: Api<K>, status: serde_json::Value, force: bool) -> Reply
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + DeserializeOwned,
    {
        let patch = json!({
            "apiVersion": K::api_version(&()),
            "kind": K::kind(&()),
            "metadata": { "name": self.object.name },
            "status": status,
        });
        let params = PatchParams { force, ..PatchParams::apply(MANAGER) };
        match api.patch_status(&self.object.name, &params, &Patch::Apply(patch)).await {
            Ok(_) => Reply::Written,
            Err(kube::Error::Api(status)) => match status.code {
                404 => Reply::Gone,
                409 => Reply::Conflict,
                401 | 403 => Reply::Denied(status.message),
                _ => Reply::Failed(status.message),
            },
            Err(error) => Reply::Failed(error.to_string()),
        }
    }
}

/// Now, as the cluster writes it.
fn today() -> String {
    humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()
}

/// Dates the conditions of a status.
fn date(status: &mut ModelRouteStatus, before: &[Condition]) {
    Condition::date(&mut status.conditions, before, &today());
}

#[cfg(test)]
mod tests;
