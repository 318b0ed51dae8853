//! Connections to the admin listener: no more than there are places, fair between sources, and none that is slow or silent
//! for good. So a probe finds a place whatever else is open.

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
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::{
    config::budget::{ADMIN_CONNECTIONS, ADMIN_REQUEST_BYTES},
    h2_frames::PREFACE,
    places::{Place, Places, Source},
};

/// How many may be open: probes, scrapers, and people with dashboards. Without a bound, who reaches this port could take
/// the files that requests need.
const PLACES: usize = ADMIN_CONNECTIONS;

/// How many of them one source may have: an address, or 64 bits of an IPv6 one. Its next one takes the place of its oldest.
const PLACES_PER_SOURCE: usize = 64;

/// How many more may be open that were evicted and are about to end.
const LEAVING: usize = 64;

/// How long a request may take to come in, from its first byte to the first of its answer.
const REQUEST: Duration = Duration::from_secs(30);

/// How long one may say nothing and be told nothing. Followers of the events are told something every 15 s, and scrapers
/// come back more often than that.
const SILENCE: Duration = Duration::from_secs(120);

/// How long to wait after the system refused a connection for want of something.
const REFUSED: Duration = Duration::from_millis(100);

/// A listener with places.
pub(super) struct Bounded {
    listener: TcpListener,
    places: Arc<Places>,
    open: Arc<Semaphore>,
}

/// A connection that has one.
pub(super) struct Watched {
    stream: TcpStream,
    moved: Instant,
    /// When the first byte came that nothing was answered to.
    asked: Option<Instant>,
    /// Bytes that have come since then.
    asked_bytes: usize,
    timer: Pin<Box<Sleep>>,
    evicted: Pin<Box<WaitForCancellationFutureOwned>>,
    /// How much of HTTP/2's preface has come, while what came is part of it.
    preface: Option<usize>,
    _place: Place,
    _open: OwnedSemaphorePermit,
}

// === impl Bounded ===

impl Bounded {
    pub(super) fn new(listener: TcpListener) -> Self {
        let open = Arc::new(Semaphore::new(PLACES + LEAVING));
        Self { listener, places: Places::new(PLACES, PLACES_PER_SOURCE), open }
    }
}

