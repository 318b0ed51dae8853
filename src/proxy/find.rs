//! Finding the route of a request: by its head, and by its body where that depends on the model.

use std::sync::Arc;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
    request,
};
use hyper::body::Incoming;

use super::{
    Match, Model, Proxy, dispatch::Intake, intake::Buffered, intercept::Interceptor, pipeline::Refused,
};
use crate::{
    admission::Gate,
    error::ProxyError,
    openai::{self, Api, Scan, Shape},
};

/// Who serves a request.
pub(super) enum Found {
    /// A route for models. Without a shape it is something that is of use only while a model server lives.
    Route(Arc<Gate>, Option<Shape>, Intake, Scan),
    /// A route that serves anything.
    Interceptor(Arc<Interceptor>, Intake),
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
        incoming: Incoming,
    ) -> Result<Found, Refused> {
        let (host, path) = (host.to_str().unwrap_or_default(), head.uri.path());
        let shape = {
            let table = self.shared.table.load();
            let shape = match table.api(&head.method, path) {
                Api::Work(shape) => Some(shape),
                Api::Stored => None,
                other => {
                    return Ok(match table.interceptor(host, path, &head.headers, &other) {
                        Some(found) => Found::Interceptor(found.clone(), Intake::Unread(incoming)),
                        None => Found::Ours(other),
                    });
                }
            };
            // A request without a body names no model.
            let model = if shape.is_some() { Model::Unread } else { Model::Read(None) };
            let gate = match table.find(host, path, &head.headers, model) {
                Match::Route(gate) => Some(gate),
                Match::Interceptor(found) => {
                    return Ok(Found::Interceptor(found.clone(), Intake::Unread(incoming)));
                }
                Match::NeedsModel => None,
                Match::Nothing => match (shape, table.only_route()) {
                    // Where there is only one route, it needs no model to be found.
                    (None, Some(gate)) => Some(gate),
                    _ => return Err(ProxyError::UnknownPath(format!("{path} at host {host}")).into()),
                },
            };
            if let Some(gate) = gate {
                return Ok(Found::Route(gate.clone(), shape, Intake::Unread(incoming), Scan::default()));
            }
            shape
        };
        if let Some(encoding) = encoding(&head.headers) {
            return Err(ProxyError::UnsupportedEncoding(encoding).into());
        }
        let read = self.read(incoming).await?;
        let scan = scan_body(shape.unwrap_or(Shape::Plain), &head.headers, &read.bytes).await?;
        let table = self.shared.table.load();
        match table.find(host, path, &head.headers, Model::Read(scan.model.as_deref())) {
            Match::Route(gate) => Ok(Found::Route(gate.clone(), shape, Intake::Read(read), scan)),
            Match::Interceptor(found) => Ok(Found::Interceptor(found.clone(), Intake::Read(read))),
            Match::NeedsModel | Match::Nothing => Err(match scan.model {
                Some(model) => ProxyError::ModelNotFound(model.into()),
                None => ProxyError::InvalidRequest("The body names no `model`.".into()),
            }
            .into()),
        }
    }

    /// Reads a whole body.
    pub(super) async fn read(&self, incoming: Incoming) -> Result<Buffered, ProxyError> {
        let limits = **self.shared.limits.load();
        Buffered::read(incoming, &limits, &self.shared.budget).await
    }
}

/// The encoding that hides the body, if any.
pub(super) fn encoding(headers: &HeaderMap) -> Option<String> {
    let encoding = headers.get(CONTENT_ENCODING)?;
    (!encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
        .then(|| String::from_utf8_lossy(encoding.as_bytes()).into_owned())
}

/// What a body says of its request.
pub(super) async fn scan_body(shape: Shape, headers: &HeaderMap, body: &Bytes) -> Result<Scan, ProxyError> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let scan = match (shape, openai::boundary(content_type)) {
        // On the heap: the others should not carry its room.
        (Shape::Form, Some(boundary)) => Box::pin(openai::scan_multipart(body.clone(), &boundary)).await,
        (Shape::Form, None) => {
            let reason = "This path wants a multipart/form-data body.".into();
            return Err(ProxyError::InvalidRequest(reason));
        }
        _ => openai::scan_json(body),
    };
    scan.map_err(|error| ProxyError::InvalidRequest(error.to_string()))
}
