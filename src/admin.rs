//! The admin listener: metrics, probes, the JSON API and the dashboard. It reads handles and changes nothing.

mod api;
mod connections;
mod dashboard;
mod events;
mod live;
mod metrics;
mod requests;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::{HeaderMap, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
    serve::ListenerExt as _,
};
use prometheus_client::registry::Registry;
use serde::Deserialize;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{admission::Gate, coldstart::ColdStarts, history::History, telemetry::RouteCounters};
pub use api::RouteStatus;
use connections::Bounded;
pub use dashboard::THEME_CSS;
use live::Live;
pub use metrics::ColdStartMetrics;

/// How long a connection may neither answer nor take what it is sent.
const SILENCE: Duration = Duration::from_secs(60);

/// What the admin listener reads of the request path, as it is now.
pub trait View: Send + Sync {
    /// Where requests come in.
    fn address(&self) -> SocketAddr;
    /// A model that may be asked for.
    fn example(&self) -> Option<String>;
    /// Every route.
    fn gates(&self) -> Vec<Arc<Gate>>;
    /// What is counted of requests that belong to no route.
    fn unrouted(&self) -> &RouteCounters;
    /// What happened to recent requests.
    fn history(&self) -> &History;
    /// Bytes in memory that clients make this process keep, by kind.
    fn memory(&self) -> [(&'static str, usize); 3];
    /// Whether the routes of the cluster are not known yet.
    fn awaits_routes(&self) -> bool;
    /// Whether there is a scaler.
    fn has_scaler(&self) -> bool;
    /// How many other replicas are in each state, if there may be any.
    fn peers(&self) -> Vec<(&'static str, usize)>;
    /// What became of the spans of traces, if they are exported.
    fn spans(&self) -> Option<[(&'static str, u64); 3]>;
    /// What is counted of the routes of the cluster, if there is one.
    fn cluster(&self) -> Option<ClusterCounts>;
}

/// What is counted of the routes of the cluster.
#[derive(Clone, Debug, Default)]
pub struct ClusterCounts {
    /// How many objects there are of each kind with each verdict.
    pub routes: Vec<(&'static str, &'static str, usize)>,
    /// What became of writing their status.
    pub status_writes: Vec<(&'static str, u64)>,
    /// Watches of the API server that are open, were lost since we came, and are lost now.
    pub watches: (usize, u64, usize),
}

/// What the admin listener shows.
#[derive(Clone)]
pub struct Admin {
    view: Arc<dyn View>,
    cold_starts: Arc<ColdStarts>,
    draining: Arc<AtomicBool>,
    registry: Arc<Registry>,
    live: Arc<Live>,
}

#[derive(Deserialize)]
struct ColdStartQuery {
    route: Option<String>,
    limit: Option<usize>,
}

// === impl Admin ===

impl Admin {
    /// Shows these; what it shows live ends with `stopped`.
    pub fn new(
        view: Arc<dyn View>,
        cold_starts: Arc<ColdStarts>,
        cold_start_metrics: &ColdStartMetrics,
        draining: Arc<AtomicBool>,
        stopped: CancellationToken,
    ) -> Self {
        let registry = Arc::new(metrics::registry(view.clone(), cold_start_metrics));
        let live = Live::new(view.clone(), cold_starts.clone(), draining.clone(), stopped);
        Self { view, cold_starts, draining, registry, live }
    }

    /// Keeps what is shown live up to date, until stopped.
    pub fn run(&self) -> impl Future<Output = ()> + use<> {
        self.live.clone().run()
    }

    /// Serves on this listener. Its connections end with whoever opened them, or when they do not answer, or do not take
    /// what they are sent, for a minute: one that follows the events has one of few places.
    pub async fn serve(self, listener: TcpListener) {
        let listener = Bounded::new(listener).tap_io(|connection| {
            let socket = SockRef::from(connection.stream());
            // Neither fails on a connection that lives.
            let _ = socket
                .set_tcp_keepalive(&TcpKeepalive::new().with_time(SILENCE / 2).with_interval(SILENCE / 6));
            #[cfg(target_os = "linux")]
            let _ = socket.set_tcp_user_timeout(Some(SILENCE));
        });
        // It accepts until it is dropped.
        let _ = axum::serve(listener, self.router()).await;
    }

    fn router(self) -> Router {
        Router::new()
            .route("/", get(dashboard::page))
            .route("/dashboard/{name}", get(dashboard::asset))
            .route("/metrics", get(scrape))
            .route("/livez", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/api/v1/routes", get(routes))
            .route("/api/v1/cold-starts", get(cold_starts))
            .route("/api/v1/events", get(events))
            .route("/api/v1/requests", get(requests::recent))
            // An id may be anything, also something with a slash.
            .route("/api/v1/requests/{*request_id}", get(requests::one))
            .with_state(self)
    }
}

async fn scrape(State(admin): State<Admin>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &admin.registry) {
        Ok(()) => ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn readyz(State(admin): State<Admin>) -> (StatusCode, &'static str) {
    match admin.draining.load(Ordering::Relaxed) {
        true => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
        // It would say 404 to requests that are served as soon as it knows.
        false if admin.view.awaits_routes() => {
            (StatusCode::SERVICE_UNAVAILABLE, "the routes of the cluster are not known yet\n")
        }
        false => (StatusCode::OK, "ok\n"),
    }
}

async fn routes(State(admin): State<Admin>) -> Json<serde_json::Value> {
    let routes: Vec<_> = admin.view.gates().iter().map(|gate| RouteStatus::of(gate)).collect();
    Json(serde_json::json!({ "routes": routes }))
}

async fn cold_starts(
    State(admin): State<Admin>,
    Query(query): Query<ColdStartQuery>,
) -> Json<serde_json::Value> {
    let recent = admin.cold_starts.recent(query.route.as_deref(), query.limit.unwrap_or(20));
    Json(serde_json::json!({ "cold_starts": recent }))
}

async fn events(State(admin): State<Admin>, headers: HeaderMap) -> Response {
    events::follow(&admin.live, &headers)
}
