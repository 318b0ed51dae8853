//! Connections to the admin listener: bounded in number, fair between sources, with timeouts for slow and silent ones.
//! A probe can always connect.

use std::{
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use parking_lot::Mutex;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::{
    config::budget::{ADMIN_ANSWERS, ADMIN_CONNECTIONS, ADMIN_LEAVING_CONNECTIONS, ADMIN_REQUEST_BYTES},
    h2_frames::PREFACE,
    places::{Place, Places, Source},
};

/// Maximum number of connections, for probes, scrapers and dashboards. Without a bound, clients of this port could take
/// the file descriptors that requests need.
const MAX_CONNECTIONS: usize = ADMIN_CONNECTIONS;

/// Maximum number from one source, an IPv4 address or IPv6 /64. A further one evicts the source's oldest.
const MAX_CONNECTIONS_PER_SOURCE: usize = 64;

/// Maximum number of evicted connections that have not closed yet.
const MAX_CLOSING_CONNECTIONS: usize = ADMIN_LEAVING_CONNECTIONS;

/// Time from the first byte of a request to the first byte of its response.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum time without traffic. Event streams send something every 15 s, and scrapers return more often.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);

/// Pause after a failed accept, such as without file descriptors.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Time after which a connection whose client acknowledges nothing is closed (TCP).
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(60);

/// Time that a response waits for others to be read before one of those is evicted.
const UNREAD_ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// A listener with a bounded number of connections.
pub(super) struct BoundedListener {
    listener: TcpListener,
    places: Arc<Places>,
    open: Arc<Semaphore>,
    answers: Arc<Places>,
    building: Arc<Semaphore>,
}

/// Place of a large response of one connection: taken before the response is built, released once all of it has been
/// written.
#[derive(Clone)]
pub(super) struct LargeAnswer {
    source: Source,
    /// Closes the connection when another connection needs its place.
    evicted: CancellationToken,
    places: Arc<Places>,
    /// Limits the large responses in memory. An evicted response counts until its connection has ended.
    building: Arc<Semaphore>,
    taken: Arc<Mutex<Option<(Place, OwnedSemaphorePermit)>>>,
}

/// A connection accepted by [`BoundedListener`].
pub(super) struct AdminConnection {
    stream: TcpStream,
    last_activity: Instant,
    /// Arrival time of the first byte of a request that has no response yet.
    request_began: Option<Instant>,
    /// Bytes received since `request_began`.
    request_bytes: usize,
    timer: Pin<Box<Sleep>>,
    evicted: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Length of HTTP/2's preface received so far, while the bytes match it.
    preface: Option<usize>,
    answer: LargeAnswer,
    _place: Place,
    _open: OwnedSemaphorePermit,
}

// === impl BoundedListener ===

impl BoundedListener {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self {
            listener,
            places: Places::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE),
            open: Arc::new(Semaphore::new(MAX_CONNECTIONS + MAX_CLOSING_CONNECTIONS)),
            answers: Places::new(ADMIN_ANSWERS, ADMIN_ANSWERS),
            building: Arc::new(Semaphore::new(ADMIN_ANSWERS)),
        }
    }

    fn watched(&self, stream: TcpStream, address: SocketAddr, open: OwnedSemaphorePermit) -> AdminConnection {
        let socket = SockRef::from(&stream);
        // Setting these options fails only on a connection that is already closed.
        let _ = socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(UNACKNOWLEDGED_TIMEOUT / 2)
                .with_interval(UNACKNOWLEDGED_TIMEOUT / 6),
        );
        #[cfg(target_os = "linux")]
        let _ = socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_TIMEOUT));
        let source = Source::of(address.ip());
        let place = self.places.enter(source, CancellationToken::new());
        let answer = LargeAnswer {
            source,
            evicted: place.evicted().clone(),
            places: self.answers.clone(),
            building: self.building.clone(),
            taken: Arc::default(),
        };
        AdminConnection::new(stream, answer, place, open)
    }
}