impl Listener for Bounded {
    type Io = Watched;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Watched, SocketAddr) {
        loop {
            // The semaphore is never closed. While too many are about to end, others wait in the kernel's queue.
            let Ok(open) = self.open.clone().acquire_owned().await else { continue };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    let place = self.places.enter(Source::of(address.ip()), CancellationToken::new());
                    return (Watched::new(stream, place, open), address);
                }
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
    fn new(stream: TcpStream, place: Place, open: OwnedSemaphorePermit) -> Self {
        Self {
            stream,
            moved: Instant::now(),
            asked: None,
            asked_bytes: 0,
            timer: Box::pin(sleep(REQUEST.min(SILENCE))),
            evicted: Box::pin(place.evicted().clone().cancelled_owned()),
            preface: Some(0),
            _place: place,
            _open: open,
        }
    }

    pub(super) const fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Whether all of HTTP/2's preface has come. The server behind this would speak it, and nothing here needs it.
    fn begins_http2(&mut self, bytes: &[u8]) -> bool {
        if let Some(have) = self.preface {
            let next = bytes.len().min(PREFACE.len() - have);
            self.preface = (PREFACE[have..have + next] == bytes[..next]).then_some(have + next);
        }
        self.preface == Some(PREFACE.len())
    }

    /// Something moved, or has not for too long, or another one has the place. The timer is armed when it has fired.
    fn watch<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.moved = Instant::now();
            return polled;
        }
        if self.evicted.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let due = (self.moved + SILENCE).min(self.asked.map_or(now + REQUEST, |asked| asked + REQUEST));
            if due <= now {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.timer.as_mut().reset(due);
        }
        Poll::Pending
    }

    /// Some of an answer has gone out, or all.
    fn answered<T>(&mut self, written: &Poll<io::Result<T>>) {
        if written.is_ready() {
            self.asked = None;
            self.asked_bytes = 0;
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if self.begins_http2(&buf.filled()[before..]) {
            return Poll::Ready(Err(io::Error::other("HTTP/2 is not spoken here")));
        }
        if read.is_ready() {
            self.asked.get_or_insert_with(Instant::now);
            self.asked_bytes += buf.filled().len() - before;
            if self.asked_bytes > ADMIN_REQUEST_BYTES {
                buf.set_filled(before);
                return Poll::Ready(Err(io::Error::other("a request is larger than any here has to be")));
            }
        }
        self.watch(cx, read)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.answered(&written);
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
        self.answered(&written);
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

    /// The server's end of a connection, its client, and the places that it has one of.
    async fn connected() -> (Watched, TcpStream, Arc<Places>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let places = Places::new(1, 1);
        let place = places.enter(Source::default(), CancellationToken::new());
        let open = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        (Watched::new(stream, place, open), client, places)
    }

    /// As many connections as one source may have, and more than there are places, none of which ends its request.
    #[tokio::test]
    async fn trickling_connections_keep_no_probe_out() {
        let listener = Bounded::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            axum::serve(listener, Router::new().route("/livez", get(|| async { "ok" }))).await
        });
        let mut open = Vec::new();
        for number in 0..PLACES + LEAVING {
            let mut slow = TcpStream::connect(address).await.unwrap();
            slow.write_all(b"GET /livez HTTP/1.1\r\nX: ").await.unwrap();
            open.push(slow);
            if number % 64 == 63 {
                let mut probe = TcpStream::connect(address).await.unwrap();
                probe
                    .write_all(b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                    .await
                    .unwrap();
                let mut answer = String::new();
                probe.read_to_string(&mut answer).await.unwrap();
                assert!(answer.starts_with("HTTP/1.1 200"), "{number}: {answer}");
            }
        }
        // The first one has given its place up, by name or without.
        assert!(!matches!(open[0].read(&mut [0; 64]).await, Ok(1..)));
        serving.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn request_that_trickles_loses_its_place() {
        let (mut server, mut client, _places) = connected().await;
        let began = Instant::now();
        let trickling = tokio::spawn(async move {
            while client.write_all(b"x").await.is_ok() {
                sleep(Duration::from_secs(1)).await;
            }
        });
        let error = loop {
            match server.read_u8().await {
                Ok(byte) => assert_eq!(byte, b'x'),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let after = began.elapsed();
        assert!((REQUEST..REQUEST * 2 + Duration::from_secs(1)).contains(&after), "{after:?}");
        trickling.abort();
    }

    #[tokio::test]
    async fn evicted_connection_ends() {
        let (mut server, _client, places) = connected().await;
        let reading = tokio::spawn(async move { server.read_u8().await.unwrap_err().kind() });
        tokio::task::yield_now().await;
        let _newcomer = places.enter(Source::default(), CancellationToken::new());
        assert_eq!(reading.await.unwrap(), io::ErrorKind::ConnectionAborted);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_loses_its_place() {
        let (mut server, mut client, _places) = connected().await;
        let began = Instant::now();
        client.write_all(b"x").await.unwrap();
        server.stream.readable().await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), b'x');
        server.write_all(b"y").await.unwrap();
        // Sockets are real and the clock is not: what is on its way may take some of its time.
        assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= SILENCE);
    }

    /// Anything here is a GET.
    #[tokio::test]
    async fn large_request_loses_its_place() {
        let (mut server, mut client, _places) = connected().await;
        client.write_all(&vec![b'x'; ADMIN_REQUEST_BYTES + 1]).await.unwrap();
        let mut read = Vec::new();
        assert!(server.read_to_end(&mut read).await.is_err());
        assert!(read.len() <= ADMIN_REQUEST_BYTES, "{}", read.len());
    }
}
