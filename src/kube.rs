//! Kubernetes integration: informers for routes, pods and ScaledObjects, and the writers of status, Events and scale.
//!
//! Nothing here runs on the request path, and no failure here fails a request: without the API server, the last known
//! state remains in use.

mod conflicts;
mod connect;
mod endpoints;
mod error_chain;
mod events;
mod facts;
mod go_duration;
mod informer;
mod interceptor_route;
mod liveness;
mod model_route;
mod own_pods;
mod pod_reasons;
mod pods;
mod reasons;
mod report;
mod routes;
mod scale;
mod scaled_objects;
mod schema;
pub mod session;
#[cfg(test)]
pub(crate) mod stand_in;
mod starts;
mod status;
mod watch;
mod workloads;

use std::sync::Arc;

use kube::{Api, Client, Resource, core::NamespaceResourceScope};
use thiserror::Error;
use tokio::runtime::Handle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use conflicts::{RouteKind, RouteObject};
pub use endpoints::Endpoints;
pub use events::{EventNotice, EventSubject, Events};
pub use facts::AllRoutes;
pub use interceptor_route::{InterceptorRoute, InterceptorRouteSpec};
pub use liveness::Liveness;
pub use model_route::{ModelRoute, ModelRouteSpec, definition, definition_yaml};
pub use pod_reasons::KubeProblem;
pub use pods::{PodWatches, PodsOf};
pub use reasons::{AllFacts, Facts, ProxyView};
pub use report::{Condition, LastColdStart, LastPhase, ModelRouteStatus, RouteReport, RouteState, Verdict};
pub use routes::{ClusterRoutes, RouteObjects};
pub use scale::DirectScale;
pub use scaled_objects::{ScaledObject, ScaledObjects};
pub use status::{RouteReports, StatusCounts};
pub use watch::Watched;

use crate::config;

/// A full scan of all routes is followed by a pause of this many times its duration, which bounds scans to about 5 % of
/// a core regardless of the number of routes and the rate of changes.
const SCAN_PAUSE_FACTOR: u32 = 20;

/// Handle for the API server: client, connection state and background tasks.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    liveness: Arc<Liveness>,
    namespaces: Arc<[String]>,
    reads_logs: bool,
    ends_sessions: bool,
    /// Runtime for background tasks. `None` means the current one.
    handle: Option<Handle>,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

/// Failure to create a client for the API server.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum ClusterError {
    #[error(
        "no Kubernetes configuration found: {0}; run in a pod, set KUBECONFIG, or remove `kubernetes` from the \
         configuration"
    )]
    Config(#[from] kube::config::InferConfigError),
    #[error("cannot create a Kubernetes client: {0}")]
    Client(#[from] kube::Error),
}

// === impl Cluster ===

impl Cluster {
    /// Creates a client from the kubeconfig, else from the service account of the pod. Sends no request, so the API
    /// server need not be reachable yet. Background tasks run on `handle`.
    ///
    /// # Errors
    /// Returns an error if no configuration is found or it is invalid.
    pub async fn new(config: &config::Kubernetes, handle: Option<&Handle>) -> Result<Self, ClusterError> {
        let found = kube::Config::infer().await?;
        let liveness = Arc::default();
        let client = {
            let _inside = handle.map(Handle::enter);
            connect::client(found, &liveness)?
        };
        Ok(Self { handle: handle.cloned(), ..Self::with(client, liveness, config) })
    }

    /// Creates a handle for `client`, which must report to `liveness`.
    fn with(client: Client, liveness: Arc<Liveness>, config: &config::Kubernetes) -> Self {
        Self {
            client,
            liveness,
            namespaces: config.namespaces.as_slice().into(),
            reads_logs: config.pod_logs,
            ends_sessions: config.sessions,
            handle: None,
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        }
    }

    /// Creates a handle that is answered by `service`.
    #[cfg(test)]
    fn served_by<S, B>(service: S, config: &config::Kubernetes) -> Self
    where
        S: tower::Service<http::Request<kube::client::Body>, Response = http::Response<B>>
            + Clone
            + Send
            + 'static,
        S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let liveness = Arc::<Liveness>::default();
        Self::with(Client::new(liveness.wrap_service(service), "default"), liveness, config)
    }

    /// Returns the client.
    pub const fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the state of the connections to the API server.
    pub const fn liveness(&self) -> &Arc<Liveness> {
        &self.liveness
    }

    /// Returns the API of a kind in one namespace.
    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType: Default>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Returns the APIs of a kind: one per served namespace, or a single one for all.
    pub fn apis<K>(&self) -> Vec<Api<K>>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType: Default>,
    {
        if self.namespaces.is_empty() {
            return vec![Api::all(self.client.clone())];
        }
        self.namespaces.iter().map(|namespace| self.api(namespace)).collect()
    }

    /// Returns whether routes of `namespace` are served.
    pub fn serves(&self, namespace: &str) -> bool {
        self.namespaces.is_empty() || self.namespaces.iter().any(|served| served == namespace)
    }

    /// Returns whether logs of starting pods are read.
    pub const fn reads_logs(&self) -> bool {
        self.reads_logs
    }

    /// Returns whether this proxy ends sessions of ScaledObjects.
    pub const fn ends_sessions(&self) -> bool {
        self.ends_sessions
    }

    /// Spawns a background task, cancelled by [`Self::stop`].
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stopping = self.stopping.clone();
        let task = async move {
            tokio::select! {
                // Cancellation first: nothing may be written after it.
                biased;
                () = stopping.cancelled() => {}
                () = task => {}
            }
        };
        match &self.handle {
            Some(handle) => self.tasks.spawn_on(task, handle),
            None => self.tasks.spawn(task),
        };
    }

    /// Cancels all background tasks and waits for them.
    pub async fn stop(&self) {
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
