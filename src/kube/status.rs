//! Writes the status of route objects.
//!
//! Every replica may write; there is no leader. Replicas mostly agree, as the status follows from cluster state;
//! [`plan`] keeps them from overwriting each other where they do not.

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
    Cluster, InterceptorRoute, ModelRoute, RouteObjects, SCAN_PAUSE_FACTOR,
    conflicts::{RouteKind, RouteObject},
    report::{ModelRouteStatus, RouteReport},
    routes::{ClusterRoutes, object},
};
use crate::domain::RouteKey;
use plan::{Observed, Plan, StatusHistory};

/// Reports by route.
pub type RouteReports = HashMap<RouteKey, RouteReport>;

/// Counts of status writes by result.
#[derive(Debug, Default)]
pub struct StatusCounts {
    /// Successful writes.
    pub written: AtomicU64,
    /// Conflicts with another field manager.
    pub conflicts: AtomicU64,
    /// Writes denied by RBAC.
    pub denied: AtomicU64,
    /// Other failures.
    pub failed: AtomicU64,
}

struct StatusWriter {
    cluster: Cluster,
    objects: RouteObjects,
    routes: watch::Receiver<Arc<ClusterRoutes>>,
    reports: watch::Receiver<Arc<RouteReports>>,
    history: HashMap<RouteObject, StatusHistory>,
    counts: Arc<StatusCounts>,
    /// End of the pause after a denied write.
    paused_until: Option<Instant>,
}

/// A status to apply.
struct StatusPatch {
    object: RouteObject,
    status: ModelRouteStatus,
}

enum PatchResult {
    Written,
    /// Another field manager owns the conditions.
    Conflict,
    Denied(String),
    /// The object was deleted.
    Gone,
    Failed(String),
}

/// Field manager shared by all replicas.
const FIELD_MANAGER: &str = "anteroom";
/// Maximum number of writes per batch, and the pause after a full batch.
const WRITES_PER_BATCH: usize = 50;
const BATCH_PAUSE: Duration = Duration::from_secs(1);
/// Maximum number of concurrent writes.
const MAX_CONCURRENT_WRITES: usize = 8;
/// Time during which changes are batched; at least [`SCAN_PAUSE_FACTOR`] times the duration of the last scan.
const STATUS_BATCH_DELAY: Duration = Duration::from_millis(100);
const STATUS_WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a denied write.
const DENIED_PAUSE: Duration = Duration::from_secs(60);

// === impl Cluster ===

impl Cluster {
    /// Spawns the status writer for the objects, from the verdicts in `routes` and the state in `reports`.
    pub fn write_status(
        &self,
        objects: RouteObjects,
        routes: watch::Receiver<Arc<ClusterRoutes>>,
        reports: watch::Receiver<Arc<RouteReports>>,
    ) -> Arc<StatusCounts> {
        let counts = Arc::<StatusCounts>::default();
        let writer = StatusWriter {
            cluster: self.clone(),
            objects,
            routes,
            reports,
            history: HashMap::new(),
            counts: counts.clone(),
            paused_until: None,
        };
        self.spawn(writer.run());
        counts
    }
}

// === impl StatusWriter ===

