//! Finding the route of a request: by its head, and by its body where that depends on the model.

use std::sync::Arc;

use http::{HeaderValue, request};

use super::{
    Match, Model, Proxy,
    intake::{Buffered, Unread},
    interceptor::Interceptor,
    memory::request_bytes,
    request::{Rejection, RequestBody},
    scan::{encoding, scan_body},
    table::Unnamed,
};
use crate::{
    admission::Gate,
    error::ProxyError,
    openai::{Api, Scan, Shape},
    state::Endpoint,
};

/// Who serves a request.
pub(super) enum Found {
    /// A route for models. Without a shape it is something that is of use only while a model server lives.
    Route(Arc<Gate>, Option<Shape>, RequestBody, Scan),
    /// The endpoint of a route that keeps what is asked for.
    Kept(Arc<Gate>, Arc<Endpoint>, RequestBody),
    /// A route that serves anything.
    Interceptor(Arc<Interceptor>, RequestBody),
    /// A preflight: the server of a route, if it is up, or else we do.
    Preflight(Arc<Gate>, Api, RequestBody),
    /// We do, and wake nothing.
    Ours(Api),
}

// === impl Proxy ===

impl Proxy {
    /// Finds the route, reading the body if that depends on the model.
    pub(super) async fn find(
        &self,
        host: &HeaderValue,
        head: &request::Parts,
        body: Unread,
    ) -> Result<Found, Rejection> {
        let (host, path) = (host.to_str().unwrap_or_default(), head.uri.path());
        let found = 'head: {
            let table = self.shared.table.load();
            let shape = match table.api(&head.method, path) {
                Api::Work(shape) => shape,
                other => {
                    if let Some(found) = table.interceptor(host, path, &head.headers, &other) {
                        return Ok(Found::Interceptor(found.clone(), RequestBody::Unread(body)));
                    }
                    let gate = match (other, table.unnamed(host, path, &head.headers)) {
                        (Api::Stored(_) | Api::Server, Unnamed::Nothing) => {
                            return Err(unknown(path, host).into());
                        }
                        (Api::Stored(id), _) => {
                            let gates = table.unnamed_gates(host, path, &head.headers);
                            break 'head Err((id, gates.into_iter().cloned().collect::<Vec<_>>()));
                        }
                        (Api::Server, Unnamed::Route(gate)) => gate,
                        (Api::Server, Unnamed::NothingUp) => {
                            return Err(ProxyError::NotKept(path.into()).into());
                        }
                        (Api::Server, Unnamed::Several) => return Err(several(path).into()),
                        (ours, _) => {
                            return match table.preflight(host, path, &head.method, &head.headers) {
                                Some(gate) => {
                                    Ok(Found::Preflight(gate.clone(), ours, RequestBody::Unread(body)))
                                }
                                None if table.answers(host, &ours) => Ok(Found::Ours(ours)),
                                None => Err(unknown(path, host).into()),
                            };
                        }
                    };
                    return Ok(Found::Route(gate.clone(), None, RequestBody::Unread(body), Scan::default()));
                }
            };
            match table.find(host, path, &head.headers, Model::Unread) {
                Match::Route(gate) => {
                    let body = RequestBody::Unread(body);
                    return Ok(Found::Route(gate.clone(), Some(shape), body, Scan::default()));
                }
                Match::Interceptor(found) => {
                    return Ok(Found::Interceptor(found.clone(), RequestBody::Unread(body)));
                }
                Match::NeedsModel => Ok(shape),
                Match::Nothing => return Err(unknown(path, host).into()),
            }
        };
        let shape = match found {
            Ok(shape) => shape,
            Err((id, gates)) => {
                let (gate, endpoint) = Box::pin(self.find_kept(&id, &gates, head)).await?;
                return Ok(Found::Kept(gate, endpoint, RequestBody::Unread(body)));
            }
        };
        if let Some(encoding) = encoding(&head.headers) {
            return Err(ProxyError::UnsupportedEncoding(encoding).into());
        }
        let read = self.read(head, body).await?;
        let scan = scan_body(shape, &head.headers, &read.bytes).await.map_err(ProxyError::from)?;
        let table = self.shared.table.load();
        match table.find(host, path, &head.headers, Model::Read(scan.model.as_deref())) {
            Match::Route(gate) => {
                Ok(Found::Route(gate.clone(), Some(shape), RequestBody::Buffered(read), scan))
            }
            Match::Interceptor(found) => Ok(Found::Interceptor(found.clone(), RequestBody::Buffered(read))),
            Match::NeedsModel | Match::Nothing => Err(match scan.model {
                Some(model) => ProxyError::ModelNotFound(model.into()),
                None => ProxyError::InvalidRequest("The body names no `model`.".into()),
            }
            .into()),
        }
    }

    /// Reads a whole body.
    pub(super) async fn read(&self, head: &request::Parts, body: Unread) -> Result<Buffered, ProxyError> {
        let limits = **self.shared.limits.load();
        Buffered::read(body, &limits, &self.shared.memory, request_bytes(head)).await
    }
}

fn unknown(path: &str, host: &str) -> ProxyError {
    ProxyError::UnknownPath(format!("{path} at host {host}"))
}

fn several(path: &str) -> ProxyError {
    ProxyError::InvalidRequest(format!(
        "{path} names no model, and the servers of several routes are up: send it with a Host that is in `match.hosts` \
         of one route only, or to the model server itself."
    ))
}
