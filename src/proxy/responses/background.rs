//! Jobs of `POST /v1/responses` with `background: true`, on which the model server works after its response. They keep the
//! target up.
//!
//! Servers do not report the end of a job, so the replica that forwarded it polls.

use std::{sync::Arc, time::Duration};

use http::request;
use http_body_util::{BodyExt, Limited};
use tokio::time::{sleep, timeout};

use super::query::query;
use crate::{
    admission::{BackgroundJob, Gate},
    domain::{Period, UpstreamTimeouts},
    openai,
    proxy::{lease::Lease, outgoing::OutgoingBody},
    state::Endpoint,
    upstream::{Reuse, Upstream},
};

/// A background job to poll after its request.
pub(super) struct BackgroundResponse {
    gate: Arc<Gate>,
    endpoint: Arc<Endpoint>,
    pool: Arc<Upstream<OutgoingBody>>,
    path: String,
    /// Poll request; its URI is set once the id is known.
    poll: Option<request::Parts>,
}

/// Bounds of the poll interval, which doubles.
const MIN_POLL_INTERVAL: Duration = Duration::from_secs(1);
const MAX_POLL_INTERVAL: Duration = Duration::from_secs(10);

/// Time limit of one poll.
const POLL_TIMEOUT: Period = Period::from_secs(10);

/// Consecutive failures before polling stops. A busy server may miss a few.
const MAX_FAILURES: u32 = 3;

/// Maximum bytes of a polled response. A longer one is finished: an unfinished one has no output yet.
const MAX_RESPONSE_BYTES: usize = 1 << 20;

impl BackgroundResponse {
    /// Creates the job of a request.
    pub(super) fn new(head: &request::Parts, lease: &Lease) -> Self {
        let path = head.uri.path().to_owned();
        Self {
            gate: lease.permit.gate().clone(),
            endpoint: lease.permit.endpoint().clone(),
            pool: lease.pool.clone(),
            poll: query(&path, head),
            path,
        }
    }

    /// Polls the job in a task of its own until it ends or its endpoint is removed, at most for
    /// `upstream.responseTimeout`, the limit of a foreground request.
    pub(super) fn follow(mut self, id: &str) {
        let Some(mut poll) = self.poll.take() else { return };
        let Ok(uri) = format!("{}/{id}", self.path).parse() else { return };
        poll.uri = uri;
        let Some(job) = BackgroundJob::begin(&self.gate) else {
            return tracing::warn!(route = %self.gate.key(), "too many background jobs; not polling this one");
        };
        tokio::spawn(async move {
            let limit = self.gate.policy().upstream.response_timeout.get();
            let is_over = timeout(limit, self.poll_until_over(&poll)).await.is_ok();
            tracing::debug!(route = %self.gate.key(), is_over, "stopped polling a background job");
            drop(job);
        });
    }

    async fn poll_until_over(&self, poll: &request::Parts) {
        let mut interval = MIN_POLL_INTERVAL;
        let mut failures = 0;
        while failures < MAX_FAILURES {
            sleep(interval).await;
            interval = MAX_POLL_INTERVAL.min(2 * interval);
            let endpoints = self.gate.target().endpoints().clone();
            if !endpoints.iter().any(|endpoint| endpoint.id() == self.endpoint.id()) {
                return;
            }
            match self.is_running(poll).await {
                Some(true) => failures = 0,
                Some(false) => return,
                None => failures += 1,
            }
        }
    }

    /// Polls once. Returns `None` without a usable response.
    async fn is_running(&self, poll: &request::Parts) -> Option<bool> {
        let policy = self.gate.policy().upstream;
        let timeouts = UpstreamTimeouts { response_timeout: POLL_TIMEOUT, ..policy };
        let body = || Some(OutgoingBody::Full(None));
        let sent = self.pool.send(&self.endpoint, poll, body, timeouts, Reuse::Pooled).await;
        let (response, connection) = sent.ok()?;
        if response.status().is_server_error() {
            return None;
        }
        if !response.status().is_success() {
            // Deleted, or not accessible with these credentials.
            return Some(false);
        }
        let body = Limited::new(response.into_body(), MAX_RESPONSE_BYTES).collect();
        let Ok(Ok(body)) = timeout(POLL_TIMEOUT.get(), body).await else { return Some(false) };
        self.pool.put_back(connection);
        Some(openai::is_running(&body.to_bytes()))
    }
}
