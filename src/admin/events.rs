//! `GET /api/v1/events`: the state as server-sent events, as it changes.

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

/// After so long without an event comes a comment, so that nothing in between takes the connection for dead.
const SILENCE: Duration = Duration::from_secs(15);

/// What a stream does next.
enum Step {
    Tell(Watcher),
    End,
}

/// Follows the state. A reader that is slow is told the newest state when it reads on, and nothing is kept for it.
pub(super) fn follow(live: &Arc<Live>) -> Response {
    let Some(watcher) = live.watch() else {
        return refused(
            StatusCode::SERVICE_UNAVAILABLE,
            &format!("{WATCHERS} are watching already, and no more may: close one, or try again later"),
        );
    };
    let events = stream::unfold(Step::Tell(watcher), |step| async {
        let Step::Tell(mut watcher) = step else { return None };
        let (event, next) = match timeout(SILENCE, watcher.next()).await {
            Ok(Some(event)) => (event, Step::Tell(watcher)),
            Ok(None) => ("event: end\ndata: {}\n\n".to_owned(), Step::End),
            Err(_) => (": nothing new\n\n".to_owned(), Step::Tell(watcher)),
        };
        Some((Ok::<_, Infallible>(event), next))
    });
    // The last one is for nginx, which would gather events otherwise.
    let headers = [
        (CONTENT_TYPE.as_str(), "text/event-stream"),
        (CACHE_CONTROL.as_str(), "no-store"),
        ("x-accel-buffering", "no"),
    ];
    (headers, Body::from_stream(events)).into_response()
}

fn refused(status: StatusCode, message: &str) -> Response {
    (status, [(RETRY_AFTER, "5")], Json(serde_json::json!({ "error": message }))).into_response()
}