impl StatusWriter {
    async fn run(mut self) {
        loop {
            let began = Instant::now();
            let (patches, due) = self.patches();
            let rest = began.elapsed() * SCAN_PAUSE_FACTOR;
            let full = patches.len() == WRITES_PER_BATCH;
            self.send(patches).await;
            if full {
                sleep(BATCH_PAUSE.max(rest)).await;
                continue;
            }
            let due = due.into_iter().chain(self.paused_until.filter(|until| *until > Instant::now())).min();
            tokio::select! {
                biased; // order does not matter: each branch rescans everything
                Ok(()) = self.routes.changed() => {}
                Ok(()) = self.reports.changed() => {}
                () = self.objects.changed() => {}
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
            sleep(STATUS_BATCH_DELAY.max(rest)).await;
        }
    }

    /// Returns the patches due now, up to [`WRITES_PER_BATCH`], and the time of the next one.
    fn patches(&mut self) -> (Vec<StatusPatch>, Option<Instant>) {
        let now = Instant::now();
        let routes = self.routes.borrow_and_update().clone();
        let reports = self.reports.borrow_and_update().clone();
        self.history.retain(|object, _| routes.verdicts.contains_key(object));
        if self.paused_until.is_some_and(|until| until > now) {
            return (Vec::new(), None);
        }
        let (mut patches, mut due) = (Vec::new(), None);
        let no_report = RouteReport::default();
        for (object, observed) in self.observed() {
            let Some(verdict) = routes.verdicts.get(&object) else { continue };
            // The report of an accepted route follows shortly.
            let wants_report = object.kind == RouteKind::ModelRoute && verdict.is_accepted();
            let report = match reports.get(&object.key()) {
                Some(report) => report,
                None if wants_report => continue,
                None => &no_report,
            };
            let history = self.history.entry(object.clone()).or_default();
            match history.plan(&object, verdict, report, &observed, now) {
                Plan::Nothing => {}
                Plan::Later(when) => due = due.into_iter().chain([when]).min(),
                Plan::Write(status) => patches.push(StatusPatch { object, status: *status }),
            }
            if patches.len() == WRITES_PER_BATCH {
                break;
            }
        }
        (patches, due)
    }

    fn observed(&self) -> Vec<(RouteObject, Observed)> {
        let ours = self.objects.model_routes.iter().flat_map(super::Watched::all).map(|guarded| {
            let status = guarded.0.as_ref().ok().map(|object| object.status.clone().unwrap_or_default());
            let generation = guarded.meta().generation;
            (object(RouteKind::ModelRoute, guarded.meta()), Observed { generation, status })
        });
        let theirs = self.objects.interceptor_routes.iter().flat_map(super::Watched::all).map(|guarded| {
            let status = guarded.0.as_ref().ok().map(|object| ModelRouteStatus {
                conditions: object.status.clone().unwrap_or_default().conditions,
                ..ModelRouteStatus::default()
            });
            let generation = guarded.meta().generation;
            (object(RouteKind::InterceptorRoute, guarded.meta()), Observed { generation, status })
        });
        ours.chain(theirs).collect()
    }

    async fn send(&mut self, patches: Vec<StatusPatch>) {
        let cluster = self.cluster.clone();
        let mut results = futures_util::stream::iter(patches)
            .map(|patch| {
                let cluster = cluster.clone();
                async move {
                    let result = match timeout(STATUS_WRITE_TIMEOUT, patch.send(&cluster)).await {
                        Ok(result) => result,
                        Err(_) => PatchResult::Failed(format!("no answer within {STATUS_WRITE_TIMEOUT:?}")),
                    };
                    (patch, result)
                }
            })
            .buffer_unordered(MAX_CONCURRENT_WRITES);
        while let Some((patch, result)) = results.next().await {
            let now = Instant::now();
            let history = self.history.entry(patch.object.clone()).or_default();
            let object = &patch.object;
            let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
            match result {
                PatchResult::Written => {
                    count(&self.counts.written);
                    history.written(patch.status, now);
                }
                PatchResult::Gone => history.failed(now),
                PatchResult::Conflict => {
                    if count(&self.counts.conflicts) == 0 {
                        tracing::info!(%object, "another field manager, such as the operator of the HTTP Add-on, owns the conditions; leaving them alone");
                    }
                    history.conflicted(patch.status, now);
                }
                PatchResult::Denied(error) => {
                    if count(&self.counts.denied) == 0 {
                        tracing::warn!(%object, error, "status write denied; grant `patch` on modelroutes/status \
                             and interceptorroutes/status to the service account");
                    }
                    history.failed(now);
                    self.paused_until = Some(now + DENIED_PAUSE);
                }
                PatchResult::Failed(error) => {
                    if count(&self.counts.failed) == 0 {
                        tracing::warn!(%object, error, "status write failed; retrying");
                    }
                    history.failed(now);
                }
            }
        }
    }
}

// === impl StatusPatch ===

impl StatusPatch {
    async fn send(&self, cluster: &Cluster) -> PatchResult {
        let RouteObject { kind, namespace, .. } = &self.object;
        match kind {
            // The definition of ModelRoute is ours, so the write may take over any status field.
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

    async fn apply<K>(&self, api: Api<K>, status: serde_json::Value, force: bool) -> PatchResult
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + DeserializeOwned,
    {
        let body = json!({
            "apiVersion": K::api_version(&()),
            "kind": K::kind(&()),
            "metadata": { "name": self.object.name },
            "status": status,
        });
        let params = PatchParams { force, ..PatchParams::apply(FIELD_MANAGER) };
        match api.patch_status(&self.object.name, &params, &Patch::Apply(body)).await {
            Ok(_) => PatchResult::Written,
            Err(kube::Error::Api(status)) => match status.code {
                404 => PatchResult::Gone,
                409 => PatchResult::Conflict,
                401 | 403 => PatchResult::Denied(status.message),
                _ => PatchResult::Failed(status.message),
            },
            Err(error) => PatchResult::Failed(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests;
