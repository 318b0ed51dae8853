//! Connections to endpoints: one pool per worker thread and HTTP version.

mod dial;
mod h1;
mod h2;
mod send;
mod send_error;
mod severable;

use futures_util::future::Either;
use http::{Response, request};
use hyper::body::Incoming;

pub use dial::{Dial, Dialer, Dialing, UpstreamIo};
pub use send::Reuse;
pub use send_error::SendError;

use crate::{
    domain::UpstreamTimeouts,
    state::{Endpoint, Protocol},
};

/// Connects to endpoints and pools idle connections.
pub struct Upstream<B> {
    dialer: Dialer,
    http1: h1::IdlePool<B>,
    http2: h2::Pool<B>,
}

/// Connection of a request in flight. Return it to the pool once the response has been read to its end; dropping it
/// earlier closes it, which notifies the server that the client is gone.
pub struct Connection<B>(ActiveConnection<B>);

enum ActiveConnection<B> {
    Http1(h1::Answered<B>),
    /// One stream of a connection; dropping the response body resets only this stream.
    Http2 {
        _stream: h2::StreamSlot,
    },
}

// === impl Upstream ===

impl<B> Upstream<B>
where
    B: http_body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Creates an empty pool.
    pub fn new(dialer: Dialer) -> Self {
        Self { dialer, http1: h1::IdlePool::default(), http2: h2::Pool::default() }
    }

    /// Sends a request and waits for the response head. `body` creates the body; it is called again where a stale
    /// connection is replaced after a write.
    ///
    /// # Errors
    ///
    /// If there is no response head. After [`SendError::Reset`] and [`SendError::ResponseTimeout`], a server may have
    /// seen the request.
    pub fn send<'a>(
        &'a self,
        endpoint: &'a Endpoint,
        head: &'a request::Parts,
        body: impl FnMut() -> Option<B> + 'a,
        timeouts: UpstreamTimeouts,
        reuse: Reuse,
    ) -> impl Future<Output = Result<(Response<Incoming>, Connection<B>), SendError>> {
        let to = send::Addressed { endpoint, head, timeouts };
        match endpoint.protocol() {
            // Boxed, so that HTTP/1.1 requests do not pay for its size.
            Protocol::H2c => {
                let connector = self.http2.connector(&self.dialer, endpoint, reuse);
                Either::Right(Box::pin(send::send(connector, to, body, reuse)))
            }
            Protocol::Http1 => Either::Left(send::send(self.http1.connector(&self.dialer), to, body, reuse)),
        }
    }

    /// Returns a connection to the pool after its response was read to the end.
    pub fn put_back(&self, connection: Connection<B>) {
        if let ActiveConnection::Http1(answered) = connection.0 {
            self.http1.put_back(answered);
        }
    }

    /// Closes connections idle for too long.
    pub fn sweep(&self) {
        self.http2.sweep();
        self.http1.sweep();
    }
}

// === impl Connection ===

impl<B> From<h1::Answered<B>> for Connection<B> {
    fn from(answered: h1::Answered<B>) -> Self {
        Self(ActiveConnection::Http1(answered))
    }
}

impl<B> From<h2::StreamSlot> for Connection<B> {
    fn from(stream: h2::StreamSlot) -> Self {
        Self(ActiveConnection::Http2 { _stream: stream })
    }
}
