//! `GET /api/v1/requests`: what happened to recent requests.

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

/// What a list is asked for.
#[derive(Deserialize)]
pub(super) struct RequestQuery {
    route: Option<String>,
    outcome: Option<String>,
    limit: Option<usize>,
}

/// How many a list has that asks for no number.
const USUAL: usize = 50;

/// The last that ended, newest first.
pub(super) async fn recent(State(admin): State<Admin>, Query(query): Query<RequestQuery>) -> Response {
    let history = admin.view.history();
    let wanted = history::Query { route: query.route.as_deref(), outcome: query.outcome.as_deref() };
    let requests = history.recent(wanted, query.limit.unwrap_or(USUAL));
    answer(StatusCode::OK, &json!({ "requests": requests, "kept": history.kept() }))
}

/// Those of one id, newest first: a client may use an id more than once.
pub(super) async fn one(State(admin): State<Admin>, Path(request_id): Path<String>) -> Response {
    let history = admin.view.history();
    let requests = history.find(&request_id);
    if !requests.is_empty() {
        return answer(StatusCode::OK, &json!({ "requests": requests }));
    }
    let kept = history.kept();
    let message = format!("No request with the id `{request_id}` is known here. {}", kept.explain());
    let error = json!({
        "message": message,
        "type": "invalid_request_error",
        "param": null,
        "code": "request_not_kept",
    });
    answer(StatusCode::NOT_FOUND, &json!({ "error": error, "kept": kept }))
}

/// What is true now may not be in a moment.
fn answer(status: StatusCode, body: &serde_json::Value) -> Response {
    (status, [(CACHE_CONTROL, "no-store")], Json(body)).into_response()
}
