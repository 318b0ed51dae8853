//! Reasons for having no response to a dispatch.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};

use crate::{admission::Permit, error::ProxyError, state::TrialResult};

/// The reason for a dispatch without a response.
pub(super) enum DispatchError {
    Retryable(RetryableFailure),
    Final(ProxyError),
}

/// A failed dispatch that may be retried.
pub(super) struct RetryableFailure {
    /// Kept until the request is queued again, so that the request still counts as in flight.
    pub(super) permit: Permit,
    pub(super) reason: String,
    /// The failure is the proxy's own and says nothing about the endpoint: retry without a backoff.
    pub(super) is_ours: bool,
    /// If the endpoint reset the connection after the request was written: its count of recoveries by then.
    pub(super) reset_at: Option<u32>,
}

/// Time limit for the verdict on an endpoint that reset a request. Longer than the default timeout of the probe that
/// the owner of the endpoint sends at once.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(2);

// === impl RetryableFailure ===

impl RetryableFailure {
    pub(super) fn of(permit: Permit, reason: String) -> Self {
        Self { permit, reason, is_ours: false, reset_at: None }
    }

    /// Returns when a retry makes sense: at once if another endpoint has capacity, else once the endpoint that reset the
    /// request is known to be alive (after `backoff`) or down (its owner has a backoff of its own).
    pub(super) async fn wait_for_verdict(&self, answers: u32, backoff: Duration) {
        let endpoint = self.permit.endpoint();
        if self.permit.gate().has_room_beside(endpoint) {
            return;
        }
        let retry_at = Instant::now() + backoff;
        match timeout(VERDICT_TIMEOUT, endpoint.verdict(answers)).await {
            Ok(TrialResult::Down) => {}
            Ok(TrialResult::Alive) => sleep_until(retry_at).await,
            Err(_) => self.permit.suspect(),
        }
    }
}
