//! Publication of demand: the scaler for KEDA, and the exchange with other replicas.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::{HeaderMap, HeaderValue};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{StartError, cluster::ClusterMetrics};
use crate::{
    admin::{self, ClusterCounts},
    admission::{Directory, Gate},
    config::{self, Config},
    error::ProxyError,
    grpc::{GrpcListener, Tls},
    history::RequestHistory,
    peer::PeerGroup,
    proxy::{Shared, is_address},
    scaler::keda,
    telemetry::RouteCounters,
};

/// Bound listeners, not serving yet.
pub(super) struct BoundListeners {
    scaler: Option<GrpcListener>,
    peers: Option<(GrpcListener, config::Peers)>,
}

/// Serving listeners.
pub(super) struct RunningListeners {
    tasks: TaskTracker,
    draining: CancellationToken,
    stopping: CancellationToken,
    has_scaler: bool,
    peers: Option<Arc<PeerGroup>>,
}

/// State for the admin listener.
pub(super) struct AppView {
    address: SocketAddr,
    shared: Arc<Shared>,
    has_scaler: bool,
    peers: Option<Arc<PeerGroup>>,
    cluster: Option<ClusterMetrics>,
}

/// Sampling interval of request rates.
const RATE_SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

// === impl BoundListeners ===

impl BoundListeners {
    /// Binds the configured listeners.
    pub(super) async fn bind(config: &Config) -> Result<Self, StartError> {
        let tls = config.scaler_tls.clone().map(Tls::load).transpose()?;
        let failed = |key, address| move |source| StartError::Listen { key, address, source };
        let scaler = match config.scaler {
            Some(address) => Some(GrpcListener::bind(address, tls).await.map_err(failed("scaler", address))?),
            None => None,
        };
        let peers = match &config.peers {
            Some(peers) => {
                let listener = GrpcListener::bind(peers.listen, None).await;
                Some((listener.map_err(failed("peers.listen", peers.listen))?, peers.clone()))
            }
            None => None,
        };
        Ok(Self { scaler, peers })
    }

    pub(super) fn scaler_address(&self) -> Option<SocketAddr> {
        self.scaler.as_ref()?.local_addr().ok()
    }

    pub(super) fn peers_address(&self) -> Option<SocketAddr> {
        self.peers.as_ref()?.0.local_addr().ok()
    }

    /// Serves these routes.
    pub(super) fn start(self, routes: Arc<Directory>) -> RunningListeners {
        let tasks = TaskTracker::new();
        let stopping = CancellationToken::new();
        let draining = stopping.child_token();
        let has_scaler = self.scaler.is_some();
        if has_scaler || self.peers.is_some() {
            tasks.spawn(stopping.clone().run_until_cancelled_owned(sample(routes.clone())));
        }
        if let Some(listener) = self.scaler {
            tasks.spawn(keda::serve(listener, routes.clone(), draining.clone(), stopping.clone()));
        }
        let peers = self.peers.map(|(listener, config)| {
            let peers = Arc::new(PeerGroup::new(routes, config));
            let (running, stopping) = (peers.clone(), stopping.clone());
            tasks.spawn(async move { running.run(listener, stopping).await });
            peers
        });
        tasks.close();
        RunningListeners { tasks, draining, stopping, has_scaler, peers }
    }
}

async fn sample(routes: Arc<Directory>) {
    let mut ticks = interval(RATE_SAMPLE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        routes.gates().values().for_each(|gate| gate.sample_rate());
    }
}

// === impl RunningListeners ===

impl RunningListeners {
    /// Closes KEDA's streams, so that it connects to another replica. The demand of this replica still counts: other
    /// replicas keep reading it.
    pub(super) fn drain(&self) {
        self.draining.cancel();
    }

    /// Shuts down all listeners, within a bounded time.
    pub(super) async fn stop(&self) {
        self.stopping.cancel();
        self.tasks.wait().await;
    }

    /// Returns the state for the admin listener.
    pub(super) fn view(
        &self,
        address: SocketAddr,
        shared: Arc<Shared>,
        cluster: Option<ClusterMetrics>,
    ) -> AppView {
        AppView { address, shared, has_scaler: self.has_scaler, peers: self.peers.clone(), cluster }
    }
}

// === impl AppView ===

impl admin::View for AppView {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn example(&self) -> Option<String> {
        self.shared.table.load().models().first().map(|model| model.to_string())
    }

    fn check_page(&self, host: &str, headers: &HeaderMap, opens_page: bool) -> Result<(), ProxyError> {
        let guard = &self.shared.cross_site;
        let table = self.shared.table.load();
        // Addresses are allowed: DNS rebinding needs a host name, and the kubelet probes the pod's address, which may
        // be public.
        guard.check_host(host, |name| is_address(name) || table.names_host(name))?;
        if opens_page { Ok(()) } else { guard.check_page(host, headers) }
    }

    fn listed_origin(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        self.shared.cross_site.listed_origin(headers)
    }

    fn gates(&self) -> Vec<Arc<Gate>> {
        self.shared.table.load().gates().to_vec()
    }

    fn unrouted(&self) -> &RouteCounters {
        &self.shared.unrouted
    }

    fn history(&self) -> &RequestHistory {
        &self.shared.history
    }

    fn memory(&self) -> Vec<(&'static str, usize)> {
        self.shared.memory.kinds().to_vec()
    }

    fn awaits_routes(&self) -> bool {
        self.shared.awaits_routes.load(Ordering::Relaxed)
    }

    fn has_scaler(&self) -> bool {
        self.has_scaler
    }

    fn peers(&self) -> Vec<(&'static str, usize)> {
        let states = self.peers.iter().flat_map(|peers| peers.states());
        states.map(|(state, number)| (state.name(), number)).collect()
    }

    fn spans(&self) -> Option<[(&'static str, u64); 3]> {
        self.shared.traces.get().map(|traces| traces.counts().all())
    }

    fn cluster(&self) -> Option<ClusterCounts> {
        self.cluster.as_ref().map(ClusterMetrics::counts)
    }
}
