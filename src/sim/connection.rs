//! One connection over HTTP/1.1 or HTTP/2, which handlers can reset.

use super::{api, reset::ConnectionReset, server::SimServer};
use hyper::{
    rt::{Read, ReadBufCursor, Write},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use std::{
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};
use tokio::net::TcpStream;

/// A socket that sends a reset on drop if requested. hyper owns the socket until the connection is dropped.
struct ResettableSocket {
    io: TokioIo<TcpStream>,
    reset: ConnectionReset,
}

pub(super) async fn serve(server: Arc<SimServer>, stream: TcpStream) {
    // Sends each token in its own segment, like a real server.
    let _ = stream.set_nodelay(true);
    let reset = ConnectionReset::default();
    let socket = ResettableSocket { io: TokioIo::new(stream), reset: reset.clone() };
    let service = service_fn(|request| api::answer(Arc::clone(&server), reset.clone(), request));
    let builder = auto::Builder::new(TokioExecutor::new());
    let mut connection = pin!(builder.serve_connection(socket, service));
    let mut draining = false;
    loop {
        tokio::select! {
            // Biased: a connection to be closed writes nothing more.
            biased;
            () = reset.0.cancelled() => return,
            () = server.abort.cancelled() => return,
            () = server.drain.cancelled(), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
            // Errors mean a disconnected client; its generations are aborted on drop.
            _ = connection.as_mut() => return,
        }
    }
}

// === impl ResettableSocket ===

impl Drop for ResettableSocket {
    fn drop(&mut self) {
        if self.reset.0.is_cancelled() {
            let _ = self.io.inner().set_zero_linger();
        }
    }
}

impl Read for ResettableSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for ResettableSocket {
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
