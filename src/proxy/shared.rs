//! State of the request path: [`Shared`] by all threads, and the [`Proxy`] of each.

use std::sync::{Arc, OnceLock, atomic::AtomicBool};

use arc_swap::{ArcSwap, ArcSwapOption};

use super::{
    catalog::Catalog, connections::Connections, cross_site::CrossSiteGuard, memory::Memory,
    outgoing::OutgoingBody, responses::ResponseOwners, scan::BodyScanner, table::RouteTable,
};
use crate::{
    config::{self, Limits},
    history::RequestHistory,
    telemetry::{RouteCounters, traces::SpanQueue},
    upstream::{Dialer, Upstream},
};

/// State shared by all threads that serve requests.
pub struct Shared {
    /// Current routes. Replaced as a whole by each reload.
    pub table: ArcSwap<RouteTable>,
    /// Endpoints of stored responses.
    pub(super) responses: ResponseOwners,
    /// The model list of the last `GET /v1/models`.
    pub(super) catalog: ArcSwapOption<Catalog>,
    /// Current limits. Replaced by [`Shared::set_limits`].
    pub limits: ArcSwap<Limits>,
    /// Client connections, counted and bounded.
    pub connections: Arc<Connections>,
    /// Memory that clients make the proxy hold, bounded by `limits.maxBufferedBytes`.
    pub memory: Arc<Memory>,
    /// Scans bodies for their model, large ones in a bounded number at a time.
    pub(super) scanner: BodyScanner,
    /// Timelines of requests that waited or failed.
    pub history: Arc<RequestHistory>,
    /// Counters of requests that match no route.
    pub unrouted: RouteCounters,
    /// Set before shutdown: responses over HTTP/1 carry `Connection: close` from then on.
    pub draining: AtomicBool,
    /// Set when the drain timeout has aborted the remaining requests; their outcome is `draining`.
    pub drain_timed_out: AtomicBool,
    /// True if each request is logged (`log.access`).
    pub access_log: AtomicBool,
    /// Set until the routes of the cluster have been read.
    pub awaits_routes: AtomicBool,
    /// Rejects requests from pages of other sites.
    pub cross_site: CrossSiteGuard,
    /// Trace exporter; unset without one. Set before the first request or never.
    pub traces: OnceLock<Arc<SpanQueue>>,
}

/// The request path of one thread, with its own pool of upstream connections.
#[derive(Clone)]
pub struct Proxy {
    pub(super) shared: Arc<Shared>,
    pub(super) upstream: Arc<Upstream<OutgoingBody>>,
    pub(super) traces: Option<Arc<SpanQueue>>,
}

// === impl Shared ===

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl Shared {
    /// Creates state with no routes.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            table: ArcSwap::default(),
            responses: ResponseOwners::default(),
            memory: Memory::new(limits.max_buffered_bytes.get()),
            catalog: ArcSwapOption::default(),
            limits: ArcSwap::from_pointee(limits),
            connections: Arc::default(),
            scanner: BodyScanner::default(),
            unrouted: RouteCounters::default(),
            history: RequestHistory::new(config::History::default().requests),
            draining: AtomicBool::new(false),
            drain_timed_out: AtomicBool::new(false),
            access_log: AtomicBool::new(false),
            awaits_routes: AtomicBool::new(false),
            cross_site: CrossSiteGuard::default(),
            traces: OnceLock::new(),
        })
    }

    /// Applies reloaded limits. Open connections keep their timeouts.
    pub fn set_limits(&self, limits: Limits) {
        self.memory.set_max(limits.max_buffered_bytes.get());
        self.limits.store(Arc::new(limits));
    }
}

// === impl Proxy ===

impl Proxy {
    /// Creates the request path of one thread. Call after [`Shared::traces`] is set.
    pub fn new(shared: Arc<Shared>, dialer: Dialer) -> Arc<Self> {
        let traces = shared.traces.get().cloned();
        Arc::new(Self { shared, upstream: Arc::new(Upstream::new(dialer)), traces })
    }

    /// Returns the state shared by all threads.
    pub const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Closes upstream connections whose idle timeout has expired.
    pub fn sweep(&self) {
        self.upstream.sweep();
    }
}
