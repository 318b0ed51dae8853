//! Finding the endpoint of a stored response (`/v1/responses`).

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use http::request;
use tokio::time::timeout;

use super::{ResponseAffinity, question};
use crate::{
    admission::Gate,
    domain::{Period, UpstreamTimeouts},
    error::ProxyError,
    openai::{self, ResponseRequest},
    proxy::{Proxy, outgoing::OutgoingBody, request::RequestBody, scan::encoding},
    state::Endpoint,
    upstream::Reuse,
};

/// How many endpoints are asked for one request, and how many of them at the same time.
const MAX_ASKED: usize = 64;
const ASKED_AT_ONCE: usize = 8;

/// How long one endpoint may take to answer, and all of them.
const ANSWER_TIMEOUT: Period = Period::from_secs(2);
const SEARCH_TIMEOUT: Duration = Duration::from_secs(10);

// === impl Proxy ===

impl Proxy {
    /// The endpoint that keeps a response, of these routes.
    pub(in crate::proxy) async fn find_stored_response(
        &self,
        id: &str,
        gates: &[Arc<Gate>],
        head: &request::Parts,
    ) -> Result<(Arc<Gate>, Arc<Endpoint>), ProxyError> {
        let path = head.uri.path();
        if !gates.iter().any(|gate| gate.target().is_up()) {
            return Err(ProxyError::NotKept(path.into()));
        }
        let end = path.rfind(&format!("/{id}")).unwrap_or(path.len());
        let found = self.keeper(id, &path[..end], gates, head).await;
        found.ok_or_else(|| ProxyError::NoSuchResponse(id.into()))
    }

    /// Reads what a request that makes a response says: which one it continues, and so where it has to go.
    pub(in crate::proxy) async fn kept(
        &self,
        gate: &Arc<Gate>,
        head: &request::Parts,
        body: RequestBody,
    ) -> Result<(RequestBody, Option<Box<ResponseAffinity>>), ProxyError> {
        let mut kept = Box::new(ResponseAffinity { pin: None, makes: true, background: false });
        let read = match body {
            RequestBody::Buffered(read) => read,
            // It cannot be read, and its route does not depend on it.
            RequestBody::Unread(_) if encoding(&head.headers).is_some() => return Ok((body, Some(kept))),
            RequestBody::Unread(body) => self.read(head, body).await?,
        };
        let asked = ResponseRequest::read(&read.bytes);
        kept.background = asked.background == Some(true);
        if let Some(previous) = asked.previous.filter(|id| openai::is_response_id(id)) {
            let found = self.keeper(&previous, head.uri.path(), std::slice::from_ref(gate), head).await;
            // Where none has it, a server says so.
            kept.pin = found.map(|(_, endpoint)| endpoint.id());
        }
        Ok((RequestBody::Buffered(read), Some(kept)))
    }

    /// The endpoint of these routes that keeps a response: the one that is known to, or the only one that is ready, or the
    /// one that says so. `path` is that of all responses.
    async fn keeper(
        &self,
        id: &str,
        path: &str,
        gates: &[Arc<Gate>],
        head: &request::Parts,
    ) -> Option<(Arc<Gate>, Arc<Endpoint>)> {
        let responses = &self.shared.responses;
        if let Some(found) = responses.keeper(id)
            && gates.iter().any(|gate| Arc::ptr_eq(gate, &found.0))
        {
            return Some(found);
        }
        let ready = |gate: &Arc<Gate>| {
            let endpoints = gate.target().endpoints();
            let ready = endpoints.iter().filter(|endpoint| endpoint.is_ready());
            ready.map(|endpoint| (gate.clone(), endpoint.clone())).collect::<Vec<_>>()
        };
        let mut ready: Vec<_> = gates.iter().flat_map(ready).take(MAX_ASKED).collect();
        if ready.len() < 2 {
            return ready.pop();
        }
        let question = question(&format!("{path}/{id}"), head)?;
        let _place = responses.searches.acquire().await.ok()?;
        let answers = stream::iter(ready).map(|(gate, endpoint)| {
            let question = &question;
            async move { self.has(&gate, &endpoint, question).await.then_some((gate, endpoint)) }
        });
        let mut found =
            std::pin::pin!(answers.buffer_unordered(ASKED_AT_ONCE).filter_map(std::future::ready));
        let (gate, endpoint) = timeout(SEARCH_TIMEOUT, found.next()).await.ok()??;
        responses.remember(id, &gate, &endpoint);
        Some((gate, endpoint))
    }

    /// Whether an endpoint has what is asked for. As a probe does, this takes no place of a request.
    async fn has(&self, gate: &Gate, endpoint: &Endpoint, question: &request::Parts) -> bool {
        let policy = gate.policy().upstream;
        let response_timeout = policy.response_timeout.min(ANSWER_TIMEOUT);
        let timeouts = UpstreamTimeouts { response_timeout, ..policy };
        let body = || Some(OutgoingBody::Full(None));
        let sent = self.upstream.send(endpoint, question, body, timeouts, Reuse::Pooled).await;
        // The connection ends with what is not read of the answer.
        sent.is_ok_and(|(response, _)| response.status().is_success())
    }
}
