//! One connection: HTTP/1.1 or HTTP/2, and the reset that a handler may ask for.

use super::{api, server::Server};
use hyper::{
    rt::{Read, ReadBufCursor, Write},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use std::{
    future, io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// Ends a connection with a TCP reset.
#[derive(Clone, Default)]
pub(super) struct Reset(CancellationToken);

/// A socket that is closed with a reset where one was asked for. hyper owns the socket until the connection is
/// dropped, so that is where the reset has to happen.
struct Socket {
    io: TokioIo<TcpStream>,
    reset: Reset,
}

pub(super) async fn serve(server: Arc<Server>, stream: TcpStream) {
    // Tokens are small and each is its own segment, as a client of a real stream sees them.
    let _ = stream.set_nodelay(true);
    let reset = Reset::default();
    let socket = Socket { io: TokioIo::new(stream), reset: reset.clone() };
    let service = service_fn(|request| api::answer(Arc::clone(&server), reset.clone(), request));
    let builder = auto::Builder::new(TokioExecutor::new());
    let mut connection = pin!(builder.serve_connection(socket, service));
    let mut draining = false;
    loop {
        tokio::select! {
            // The ends come first: a connection that is to die writes nothing more.
            biased;
            () = reset.0.cancelled() => return,
            () = server.abort.cancelled() => return,
            () = server.drain.cancelled(), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
            // An error is the client's going away, which the generations have noticed by being dropped.
            _ = connection.as_mut() => return,
        }
    }
}

// === impl Reset ===

impl Reset {
    /// Resets the connection, and with it drops the caller.
    pub(super) async fn now<T>(&self) -> T {
        self.0.cancel();
        future::pending().await
    }
}

// === impl Socket ===

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset.0.is_cancelled() {
            let _ = self.io.inner().set_zero_linger();
        }
    }
}

impl Read for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}
