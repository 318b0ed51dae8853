//! `GET /api/v1/requests`: recent requests and their timelines.

use axum::{
    Json,
    extract::{Path, Query, State},
    http::{StatusCode, header::CACHE_CONTROL},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::json;

use super::Admin;
use crate::history;

/// Query parameters of a list.
#[derive(Deserialize)]
pub(super) struct RequestQuery {
    route: Option<String>,
    outcome: Option<String>,
    limit: Option<usize>,
}

/// Default number of requests in a list.
const DEFAULT_LIMIT: usize = 50;

/// Lists the last requests that ended, newest first.
pub(super) async fn recent(State(admin): State<Admin>, Query(query): Query<RequestQuery>) -> Response {
    let history = admin.view.history();
    let wanted = history::Query { route: query.route.as_deref(), outcome: query.outcome.as_deref() };
    let requests = history.recent(wanted, query.limit.unwrap_or(DEFAULT_LIMIT));
    answer(StatusCode::OK, &json!({ "requests": requests, "kept": history.kept() }))
}

/// Returns the requests with an id, newest first; a client may reuse an id.
pub(super) async fn one(State(admin): State<Admin>, Path(request_id): Path<String>) -> Response {
    let history = admin.view.history();
    let requests = history.find(&request_id);
    if !requests.is_empty() {
        return answer(StatusCode::OK, &json!({ "requests": requests }));
    }
    let kept = history.kept();
    let message =
        format!("No request with the id `{request_id}` is known to this replica. {}", kept.explain());
    let error = json!({
        "message": message,
        "type": "invalid_request_error",
        "param": null,
        "code": "request_not_kept",
    });
    answer(StatusCode::NOT_FOUND, &json!({ "error": error, "kept": kept }))
}

/// Responds with JSON that must not be cached.
fn answer(status: StatusCode, body: &serde_json::Value) -> Response {
    (status, [(CACHE_CONTROL, "no-store")], Json(body)).into_response()
}
