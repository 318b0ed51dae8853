//! Admin listener: metrics, probes, the JSON API and the dashboard. Read-only.

mod api;
mod connections;
mod dashboard;
mod events;
mod live;
mod metrics;
mod requests;
mod state;
mod view;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{
    Json, Router,
    extract::{ConnectInfo, Query, Request, State},
    http::{
        HeaderValue, Method, StatusCode,
        header::{ACCESS_CONTROL_ALLOW_ORIGIN, CONTENT_TYPE, HOST, VARY},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{coldstart::ColdStarts, error::ProxyError};
pub use api::RouteStatus;
use connections::{BoundedListener, LargeAnswer};
pub use dashboard::THEME_CSS;
use live::Live;
pub use metrics::ColdStartMetrics;
pub use state::Admin;
pub use view::{ClusterCounts, View};

#[derive(Deserialize)]
struct ColdStartQuery {
    route: Option<String>,
    limit: Option<usize>,
}

// === impl Admin ===

impl Admin {
    /// Creates the listener's state; live events end with `stopped`.
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

    /// Keeps live events up to date until stopped.
    pub fn run(&self) -> impl Future<Output = ()> + use<> {
        self.live.clone().run()
    }

    /// Accepts connections until the future is dropped. Connections whose client acknowledges nothing are closed after
    /// a minute: each may hold one of the few slots for event streams.
    pub async fn serve(self, listener: TcpListener) {
        // axum accepts until this future is dropped; there is no result to handle.
        let router = self.router().layer(middleware::from_fn(bound_large_answers));
        let service = router.into_make_service_with_connect_info::<LargeAnswer>();
        let _ = axum::serve(BoundedListener::new(listener), service).await;
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
            // A request id is chosen by the client and may contain a slash.
            .route("/api/v1/requests/{*request_id}", get(requests::one))
            .layer(middleware::from_fn_with_state(self.clone(), guard))
            .with_state(self)
    }
}

/// Rejects requests sent by a web page of another site or for a foreign host name.
async fn guard(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let is = |name: &str, value: &str| headers.get(name).is_some_and(|given| given == value);
    // Any page may link to the dashboard; the linking page cannot read it.
    let opens_page = request.uri().path() == "/"
        && *request.method() == Method::GET
        && is("sec-fetch-mode", "navigate")
        && is("sec-fetch-dest", "document");
    let mut hosts = headers.get_all(HOST).iter();
    let host = match (request.uri().authority(), hosts.next()) {
        (Some(authority), _) => Some(authority.as_str()),
        (None, Some(host)) => host.to_str().ok(),
        // HTTP/1.0, which browsers do not use.
        (None, None) => Some("localhost"),
    };
    let checked = match host.filter(|_| hosts.next().is_none()) {
        Some(host) => admin.view.check_page(host, headers, opens_page),
        None => Err(ProxyError::Ambiguous("Invalid Host header.".into())),
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

/// Makes responses whose size grows with the number of routes or requests wait for a place. Probes never wait for one.
async fn bound_large_answers(
    ConnectInfo(answer): ConnectInfo<LargeAnswer>,
    request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    if path == "/metrics" || path.starts_with("/api/") {
        answer.reserve().await;
    }
    next.run(request).await
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
        // Until the routes are known, requests get 404.
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
