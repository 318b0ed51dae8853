//! HTTP/1.1 to endpoints: each request has a connection to itself, which is reused.

use std::{collections::HashMap, future::pending, io, sync::Arc};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{
        TrySendError,
        http1::{self, SendRequest},
    },
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout},
};

use super::{
    dial::{Dialed, Dialer},
    send::{Addressed, Connector, MAX_IDLE},
    send_error::SendError,
    severable::Severable,
};
use crate::{config::budget::UPSTREAM_BUFFER_BYTES, state::Cut};

/// Idle connections of one worker thread, by endpoint.
pub(super) struct IdlePool<B>(Mutex<HashMap<u64, Vec<IdleConnection<B>>>>);

/// HTTP/1.1 connections that one request may take, pooled or new.
pub(super) struct IdleConnector<'a, B> {
    pool: &'a IdlePool<B>,
    dialer: &'a Dialer,
}

struct IdleConnection<B> {
    pooled: Pooled<B>,
    since: Instant,
}

/// An open HTTP/1.1 connection, and its handle for termination.
pub(super) struct Pooled<B> {
    sender: SendRequest<B>,
    cut: Arc<Cut>,
}

/// A connection whose response is being read.
pub(super) struct Answered<B> {
    pooled: Pooled<B>,
    endpoint: u64,
}

// === impl IdlePool ===

impl<B> Default for IdlePool<B> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<B> IdlePool<B> {
    /// Returns the connections of one request.
    pub(super) const fn connector<'a>(&'a self, dialer: &'a Dialer) -> IdleConnector<'a, B> {
        IdleConnector { pool: self, dialer }
    }

    /// Takes back a connection whose response was read to the end.
    pub(super) fn put_back(&self, connection: Answered<B>) {
        let Answered { pooled, endpoint } = connection;
        if !pooled.sender.is_closed() {
            pooled.cut.set_answering(false);
            let idle = IdleConnection { pooled, since: Instant::now() };
            self.0.lock().entry(endpoint).or_default().push(idle);
        }
    }

    /// Closes connections idle for too long.
    pub(super) fn sweep(&self) {
        self.0.lock().retain(|_, idle| {
            idle.retain(|idle| idle.since.elapsed() < MAX_IDLE && !idle.pooled.sender.is_closed());
            !idle.is_empty()
        });
    }
}

// === impl IdleConnector ===

impl<B> Connector<B> for IdleConnector<'_, B>
where
    B: http_body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Body = B;
    type Connection = Pooled<B>;
    type Answered = Answered<B>;

    /// Takes the most recently used connection, which is the most likely to be alive.
    fn take(&mut self, to: &Addressed<'_>) -> Option<Pooled<B>> {
        let mut idle = self.pool.0.lock();
        let idle = idle.get_mut(&to.endpoint.id())?;
        while let Some(candidate) = idle.pop() {
            if candidate.pooled.sender.is_ready() && candidate.since.elapsed() < MAX_IDLE {
                return Some(candidate.pooled);
            }
        }
        None
    }

    async fn connect(&mut self, to: &Addressed<'_>) -> Result<Pooled<B>, SendError> {
        let address = to.endpoint.address();
        let limit = to.timeouts.connect_timeout.get();
        let connecting = async {
            // Idle connections hold the missing resources.
            let dialed = self.dialer.dial(address, limit, || self.pool.0.lock().clear()).await?;
            let headers = to.timeouts.max_response_headers;
            let cut = to.endpoint.connection();
            let sender = match dialed {
                Dialed::Tcp(io) => handshake(Severable { io, cut: cut.clone() }, headers).await?,
                Dialed::Other(io) => handshake(Severable { io, cut: cut.clone() }, headers).await?,
            };
            io::Result::Ok(Pooled { sender, cut })
        };
        match timeout(limit, connecting).await {
            Ok(Ok(pooled)) => Ok(pooled),
            Ok(Err(source)) => Err(SendError::Connect { address: address.into(), source }),
            Err(_) => Err(SendError::ConnectTimeout(address.into())),
        }
    }

    fn request(&self, to: &Addressed<'_>, body: B) -> Request<B> {
        let mut request = Request::new(body);
        *request.method_mut() = to.head.method.clone();
        *request.uri_mut() = to.head.uri.clone();
        *request.headers_mut() = to.head.headers.clone();
        request
    }

    fn send(
        &self,
        connection: &mut Pooled<B>,
        request: Request<B>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<B>>>> + Send {
        connection.sender.try_send_request(request)
    }

    fn severed(&self, _: &Addressed<'_>) -> impl Future<Output = ()> + Send {
        pending()
    }

    fn answered(&self, to: &Addressed<'_>, connection: Pooled<B>, _: &mut Response<Incoming>) -> Answered<B> {
        connection.cut.set_answering(true);
        Answered { pooled: connection, endpoint: to.endpoint.id() }
    }

    fn discard(&mut self, connection: Pooled<B>) -> bool {
        connection.cut.is_cut()
    }

    fn explain(&self, to: &Addressed<'_>, error: &hyper::Error) -> Option<SendError> {
        let limit = to.timeouts.max_response_headers;
        let address = || to.endpoint.address().into();
        error.is_parse_too_large().then(|| SendError::HeadTooLarge { address: address(), limit })
    }
}

async fn handshake<I, B>(io: I, max_headers: usize) -> io::Result<SendRequest<B>>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    B: http_body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut builder = http1::Builder::new();
    builder.max_buf_size(UPSTREAM_BUFFER_BYTES);
    // hyper parses its default number of headers without an allocation.
    if max_headers != 100 {
        builder.max_headers(max_headers);
    }
    let (sender, connection) = builder.handshake(TokioIo::new(io)).await.map_err(io::Error::other)?;
    // The task ends with the connection, which ends when the sender and the response body are gone.
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::trace!(%error, "a connection to an endpoint ended");
        }
    });
    Ok(sender)
}
