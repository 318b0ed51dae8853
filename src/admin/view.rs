//! Interface to the state that the admin listener reads.

use std::{net::SocketAddr, sync::Arc};

use axum::http::{HeaderMap, HeaderValue};

use crate::{admission::Gate, error::ProxyError, history::RequestHistory, telemetry::RouteCounters};

/// State read by the admin listener.
pub trait View: Send + Sync {
    /// Returns the address of the API.
    fn address(&self) -> SocketAddr;
    /// Returns a model to use in examples.
    fn example(&self) -> Option<String>;
    /// Checks the `Host` of a request and the web page that sent it; `opens_page` skips the latter.
    ///
    /// # Errors
    ///
    /// If either belongs to another site.
    fn check_page(&self, host: &str, headers: &HeaderMap, opens_page: bool) -> Result<(), ProxyError>;
    /// Returns the origin of the page that sent the request, if it is listed.
    fn listed_origin(&self, headers: &HeaderMap) -> Option<HeaderValue>;
    /// Returns the gates of all routes.
    fn gates(&self) -> Vec<Arc<Gate>>;
    /// Returns the counters of requests without a route.
    fn unrouted(&self) -> &RouteCounters;
    /// Returns the history of recent requests.
    fn history(&self) -> &RequestHistory;
    /// Returns the bytes of memory used on behalf of clients, by kind.
    fn memory(&self) -> Vec<(&'static str, usize)>;
    /// Returns whether the routes of the cluster are still unknown.
    fn awaits_routes(&self) -> bool;
    /// Returns whether a scaler is configured.
    fn has_scaler(&self) -> bool;
    /// Returns the number of other replicas by state; empty without peers.
    fn peers(&self) -> Vec<(&'static str, usize)>;
    /// Returns the number of spans by outcome, if traces are exported.
    fn spans(&self) -> Option<[(&'static str, u64); 3]>;
    /// Returns counts of the cluster, if one is configured.
    fn cluster(&self) -> Option<ClusterCounts>;
}

/// Counts of cluster objects, status writes and watches.
#[derive(Clone, Debug, Default)]
pub struct ClusterCounts {
    /// Number of objects by kind and verdict.
    pub routes: Vec<(&'static str, &'static str, usize)>,
    /// Number of status writes by outcome.
    pub status_writes: Vec<(&'static str, u64)>,
    /// Watches of the API server: number open, number of losses since the start, number currently lost.
    pub watches: (usize, u64, usize),
}
