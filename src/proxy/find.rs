//! Finding the route of a request: by its head, and by its body where that depends on the model.

use std::{
    num::NonZeroUsize,
    panic::resume_unwind,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
    request,
};
use tokio::{runtime::Handle, sync::Semaphore, task::spawn_blocking};

use super::{
    Match, Model, Proxy,
    dispatch::Intake,
    intake::{Buffered, Unread},
    intercept::Interceptor,
    memory::request_bytes,
    pipeline::Refused,
    table::Unnamed,
};
use crate::{
    admission::Gate,
    error::ProxyError,
    openai::{self, Api, Scan, ScanError, Shape},
    state::Endpoint,
};

/// Size of a body that is scanned where it was read: a fraction of a millisecond as JSON, and at most some milliseconds.
const MAX_INLINE_SCAN_BYTES: usize = 256 << 10;

/// Half of the cores at most scan larger ones at a time; further ones wait in order.
static SCANS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    Arc::new(Semaphore::new(cores.div_ceil(2)))
});

/// Who serves a request.
pub(super) enum Found {
    /// A route for models. Without a shape it is something that is of use only while a model server lives.
    Route(Arc<Gate>, Option<Shape>, Intake, Scan),
    /// The endpoint of a route that keeps what is asked for.
    Kept(Arc<Gate>, Arc<Endpoint>, Intake),
    /// A route that serves anything.
    Interceptor(Arc<Interceptor>, Intake),
    /// A preflight: the server of a route, if it is up, or else we do.
    Preflight(Arc<Gate>, Api, Intake),
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
    ) -> Result<Found, Refused> {
        let (host, path) = (host.to_str().unwrap_or_default(), head.uri.path());
        let found = 'head: {
            let table = self.shared.table.load();
            let shape = match table.api(&head.method, path) {
                Api::Work(shape) => shape,
                other => {
                    if let Some(found) = table.interceptor(host, path, &head.headers, &other) {
                        return Ok(Found::Interceptor(found.clone(), Intake::Unread(body)));
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
                                Some(gate) => Ok(Found::Preflight(gate.clone(), ours, Intake::Unread(body))),
                                None if table.answers(host, &ours) => Ok(Found::Ours(ours)),
                                None => Err(unknown(path, host).into()),
                            };
                        }
                    };
                    return Ok(Found::Route(gate.clone(), None, Intake::Unread(body), Scan::default()));
                }
            };
            match table.find(host, path, &head.headers, Model::Unread) {
                Match::Route(gate) => {
                    let body = Intake::Unread(body);
                    return Ok(Found::Route(gate.clone(), Some(shape), body, Scan::default()));
                }
                Match::Interceptor(found) => {
                    return Ok(Found::Interceptor(found.clone(), Intake::Unread(body)));
                }
                Match::NeedsModel => Ok(shape),
                Match::Nothing => return Err(unknown(path, host).into()),
            }
        };
        let shape = match found {
            Ok(shape) => shape,
            Err((id, gates)) => {
                let (gate, endpoint) = Box::pin(self.find_kept(&id, &gates, head)).await?;
                return Ok(Found::Kept(gate, endpoint, Intake::Unread(body)));
            }
        };
        if let Some(encoding) = encoding(&head.headers) {
            return Err(ProxyError::UnsupportedEncoding(encoding).into());
        }
        let read = self.read(head, body).await?;
        let scan = scan_body(shape, &head.headers, &read.bytes).await.map_err(ProxyError::from)?;
        let table = self.shared.table.load();
        match table.find(host, path, &head.headers, Model::Read(scan.model.as_deref())) {
            Match::Route(gate) => Ok(Found::Route(gate.clone(), Some(shape), Intake::Read(read), scan)),
            Match::Interceptor(found) => Ok(Found::Interceptor(found.clone(), Intake::Read(read))),
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

/// The encoding that hides the body, if any.
pub(super) fn encoding(headers: &HeaderMap) -> Option<String> {
    let encoding = headers.get(CONTENT_ENCODING)?;
    (!encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
        .then(|| String::from_utf8_lossy(encoding.as_bytes()).into_owned())
}

/// What a body says of its request.
pub(super) async fn scan_body(shape: Shape, headers: &HeaderMap, body: &Bytes) -> Result<Scan, ScanError> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let boundary = match shape {
        Shape::Form => Some(openai::boundary(content_type).ok_or(ScanError::NoForm)?),
        _ => None,
    };
    // On the heap, but for what is frequent: the others should not carry its room.
    let scan = match boundary {
        boundary if body.len() > MAX_INLINE_SCAN_BYTES => Box::pin(scan_aside(body.clone(), boundary)).await,
        Some(boundary) => Box::pin(openai::scan_multipart(body.clone(), &boundary)).await,
        None => openai::scan_json(body),
    }?;
    match &scan.model {
        Some(model) if model.len() > openai::MAX_MODEL_BYTES => Err(ScanError::ModelTooLong(model.len())),
        _ => Ok(scan),
    }
}

/// Scans a body on a thread for blocking work, so that the other requests of this thread do not wait meanwhile.
async fn scan_aside(body: Bytes, boundary: Option<String>) -> Result<Scan, ScanError> {
    let stopping = || ScanError::Malformed("it was not read to its end, as the proxy is stopping".into());
    // The semaphore is never closed.
    let permit = SCANS.clone().acquire_owned().await.map_err(|_| stopping())?;
    let runtime = Handle::current();
    let scanning = spawn_blocking(move || {
        // As long as the scan lasts, also if its client has gone.
        let _permit = permit;
        match boundary {
            Some(boundary) => runtime.block_on(openai::scan_multipart(body, &boundary)),
            None => openai::scan_json(&body),
        }
    });
    scanning.await.unwrap_or_else(|error| match error.try_into_panic() {
        Ok(panic) => resume_unwind(panic),
        Err(_) => Err(stopping()),
    })
}

impl From<ScanError> for ProxyError {
    fn from(error: ScanError) -> Self {
        Self::InvalidRequest(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn form(parts: usize) -> Bytes {
        let other = "--b\r\nContent-Disposition: form-data; name=\"x\"\r\n\r\n\r\n".repeat(parts);
        let model = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\ntiny\r\n--b--\r\n";
        Bytes::from(other + model)
    }

    fn json(bytes: usize) -> Bytes {
        Bytes::from(format!(r#"{{"model":"tiny","input":"{}"}}"#, "x".repeat(bytes)))
    }

    #[tokio::test]
    async fn large_bodies_are_scanned_beside_the_thread() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("multipart/form-data; boundary=b"));
        let scan = Ok(Scan { model: Some("tiny".into()), stream: false });
        for (shape, small, large) in
            [(Shape::Form, form(1), form(10_000)), (Shape::Chat, json(1), json(MAX_INLINE_SCAN_BYTES))]
        {
            let places = u32::try_from(SCANS.available_permits()).unwrap();
            let all = SCANS.acquire_many(places).await.unwrap();
            assert_eq!(scan_body(shape, &headers, &small).now_or_never(), Some(scan.clone()));
            let mut scanning = Box::pin(scan_body(shape, &headers, &large));
            assert_eq!(
                scanning.as_mut().now_or_never(),
                None,
                "it waits for a place, and the thread goes on"
            );
            drop(all);
            assert_eq!(scanning.await, scan);
        }
    }
}
