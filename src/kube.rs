//! The cluster: its routes, pods and ScaledObjects, watched and published. One watcher a file.
//!
//! Nothing here is on the request path, and nothing of it fails that path: without the API server, what was known last
//! stays.

mod conflicts;
mod connect;
mod endpoints;
mod events;
mod facts;
#[cfg(test)]
mod fake;
mod go_duration;
mod interceptor_route;
mod liveness;
mod model_route;
mod own_pods;
mod parts;
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
pub use events::{About, Events, Notice};
pub use facts::AllRoutes;
pub use interceptor_route::{InterceptorRoute, InterceptorRouteSpec};
pub use liveness::Liveness;
pub use model_route::{ModelRoute, ModelRouteSpec, definition, definition_yaml};
pub use pod_reasons::Trouble;
pub use pods::{Pods, PodsOf};
pub use reasons::{AllFacts, Facts, Seen};
pub use report::{Condition, LastColdStart, LastPhase, ModelRouteStatus, RouteReport, State, Verdict};
pub use routes::{ClusterRoutes, RouteObjects};
pub use scale::DirectScale;
pub use scaled_objects::{ScaledObject, ScaledObjects};
pub use status::{RouteReports, StatusCounts};
pub use watch::Watched;

use crate::config;

/// Who looks at all routes does nothing for so many times as long as that has taken: so they are never more than a
/// twentieth of a core, however many routes there are and however often they change.
const REST: u32 = 20;

/// The way to the API server, and what is watched there.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    liveness: Arc<Liveness>,
    namespaces: Arc<[String]>,
    reads_logs: bool,
    ends_sessions: bool,
    /// Where it is followed. `None`: where it was asked to.
    handle: Option<Handle>,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

/// Why there is no way to the API server.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum ClusterError {
    #[error(
        "no way to a Kubernetes API server: {0}; run in a pod, or name a kubeconfig with KUBECONFIG, or leave \
         `kubernetes` out of the configuration"
    )]
    Config(#[from] kube::config::InferConfigError),
    #[error("the Kubernetes API server cannot be spoken to: {0}")]
    Client(#[from] kube::Error),
}

// === impl Cluster ===

impl Cluster {
    /// Finds the API server as every client does: the kubeconfig, else the pod's service account. Nothing is asked yet,
    /// so it need not be up. All that follows the cluster runs in `handle`.
    ///
    /// # Errors
    /// When neither is there, or what they say cannot be used.
    pub async fn new(config: &config::Kubernetes, handle: Option<&Handle>) -> Result<Self, ClusterError> {
        let found = kube::Config::infer().await?;
        let liveness = Arc::default();
        let client = {
            let _inside = handle.map(Handle::enter);
            connect::client(found, &liveness)?
        };
        Ok(Self { handle: handle.cloned(), ..Self::with(client, liveness, config) })
    }

    /// Speaks to the API server through this client, which reports to `liveness`.
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

    /// The API server that answers so.
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
        Self::with(Client::new(liveness.over(service), "default"), liveness, config)
    }

    /// The client.
    pub const fn client(&self) -> &Client {
        &self.client
    }

    /// What is known of the connections to the API server.
    pub const fn liveness(&self) -> &Arc<Liveness> {
        &self.liveness
    }

    /// Objects of a kind in one namespace.
    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType: Default>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Objects of a kind, in each of the namespaces that are served, or in all at once.
    pub fn apis<K>(&self) -> Vec<Api<K>>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType: Default>,
    {
        if self.namespaces.is_empty() {
            return vec![Api::all(self.client.clone())];
        }
        self.namespaces.iter().map(|namespace| self.api(namespace)).collect()
    }

    /// Whether routes of this namespace are served.
    pub fn serves(&self, namespace: &str) -> bool {
        self.namespaces.is_empty() || self.namespaces.iter().any(|served| served == namespace)
    }

    /// Whether logs of pods that start are to be read.
    pub const fn reads_logs(&self) -> bool {
        self.reads_logs
    }

    /// Whether sessions of ScaledObjects are ended.
    pub const fn ends_sessions(&self) -> bool {
        self.ends_sessions
    }

    /// Runs something until it ends or the cluster is left.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stopping = self.stopping.clone();
        let task = async move {
            tokio::select! {
                // The end first: nothing is written any more.
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

    /// Ends every watch, and waits until they have.
    pub async fn stop(&self) {
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
