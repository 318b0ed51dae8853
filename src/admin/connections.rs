//! Connections to the admin listener: no more than there are places, and none that is silent for good.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::serve::Listener;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep},
};

/// How many may be open: probes, scrapers, and people with dashboards. Without a bound, who reaches this port could take
/// the files that requests need.
const PLACES: usize = 512;

/// How long one may say nothing and be told nothing. Followers of the events are told something every 15 s, and scrapers
/// come back more often than that.
const SILENCE: Duration = Duration::from_secs(120);

/// How long to wait after the system refused a connection for want of something.
const REFUSED: Duration = Duration::from_millis(100);

/// A listener with places.
pub(super) struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

/// A connection that has one.
pub(super) struct Watched {
    stream: TcpStream,
    moved: Instant,
    timer: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

// === impl Bounded ===

impl Bounded {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(PLACES)) }
    }
}

impl Listener for Bounded {
    type Io = Watched;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Watched, SocketAddr) {
        loop {
            // The semaphore is never closed. Who waits for a place waits in the kernel's queue.
            let Ok(place) = self.places.clone().acquire_owned().await else { continue };
            match self.listener.accept().await {
                Ok((stream, address)) => return (Watched::new(stream, place), address),
                Err(error) => {
                    tracing::warn!(%error, "a connection to the admin port was not accepted");
                    sleep(REFUSED).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

// === impl Watched ===

impl Watched {
    fn new(stream: TcpStream, place: OwnedSemaphorePermit) -> Self {
        Self { stream, moved: Instant::now(), timer: Box::pin(sleep(SILENCE)), _place: place }
    }

    pub(super) const fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Something moved, or has not for too long. The timer is armed once and looked at when it fires.
    fn watch<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.moved = Instant::now();
            return polled;
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let due = self.moved + SILENCE;
            if due <= Instant::now() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.timer.as_mut().reset(due);
        }
        Poll::Pending
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.watch(cx, read)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, routing::get};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn the_admin_port_has_so_many_places() {
        let listener = Bounded::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        let places = listener.places.clone();
        let serving = tokio::spawn(async move {
            axum::serve(listener, Router::new().route("/", get(|| async { "ok" }))).await
        });
        let mut open = Vec::new();
        for _ in 0..PLACES {
            open.push(TcpStream::connect(address).await.unwrap());
        }
        while places.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let mut one_more = TcpStream::connect(address).await.unwrap();
        one_more.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let waiting = tokio::time::timeout(Duration::from_millis(100), one_more.read_to_string(&mut answer));
        assert!(waiting.await.is_err(), "it waits for a place");
        open.pop();
        one_more.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        serving.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_loses_its_place() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let places = Arc::new(Semaphore::new(1));
        let mut server = Watched::new(stream, places.clone().acquire_owned().await.unwrap());
        let began = Instant::now();
        client.write_all(b"x").await.unwrap();
        server.stream.readable().await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), b'x');
        // Sockets are real and the clock is not: what is on its way may take some of its time.
        assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= SILENCE);
        drop(server);
        assert_eq!(places.available_permits(), 1);
    }
}
