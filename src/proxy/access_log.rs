//! The access log: one line per request, if `log.access` is set.

use std::time::Duration;

use http::HeaderValue;

use crate::{domain::RouteKey, history::RequestInfo, telemetry::ACCESS_TARGET};

/// Longest part of a request id that is logged. Clients may send their own.
const MAX_ID_CHARS: usize = 128;

/// A line of the access log.
pub(super) struct AccessLine<'a> {
    pub(super) request_id: &'a HeaderValue,
    /// `None` if the request was refused before a route was found.
    pub(super) route: Option<&'a RouteKey>,
    pub(super) info: &'a RequestInfo,
    pub(super) status: u16,
    /// Outcome, or the refusal of a request that was not admitted.
    pub(super) outcome: &'static str,
    /// Time in the hold queue.
    pub(super) waited: Duration,
    pub(super) total: Duration,
}

// === impl AccessLine ===

impl AccessLine<'_> {
    pub(super) fn log(&self) {
        // `to_str` accepts only visible ASCII, so slicing by bytes is safe.
        let request_id = self.request_id.to_str().unwrap_or_default();
        tracing::info!(
            target: ACCESS_TARGET,
            request_id = &request_id[..request_id.len().min(MAX_ID_CHARS)],
            route = self.route.map(RouteKey::as_str),
            model = self.info.model(),
            method = self.info.method().as_str(),
            path = self.info.path(),
            status = self.status,
            outcome = self.outcome,
            waited_ms = self.waited.as_millis() as u64,
            total_ms = self.total.as_millis() as u64,
            "access"
        );
    }
}