impl Listener for BoundedListener {
    type Io = AdminConnection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (AdminConnection, SocketAddr) {
        loop {
            // Never fails: the semaphore is not closed. While too many connections are closing, new ones wait in the
            // kernel's accept queue.
            let Ok(open) = self.open.clone().acquire_owned().await else { continue };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    return (self.watched(stream, address, open), address);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection to the admin port");
                    sleep(ACCEPT_RETRY_INTERVAL).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

// === impl LargeAnswer ===

impl LargeAnswer {
    /// Waits until this connection may build a large response. Cancel-safe.
    pub(super) async fn reserve(&self) {
        let mut acquiring = pin!(self.building.clone().acquire_owned());
        loop {
            match timeout(UNREAD_ANSWER_TIMEOUT, acquiring.as_mut()).await {
                Ok(Ok(permit)) => {
                    let place = self.places.enter(self.source, self.evicted.clone());
                    *self.taken.lock() = Some((place, permit));
                    return;
                }
                // The semaphore is never closed.
                Ok(Err(_)) => return,
                Err(_) => self.places.evict(),
            }
        }
    }
}

impl Connected<IncomingStream<'_, BoundedListener>> for LargeAnswer {
    fn connect_info(connection: IncomingStream<'_, BoundedListener>) -> Self {
        connection.io().answer.clone()
    }
}

// === impl AdminConnection ===

impl AdminConnection {
    fn new(stream: TcpStream, answer: LargeAnswer, place: Place, open: OwnedSemaphorePermit) -> Self {
        Self {
            stream,
            last_activity: Instant::now(),
            request_began: None,
            request_bytes: 0,
            timer: Box::pin(sleep(REQUEST_TIMEOUT.min(IDLE_TIMEOUT))),
            evicted: Box::pin(place.evicted().clone().cancelled_owned()),
            preface: Some(0),
            answer,
            _place: place,
            _open: open,
        }
    }

    /// Returns whether the complete HTTP/2 preface was received. hyper would accept it, but nothing here needs HTTP/2.
    fn begins_http2(&mut self, bytes: &[u8]) -> bool {
        if let Some(have) = self.preface {
            let next = bytes.len().min(PREFACE.len() - have);
            self.preface = (PREFACE[have..have + next] == bytes[..next]).then_some(have + next);
        }
        self.preface == Some(PREFACE.len())
    }

    /// Checks for traffic, timeouts and eviction. The timer is re-armed only when it fires.
    fn watch<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.last_activity = Instant::now();
            return polled;
        }
        if self.evicted.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let due = (self.last_activity + IDLE_TIMEOUT).min(
                self.request_began
                    .map_or(now + REQUEST_TIMEOUT, |request_began| request_began + REQUEST_TIMEOUT),
            );
            if due <= now {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.timer.as_mut().reset(due);
        }
        Poll::Pending
    }

    /// Records that part of a response was written.
    fn answered<T>(&mut self, written: &Poll<io::Result<T>>) {
        if written.is_ready() {
            self.request_began = None;
            self.request_bytes = 0;
        }
    }
}

impl AsyncRead for AdminConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if self.begins_http2(&buf.filled()[before..]) {
            return Poll::Ready(Err(io::Error::other("HTTP/2 is not supported")));
        }
        if read.is_ready() {
            self.request_began.get_or_insert_with(Instant::now);
            self.request_bytes += buf.filled().len() - before;
            if self.request_bytes > ADMIN_REQUEST_BYTES {
                buf.set_filled(before);
                return Poll::Ready(Err(io::Error::other("the request is too large")));
            }
        }
        self.watch(cx, read)
    }
}

impl AsyncWrite for AdminConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.answered(&written);
        self.watch(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if flushed.is_ready() {
            // A completed flush means that the whole response is written, so its place is released.
            *self.answer.taken.lock() = None;
        }
        flushed
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

    /// Returns the server's end of a connection, its client, and the only place it occupies.
    async fn connected() -> (AdminConnection, TcpStream, Arc<Places>) {
        let mut listener = BoundedListener::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        listener.places = Places::new(1, 1);
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await;
        (server, client, listener.places)
    }

    /// Opens more slow connections than the limits in total and per source allow.
    #[tokio::test]
    async fn trickling_connections_keep_no_probe_out() {
        let listener = BoundedListener::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            axum::serve(listener, Router::new().route("/livez", get(|| async { "ok" }))).await
        });
        let mut open = Vec::new();
        for number in 0..MAX_CONNECTIONS + MAX_CLOSING_CONNECTIONS {
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
        // The first connection was evicted.
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
        assert!(
            (REQUEST_TIMEOUT..REQUEST_TIMEOUT * 2 + Duration::from_secs(1)).contains(&after),
            "{after:?}"
        );
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
    async fn silent_connection_loses_its_place() {
        let (mut server, mut client, _places) = connected().await;
        let began = Instant::now();
        client.write_all(b"x").await.unwrap();
        server.stream.readable().await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), b'x');
        server.write_all(b"y").await.unwrap();
        // Real sockets with a paused clock: delivery may advance the clock.
        assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= IDLE_TIMEOUT);
    }

    #[tokio::test]
    async fn large_request_loses_its_place() {
        let (mut server, mut client, _places) = connected().await;
        client.write_all(&vec![b'x'; ADMIN_REQUEST_BYTES + 1]).await.unwrap();
        let mut read = Vec::new();
        assert!(server.read_to_end(&mut read).await.is_err());
        assert!(read.len() <= ADMIN_REQUEST_BYTES, "{}", read.len());
    }
}
