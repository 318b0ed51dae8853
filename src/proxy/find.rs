//! Route lookup: by the head of a request, and by the model in its body where routes differ in that.

use std::sync::Arc;

use http::{HeaderValue, request};

use super::{
    intake::{BufferedBody, UnreadBody},
    interceptor::route::Interceptor,
    memory::request_bytes,
    request::{Rejection, RequestBody},
    scan::encoding,
    shared::Proxy,
    table::{NoModelMatch, RequestModel, RouteMatch},
};
use crate::{
    admission::Gate,
    error::ProxyError,
    openai::{Api, ApiFormat, RoutingFields},
    state::Endpoint,
};

/// Handler of a request.
pub(super) enum Destination {
    /// A model route. Without a format, the request is served only while the model server is up.
    Route(Arc<Gate>, Option<ApiFormat>, RequestBody, RoutingFields),
    /// The endpoint that stores the response asked for.
    StoredResponse(Arc<Gate>, Arc<Endpoint>, RequestBody),
    /// A route that proxies any HTTP application.
    Interceptor(Arc<Interceptor>, RequestBody),
    /// A CORS preflight: the server of the route if it is up, else the proxy.
    Preflight(Arc<Gate>, Api, RequestBody),
    /// The proxy itself; creates no demand.
    Local(Api),
}

// === impl Proxy ===

impl Proxy {
    /// Finds the handler of a request. Reads the body only if the route depends on the model.
    pub(super) async fn find(
        &self,
        host: &HeaderValue,
        head: &request::Parts,
        body: UnreadBody,
    ) -> Result<Destination, Rejection> {
        let (host, path) = (host.to_str().unwrap_or_default(), head.uri.path());
        let found = 'head: {
            let table = self.shared.table.load();
            let shape = match table.api(&head.method, path) {
                Api::Work(shape) => shape,
                other => {
                    if let Some(found) = table.interceptor(host, path, &head.headers, &other) {
                        return Ok(Destination::Interceptor(found.clone(), RequestBody::Unread(body)));
                    }
                    let gate = match (other, table.unnamed(host, path, &head.headers)) {
                        (Api::Stored(_) | Api::Server, NoModelMatch::Nothing) => {
                            return Err(unknown(path, host).into());
                        }
                        (Api::Stored(id), _) => {
                            let gates = table.unnamed_gates(host, path, &head.headers);
                            break 'head Err((id, gates.into_iter().cloned().collect::<Vec<_>>()));
                        }
                        (Api::Server, NoModelMatch::Route(gate)) => gate,
                        (Api::Server, NoModelMatch::NothingUp) => {
                            return Err(ProxyError::NotKept(path.into()).into());
                        }
                        (Api::Server, NoModelMatch::Several) => return Err(several(path).into()),
                        (ours, _) => {
                            return match table.preflight(host, path, &head.method, &head.headers) {
                                Some(gate) => {
                                    Ok(Destination::Preflight(gate.clone(), ours, RequestBody::Unread(body)))
                                }
                                None if table.answers(host, &ours) => Ok(Destination::Local(ours)),
                                None => Err(unknown(path, host).into()),
                            };
                        }
                    };
                    return Ok(Destination::Route(
                        gate.clone(),
                        None,
                        RequestBody::Unread(body),
                        RoutingFields::default(),
                    ));
                }
            };
            match table.find(host, path, &head.headers, RequestModel::Unread) {
                RouteMatch::Route(gate) => {
                    let body = RequestBody::Unread(body);
                    return Ok(Destination::Route(gate.clone(), Some(shape), body, RoutingFields::default()));
                }
                RouteMatch::Interceptor(found) => {
                    return Ok(Destination::Interceptor(found.clone(), RequestBody::Unread(body)));
                }
                RouteMatch::NeedsModel => Ok(shape),
                RouteMatch::Nothing => return Err(unknown(path, host).into()),
            }
        };
        let shape = match found {
            Ok(shape) => shape,
            Err((id, gates)) => {
                let (gate, endpoint) = Box::pin(self.find_stored_response(&id, &gates, head)).await?;
                return Ok(Destination::StoredResponse(gate, endpoint, RequestBody::Unread(body)));
            }
        };
        if let Some(encoding) = encoding(&head.headers) {
            return Err(ProxyError::UnsupportedEncoding(encoding).into());
        }
        let read = self.read(head, body).await?;
        let scan =
            self.shared.scanner.scan(shape, &head.headers, &read.bytes).await.map_err(ProxyError::from)?;
        let table = self.shared.table.load();
        match table.find(host, path, &head.headers, RequestModel::Read(scan.model.as_deref())) {
            RouteMatch::Route(gate) => {
                Ok(Destination::Route(gate.clone(), Some(shape), RequestBody::Buffered(read), scan))
            }
            RouteMatch::Interceptor(found) => {
                Ok(Destination::Interceptor(found.clone(), RequestBody::Buffered(read)))
            }
            RouteMatch::NeedsModel | RouteMatch::Nothing => Err(match scan.model {
                Some(model) => ProxyError::ModelNotFound(model.into()),
                None => ProxyError::InvalidRequest("The body has no `model`.".into()),
            }
            .into()),
        }
    }

    /// Buffers a whole body.
    pub(super) async fn read(
        &self,
        head: &request::Parts,
        body: UnreadBody,
    ) -> Result<BufferedBody, ProxyError> {
        let limits = **self.shared.limits.load();
        BufferedBody::read(body, &limits, &self.shared.memory, request_bytes(head)).await
    }
}

fn unknown(path: &str, host: &str) -> ProxyError {
    ProxyError::UnknownPath(format!("{path} at host {host}"))
}

fn several(path: &str) -> ProxyError {
    ProxyError::InvalidRequest(format!(
        "{path} names no model, and several routes with running servers match: use a Host that only one route has in \
         `match.hosts`, or call the model server directly."
    ))
}
