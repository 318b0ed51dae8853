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
    extract::{Query, Request, State},
    http::{
        HeaderMap, HeaderValue, Method, StatusCode,
        header::{ACCESS_CONTROL_ALLOW_ORIGIN, CONTENT_TYPE, HOST, VARY},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
    serve::ListenerExt as _,
};
use prometheus_client::registry::Registry;
use serde::Deserialize;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    admission::Gate, coldstart::ColdStarts, error::ProxyError, history::History, telemetry::RouteCounters,
};
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
    /// Checks the `Host` of a request, and the web page that has sent it unless it opens one of ours.
    ///
    /// # Errors
    /// When either is another site's.
    fn check_page(&self, host: &str, headers: &HeaderMap, opens_page: bool) -> Result<(), ProxyError>;
    /// The origin of the page that has sent a request, if it is listed.
    fn listed_origin(&self, headers: &HeaderMap) -> Option<HeaderValue>;
    /// Every route.
    fn gates(&self) -> Vec<Arc<Gate>>;
    /// What is counted of requests that belong to no route.
    fn unrouted(&self) -> &RouteCounters;
    /// What happened to recent requests.
    fn history(&self) -> &History;
    /// Bytes in memory that clients make this process keep, by kind.
    fn memory(&self) -> Vec<(&'static str, usize)>;
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
            .layer(middleware::from_fn_with_state(self.clone(), guard))
            .with_state(self)
    }
}

/// Lets a request through unless a web page of another site has sent it, or it came by a name that is none of ours.
async fn guard(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let is = |name: &str, value: &str| headers.get(name).is_some_and(|given| given == value);
    // A link to the dashboard may be anywhere. What it opens shows nothing to the page that has it.
    let opens_page = request.uri().path() == "/"
        && *request.method() == Method::GET
        && is("sec-fetch-mode", "navigate")
        && is("sec-fetch-dest", "document");
    let mut hosts = headers.get_all(HOST).iter();
    let host = match (request.uri().authority(), hosts.next()) {
        (Some(authority), _) => Some(authority.as_str()),
        (None, Some(host)) => host.to_str().ok(),
        // HTTP/1.0, which no browser speaks.
        (None, None) => Some("localhost"),
    };
    let checked = match host.filter(|_| hosts.next().is_none()) {
        Some(host) => admin.view.check_page(host, headers, opens_page),
        None => Err(ProxyError::Ambiguous("The request's Host is no host.".into())),
    };
    if let Err(error) = checked {
        let answer = error.answer();
        let body = serde_json::json!({ "error": error.to_string(), "code": answer.code });
        return (answer.status, Json(body)).into_response();
    }
    let origin = admin.view.listed_origin(headers);
    let mut response = next.run(request).await;
    if let Some(origin) = origin {
        response.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        response.headers_mut().append(VARY, HeaderValue::from_static("Origin"));
    }
    response
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

async fn events(State(admin): State<Admin>) -> Response {
    events::follow(&admin.live)
}
