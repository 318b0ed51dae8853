//! Sending of one request: which connection it takes, and when it is sent again.

use std::{io, time::Duration};

use http::{Request, Response, request};
use hyper::{body::Incoming, client::conn::TrySendError};
use tokio::time::{Instant, timeout};

use super::send_error::SendError;
use crate::{domain::UpstreamTimeouts, state::Endpoint};

/// Head of a request, and its endpoint.
pub(super) struct Addressed<'a> {
    pub(super) endpoint: &'a Endpoint,
    pub(super) head: &'a request::Parts,
    pub(super) timeouts: UpstreamTimeouts,
}

/// Connections that a request may take, and the handling of one that breaks before the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// A pooled connection. If it is stale, it is replaced by a new one, never by another pooled one: the server has
    /// probably closed them all.
    Pooled,
    /// A pooled connection, replaced only if nothing was written, for requests that must not run twice.
    Once,
    /// A new connection.
    Never,
}

/// Connections of one HTTP version, as one request uses them.
pub(super) trait Connector<B> {
    /// Body as sent.
    type Body;
    /// A connection, or a stream of one.
    type Connection;
    /// The part of a connection that is kept until the response has been read.
    type Answered;

    /// Takes a pooled connection.
    fn take(&mut self, to: &Addressed<'_>) -> Option<Self::Connection>;

    /// Opens a connection.
    fn connect(
        &mut self,
        to: &Addressed<'_>,
    ) -> impl Future<Output = Result<Self::Connection, SendError>> + Send;

    /// Adds the head to a body.
    fn request(&self, to: &Addressed<'_>, body: B) -> Request<Self::Body>;

    /// Sends a request.
    fn send(
        &self,
        connection: &mut Self::Connection,
        request: Request<Self::Body>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<Self::Body>>>> + Send;

    /// Completes once the connections of the endpoint are severed. Never completes if each connection fails by itself
    /// then.
    fn severed(&self, to: &Addressed<'_>) -> impl Future<Output = ()> + Send;

    /// Prepares the connection and the response for reading the body.
    fn answered(
        &self,
        to: &Addressed<'_>,
        connection: Self::Connection,
        response: &mut Response<Incoming>,
    ) -> Self::Answered;

    /// Drops a connection that broke. Returns `true` if it was severed.
    fn discard(&mut self, connection: Self::Connection) -> bool;

    /// Returns the reason of a failure, if it is known to be neither the connection's nor the server's.
    fn explain(&self, to: &Addressed<'_>, error: &hyper::Error) -> Option<SendError>;
}

/// Maximum idle time of a pooled connection. Servers close idle connections after 5 s (default of uvicorn, which vLLM
/// uses), and a request sent into a closing one fails.
pub(super) const MAX_IDLE: Duration = Duration::from_secs(4);

/// A pooled connection that breaks within this time after a write was closed before the server processed the request. A
/// later break is the server's failure.
const STALE_WINDOW: Duration = Duration::from_secs(1);

/// Sends a request as [`super::Upstream::send`] describes.
pub(super) async fn send<B, C: Connector<B>, A: From<C::Answered>>(
    mut connector: C,
    to: Addressed<'_>,
    mut body: impl FnMut() -> Option<B>,
    reuse: Reuse,
) -> Result<(Response<Incoming>, A), SendError> {
    let mut pooled = (reuse != Reuse::Never).then(|| connector.take(&to)).flatten();
    let mut unsent = None;
    loop {
        let reused = pooled.as_ref().map(|_| Instant::now());
        let mut connection = match pooled.take() {
            Some(pooled) => pooled,
            // Boxed to keep the future small: usually a pooled connection is available.
            None => Box::pin(connector.connect(&to)).await?,
        };
        let address = || to.endpoint.address().into();
        // Take the body only once there is a connection: a streaming one can be held until then.
        let Some(request) = unsent.take().or_else(|| body().map(|body| connector.request(&to, body))) else {
            let source = io::Error::other("the body has been sent already");
            return Err(SendError::Connect { address: address(), source });
        };
        let limit = to.timeouts.response_timeout.get();
        let sent = tokio::select! {
            biased; // a response takes precedence over the end of the endpoint
            sent = timeout(limit, connector.send(&mut connection, request)) => sent,
            () = connector.severed(&to) => return Err(SendError::Gone(address())),
        };
        let mut error = match sent {
            Ok(Ok(mut response)) => {
                let answered = connector.answered(&to, connection, &mut response);
                return Ok((response, answered.into()));
            }
            Ok(Err(error)) => error,
            Err(_) => return Err(SendError::ResponseTimeout { address: address(), limit }),
        };
        if connector.discard(connection) {
            return Err(SendError::Gone(address()));
        }
        match error.take_message() {
            Some(message) if reused.is_some() => unsent = Some(message),
            Some(_) => {
                let source = io::Error::new(io::ErrorKind::ConnectionReset, "closed at once");
                return Err(SendError::Connect { address: address(), source });
            }
            None => {
                let source = error.into_error();
                if let Some(reason) = connector.explain(&to, &source) {
                    return Err(reason);
                }
                match reuse.is_stale(reused, &source).then(&mut body).flatten() {
                    Some(again) => unsent = Some(connector.request(&to, again)),
                    None => return Err(SendError::Reset { address: address(), source }),
                }
            }
        }
    }
}

// === impl Reuse ===

impl Reuse {
    /// Returns whether a connection that broke before the response had probably been closed by the server before the
    /// request was written. `pooled`: time of the write if the connection came from the pool.
    fn is_stale(self, pooled: Option<Instant>, error: &hyper::Error) -> bool {
        // A parse error proves that the server is alive.
        self == Self::Pooled && pooled.is_some_and(|at| at.elapsed() < STALE_WINDOW) && !error.is_parse()
    }
}
