//! `GET /api/v1/events`: state changes as server-sent events.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    http::{
        StatusCode,
        header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER},
    },
    response::{IntoResponse, Response},
};
use futures_util::stream;
use tokio::time::timeout;

use super::live::{Live, WATCHERS, Watcher};

/// Interval of comments without events, so that proxies do not time out.
const COMMENT_INTERVAL: Duration = Duration::from_secs(15);

/// State of a stream.
enum StreamState {
    Send(Watcher),
    End,
}

/// Streams the state. A slow reader gets the newest state when it continues; nothing is buffered for it.
pub(super) fn follow(live: &Arc<Live>) -> Response {
    let Some(watcher) = live.watch() else {
        return reject(
            StatusCode::SERVICE_UNAVAILABLE,
            &format!("{WATCHERS} are watching already, which is the maximum: close one, or try again later"),
        );
    };
    let events = stream::unfold(StreamState::Send(watcher), |step| async {
        let StreamState::Send(mut watcher) = step else { return None };
        let (event, next) = match timeout(COMMENT_INTERVAL, watcher.next()).await {
            Ok(Some(event)) => (event, StreamState::Send(watcher)),
            Ok(None) => ("event: end\ndata: {}\n\n".to_owned(), StreamState::End),
            Err(_) => (": nothing new\n\n".to_owned(), StreamState::Send(watcher)),
        };
        Some((Ok::<_, Infallible>(event), next))
    });
    // `x-accel-buffering` keeps nginx from buffering events.
    let headers = [
        (CONTENT_TYPE.as_str(), "text/event-stream"),
        (CACHE_CONTROL.as_str(), "no-store"),
        ("x-accel-buffering", "no"),
    ];
    (headers, Body::from_stream(events)).into_response()
}

fn reject(status: StatusCode, message: &str) -> Response {
    (status, [(RETRY_AFTER, "5")], Json(serde_json::json!({ "error": message }))).into_response()
}
