//! Jobs of `POST /v1/responses` with `background: true`: the answer is out, and the model server works on. Until it has
//! done, its target does not idle out.
//!
//! No server tells when a job ends, so it is asked. The job is followed by the replica that passed it on.

use std::{sync::Arc, time::Duration};

use http::request;
use http_body_util::{BodyExt, Limited};
use tokio::time::{sleep, timeout};

use super::question;
use crate::{
    admission::{BackgroundJob, Gate},
    domain::{Period, UpstreamTimeouts},
    openai,
    proxy::{lease::Lease, outgoing::OutgoingBody},
    state::Endpoint,
    upstream::{Reuse, Upstream},
};

/// A job that may have to be followed.
pub(super) struct Background {
    gate: Arc<Gate>,
    endpoint: Arc<Endpoint>,
    pool: Arc<Upstream<OutgoingBody>>,
    /// The request for it.
    path: String,
    question: Option<request::Parts>,
}

/// The time between two questions: doubles from the first to the second.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);
const MAX_INTERVAL: Duration = Duration::from_secs(10);

/// How long the answer to a question may take.
const ANSWER_TIMEOUT: Period = Period::from_secs(10);

/// How many questions in a row may fail: the server may just be busy.
const MAX_FAILURES: u32 = 3;

/// A response in the making has no output yet, so that what is larger is one that has been made.
const MAX_RESPONSE_BYTES: usize = 1 << 20;

impl Background {
    /// A job that this request asks for.
    pub(super) fn new(head: &request::Parts, lease: &Lease) -> Self {
        let path = head.uri.path().to_owned();
        Self {
            gate: lease.permit.gate().clone(),
            endpoint: lease.permit.endpoint().clone(),
            pool: lease.pool.clone(),
            question: question(&path, head),
            path,
        }
    }

    /// Follows the job with this id in a task of its own: until it ends, or its endpoint has gone, at most for
    /// `upstream.responseTimeout`, which is what a request may take that is waited for.
    pub(super) fn follow(mut self, id: &str) {
        let Some(mut question) = self.question.take() else { return };
        let Ok(uri) = format!("{}/{id}", self.path).parse() else { return };
        question.uri = uri;
        let Some(job) = BackgroundJob::begin(&self.gate) else {
            return tracing::warn!(route = %self.gate.key(), "too many background jobs: one is not followed");
        };
        tokio::spawn(async move {
            let limit = self.gate.policy().upstream.response_timeout.get();
            let is_over = timeout(limit, self.until_over(&question)).await.is_ok();
            tracing::debug!(route = %self.gate.key(), is_over, "a background job is not followed any more");
            drop(job);
        });
    }

    async fn until_over(&self, question: &request::Parts) {
        let mut interval = FIRST_INTERVAL;
        let mut failures = 0;
        while failures < MAX_FAILURES {
            sleep(interval).await;
            interval = MAX_INTERVAL.min(2 * interval);
            let endpoints = self.gate.target().endpoints().clone();
            if !endpoints.iter().any(|endpoint| endpoint.id() == self.endpoint.id()) {
                return;
            }
            match self.is_running(question).await {
                Some(true) => failures = 0,
                Some(false) => return,
                None => failures += 1,
            }
        }
    }

    /// Whether the server says that the job runs; `None` if it says nothing.
    async fn is_running(&self, question: &request::Parts) -> Option<bool> {
        let policy = self.gate.policy().upstream;
        let timeouts = UpstreamTimeouts { response_timeout: ANSWER_TIMEOUT, ..policy };
        let body = || Some(OutgoingBody::Full(None));
        let sent = self.pool.send(&self.endpoint, question, body, timeouts, Reuse::Pooled).await;
        let (response, connection) = sent.ok()?;
        if response.status().is_server_error() {
            return None;
        }
        if !response.status().is_success() {
            // It has been deleted, or may not be seen.
            return Some(false);
        }
        let body = Limited::new(response.into_body(), MAX_RESPONSE_BYTES).collect();
        let Ok(Ok(body)) = timeout(ANSWER_TIMEOUT.get(), body).await else { return Some(false) };
        self.pool.put_back(connection);
        Some(openai::is_running(&body.to_bytes()))
    }
}
