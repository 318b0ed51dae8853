//! Finding the endpoint of a stored response (`/v1/responses`).

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use http::request;
use tokio::time::timeout;

use super::{affinity::ResponseAffinity, query::query};
use crate::{
    admission::Gate,
    domain::{Period, UpstreamTimeouts},
    error::ProxyError,
    openai::{self, ResponseRequest},
    proxy::{outgoing::OutgoingBody, request::RequestBody, scan::encoding, shared::Proxy},
    state::Endpoint,
    upstream::Reuse,
};

/// Endpoints queried for one request, in all and concurrently.
const MAX_QUERIED: usize = 64;
const CONCURRENT_QUERIES: usize = 8;

/// Time limits of one query and of the whole search.
const QUERY_TIMEOUT: Period = Period::from_secs(2);
const SEARCH_TIMEOUT: Duration = Duration::from_secs(10);

// === impl Proxy ===

impl Proxy {
    /// Finds the endpoint of a stored response among `gates`.
    ///
    /// # Errors
    /// No model server is up, or none has the response.
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
        let found = self.find_owner(id, &path[..end], gates, head).await;
        found.ok_or_else(|| ProxyError::NoSuchResponse(id.into()))
    }

    /// Buffers a request that creates a response, and pins it to the endpoint of the response that it continues.
    pub(in crate::proxy) async fn response_affinity(
        &self,
        gate: &Arc<Gate>,
        head: &request::Parts,
        body: RequestBody,
    ) -> Result<(RequestBody, Option<Box<ResponseAffinity>>), ProxyError> {
        let mut affinity = Box::new(ResponseAffinity { pin: None, creates: true, background: false });
        let read = match body {
            RequestBody::Buffered(read) => read,
            // The route was found without the body, so an encoded one is not read.
            RequestBody::Unread(_) if encoding(&head.headers).is_some() => return Ok((body, Some(affinity))),
            RequestBody::Unread(body) => self.read(head, body).await?,
        };
        let summary = ResponseRequest::read(&read.bytes);
        affinity.background = summary.background == Some(true);
        if let Some(previous) = summary.previous.filter(|id| openai::is_response_id(id)) {
            let found = self.find_owner(&previous, head.uri.path(), std::slice::from_ref(gate), head).await;
            // Without an owner any endpoint may serve the request; it reports the missing response.
            affinity.pin = found.map(|(_, endpoint)| endpoint.id());
        }
        Ok((RequestBody::Buffered(read), Some(affinity)))
    }

    /// Returns the endpoint of a response: the recorded one, the only ready one, or the first that confirms a query.
    /// `path`: of the collection, `/v1/responses`.
    async fn find_owner(
        &self,
        id: &str,
        path: &str,
        gates: &[Arc<Gate>],
        head: &request::Parts,
    ) -> Option<(Arc<Gate>, Arc<Endpoint>)> {
        let responses = &self.shared.responses;
        if let Some(found) = responses.owner(id)
            && gates.iter().any(|gate| Arc::ptr_eq(gate, &found.0))
        {
            return Some(found);
        }
        let ready = |gate: &Arc<Gate>| {
            let endpoints = gate.target().endpoints();
            let ready = endpoints.iter().filter(|endpoint| endpoint.is_ready());
            ready.map(|endpoint| (gate.clone(), endpoint.clone())).collect::<Vec<_>>()
        };
        let mut ready: Vec<_> = gates.iter().flat_map(ready).take(MAX_QUERIED).collect();
        if ready.len() < 2 {
            return ready.pop();
        }
        let query = query(&format!("{path}/{id}"), head)?;
        let _permit = responses.searches.acquire().await.ok()?;
        let queries = stream::iter(ready).map(|(gate, endpoint)| {
            let query = &query;
            async move { self.has(&gate, &endpoint, query).await.then_some((gate, endpoint)) }
        });
        let mut found =
            std::pin::pin!(queries.buffer_unordered(CONCURRENT_QUERIES).filter_map(std::future::ready));
        let (gate, endpoint) = timeout(SEARCH_TIMEOUT, found.next()).await.ok()??;
        responses.record(id, &gate, &endpoint);
        Some((gate, endpoint))
    }

    /// Queries one endpoint. Like a probe, a query is not counted as a request in flight.
    async fn has(&self, gate: &Gate, endpoint: &Endpoint, query: &request::Parts) -> bool {
        let policy = gate.policy().upstream;
        let response_timeout = policy.response_timeout.min(QUERY_TIMEOUT);
        let timeouts = UpstreamTimeouts { response_timeout, ..policy };
        let body = || Some(OutgoingBody::Full(None));
        let sent = self.upstream.send(endpoint, query, body, timeouts, Reuse::Pooled).await;
        // The body is not read, so the connection is closed instead of pooled.
        sent.is_ok_and(|(response, _)| response.status().is_success())
    }
}
