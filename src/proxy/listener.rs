//! Listeners: one for each serving thread, with a task for each connection.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use http::{Request, Response, StatusCode};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    body::Body,
    client::Client,
    client_io::{ClientIo, SocketOf, stall},
    closer::{Closer, DeferredClose},
    connection_state::ConnectionState,
    shared::Proxy,
    stream_stall::{H2ResponseBody, StreamExecutor},
};
use crate::config::{Limits, budget::SEND_BUFFER_BYTES};

/// Length of the accept queue of each listener.
const BACKLOG: i32 = 4096;

/// TCP keepalive: probes after a minute of silence, and closes after three unanswered probes.
const CLIENT_KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(10))
    .with_retries(3);

/// Pause after a failed `accept`, such as without file descriptors, and between checks for room.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Largest HTTP/2 frame accepted: the minimum of RFC 9113, section 4.2.
const MAX_FRAME_BYTES: u32 = 16 << 10;

/// Size of the HPACK table (RFC 7541) of each direction of a connection.
const HEADER_TABLE_BYTES: u32 = 4096;

/// HTTP/2 streams that may be reset before they are accepted.
const MAX_PENDING_RESETS: usize = 20;

/// Receive window of an HTTP/2 stream, and of a connection.
const WINDOW_BYTES: u32 = 1 << 20;

/// Binds `count` listeners to one address, so that the kernel spreads connections over them.
///
/// # Errors
/// The address is in use or unavailable. The first socket is bound without `SO_REUSEPORT`, which would hide another
/// program on the same address.
pub fn bind(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::TcpListener>> {
    let first = socket(address)?;
    first.bind(&address.into())?;
    first.set_reuse_port(count > 1)?;
    let address = first.local_addr()?;
    let mut sockets = vec![first];
    for _ in 1..count {
        let next = socket(address.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?)?;
        next.set_reuse_port(true)?;
        next.bind(&address)?;
        sockets.push(next);
    }
    sockets.into_iter().map(|socket| socket.listen(BACKLOG).map(|()| socket.into())).collect()
}

fn socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Accepts connections until `closing`, and serves each in a task of `tasks`. These end with their current requests.
pub async fn serve_listener(
    listener: TcpListener,
    proxy: Arc<Proxy>,
    closing: CancellationToken,
    tasks: TaskTracker,
) {
    let (closer, closed) = Closer::new();
    tasks.spawn(closed);
    loop {
        // At the limit, connections wait in the kernel's accept queue.
        let connections = &proxy.shared().connections;
        let full = !connections.has_room(proxy.shared().limits.load().max_connections);
        let accepted = tokio::select! {
            // Shutdown takes precedence.
            biased;
            () = closing.cancelled() => return,
            accepted = listener.accept(), if !full => accepted,
            () = sleep(ACCEPT_BACKOFF), if full => continue,
        };
        match accepted {
            Ok((stream, address)) => {
                // The idle connection to be shed may have become busy.
                while !connections.has_room(proxy.shared().limits.load().max_connections) {
                    tokio::select! {
                        biased; // shutdown first, as above
                        () = closing.cancelled() => return,
                        () = sleep(ACCEPT_BACKOFF) => {}
                    }
                }
                let client = Client { address: Some(address), ..Client::default() };
                let connected = {
                    let limits = proxy.shared().limits.load();
                    let (most, of_source) = (limits.max_connections, limits.max_connections_per_source);
                    connections.enter(address.ip(), most, of_source, &client.connection)
                };
                let Some(connected) = connected else {
                    tracing::debug!(%address, "too many connections from one source");
                    continue;
                };
                // Tokens are small and must not wait for more. Keepalive detects clients that vanish while held.
                // Errors mean that the connection is closed.
                let _ = stream.set_nodelay(true);
                let _ = SockRef::from(&stream).set_tcp_keepalive(&CLIENT_KEEPALIVE);
                let stream = DeferredClose::new(stream, connected, closer.clone());
                let socket: SocketOf<_> = DeferredClose::socket;
                tasks.spawn(serve_client(stream, Some(socket), client, proxy.clone(), closing.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// Serves a connection (HTTP/1.1, or HTTP/2 with prior knowledge). After `closing` it ends with its current requests.
pub fn serve_connection<I>(
    io: I,
    address: Option<SocketAddr>,
    proxy: Arc<Proxy>,
    closing: CancellationToken,
) -> impl Future<Output = ()> + Send
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    serve_client(io, None, Client { address, ..Client::default() }, proxy, closing)
}

fn serve_client<I>(
    io: I,
    socket: Option<SocketOf<I>>,
    client: Client,
    proxy: Arc<Proxy>,
    closing: CancellationToken,
) -> impl Future<Output = ()> + Send
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // Outside the future, which would reserve space for temporaries.
    let limits = proxy.shared().limits.load_full();
    client.connection.set_idle_timeout(limits.idle_timeout.get());
    let memory = proxy.shared().memory.clone();
    let mut io = ClientIo::new(io, client.connection.clone(), limits, memory).with_socket(socket);
    async move {
        let after_http = PendingUpgrade(client.connection.clone());
        let begins_http2 = tokio::select! {
            // Reads before it checks `closing`: a client that has sent bytes is served.
            biased;
            begins = io.begins_http2() => begins,
            () = closing.cancelled() => return,
            () = after_http.0.closing() => return,
        };
        let ended = match begins_http2 {
            Ok(false) => {
                let connection = {
                    let http1 = http1(&proxy.shared().limits.load());
                    let service = service_fn(move |request| proxy.clone().answer(client.clone(), request));
                    http1.serve_connection(TokioIo::new(io), service).with_upgrades()
                };
                let close = http1::UpgradeableConnection::graceful_shutdown;
                drive(pin!(connection), close, &after_http.0, closing).await
            }
            // Boxed to keep the future small: most connections are HTTP/1.
            Ok(true) => {
                let limits = proxy.shared().limits.load_full();
                let executor = {
                    let (memory, connection) = (proxy.shared().memory.clone(), client.connection.clone());
                    StreamExecutor::new(stall(&limits), memory, connection)
                };
                let http2 = http2(&limits, executor.clone());
                let max_headers = limits.max_headers;
                let service = service_fn(move |request: Request<Incoming>| {
                    let (proxy, stream) = (proxy.clone(), executor.begin());
                    let client = Client { stream: Some(stream.clone()), ..client.clone() };
                    let early = client.connection.begin_unanswered();
                    async move {
                        // hyper enforces this limit for HTTP/1 only.
                        let response = match request.headers().len() > max_headers {
                            true => Ok(too_many_headers()),
                            false => proxy.answer(client, request).await,
                        };
                        early.answered();
                        response.map(|response| response.map(|body| H2ResponseBody::new(body, stream)))
                    }
                });
                let mut connection = Box::pin(http2.serve_connection(TokioIo::new(io), service));
                let close = http2::Connection::graceful_shutdown;
                drive(connection.as_mut(), close, &after_http.0, closing).await
            }
            Err(error) => return tracing::trace!(%error, "a connection ended before its first request"),
        };
        match ended {
            Ok(()) => {
                if let Some(next) = after_http.0.take_takeover() {
                    next.await;
                }
            }
            Err(error) => tracing::trace!(%error, "a connection ended"),
        }
    }
}

/// Drops a pending upgrade with its connection.
struct PendingUpgrade(Arc<ConnectionState>);

impl Drop for PendingUpgrade {
    fn drop(&mut self) {
        drop(self.0.take_takeover());
    }
}

/// Drives a connection to its end, and starts a graceful shutdown on `closing` or when it is shed. The caller pins
/// `connection`, as an `async fn` would store it twice.
async fn drive<C: Future<Output = hyper::Result<()>>>(
    mut connection: Pin<&mut C>,
    close: impl FnOnce(Pin<&mut C>),
    state: &ConnectionState,
    closing: CancellationToken,
) -> hyper::Result<()> {
    tokio::select! {
        // Polls the connection first: closing is rare.
        biased;
        ended = connection.as_mut() => return ended,
        () = closing.cancelled() => {}
        () = state.closing() => {}
    }
    // Bounds the wait of h2 for a PING response.
    state.close();
    close(connection.as_mut());
    std::future::poll_fn(|cx| {
        state.register(cx);
        connection.as_mut().poll(cx)
    })
    .await
}

/// Configures HTTP/1. [`ClientIo`] enforces timeouts and detects disconnects.
fn http1(limits: &Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        // Leaves detection of disconnects to ClientIo: hyper would need a second read buffer for each request.
        .half_close(true)
        // hyper requires a buffer of 8 KiB; `max_header_size` is the exact limit.
        .max_buf_size(limits.max_header_bytes.get().max(8192))
        .max_header_size(limits.max_header_bytes.get());
    // hyper parses its default of 100 headers faster than an explicit limit.
    if limits.max_headers != 100 {
        builder.max_headers(limits.max_headers);
    }
    builder
}

/// Configures HTTP/2. Sets every limit explicitly instead of relying on defaults.
fn http2(limits: &Limits, executor: StreamExecutor) -> http2::Builder<StreamExecutor> {
    let mut builder = http2::Builder::new(executor);
    builder
        .timer(TokioTimer::new())
        // Larger heads get 431; a frame that decompresses to four times this limit ends the connection. Also bounds
        // CONTINUATION frames (CVE-2024-27316).
        .max_header_list_size(u32::try_from(limits.max_header_bytes.get()).unwrap_or(u32::MAX))
        .max_frame_size(MAX_FRAME_BYTES)
        .header_table_size(HEADER_TABLE_BYTES)
        .max_concurrent_streams(limits.max_concurrent_streams)
        // Rapid resets by the client (CVE-2023-44487), and resets that it provokes (CVE-2025-8671).
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(usize::try_from(limits.max_rapid_resets).unwrap_or(usize::MAX))
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES);
    builder
}

fn too_many_headers() -> Response<Body> {
    let mut response = Response::new(Body::full(""));
    *response.status_mut() = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
    response
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex, split},
        time::Instant,
    };

    use super::*;
    use crate::{
        h2_frames::PREFACE,
        proxy::{Shared, client_io::GOAWAY_GRACE},
        upstream::Dialer,
    };

    #[tokio::test(start_paused = true)]
    async fn shutdown_is_bounded_if_the_client_ignores_it() {
        let (client, server) = duplex(4096);
        let proxy = Proxy::new(Shared::new(Limits::default()), Dialer::Tcp);
        let closing = CancellationToken::new();
        let serving = tokio::spawn(serve_connection(server, None, proxy, closing.clone()));
        let (mut reads, mut writes) = split(client);
        // Sends its settings and then ignores all frames.
        writes.write_all(&[PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0][..]].concat()).await.unwrap();
        let reading = tokio::spawn(async move { reads.read_to_end(&mut Vec::new()).await });
        sleep(Duration::from_secs(1)).await;
        let began = Instant::now();
        closing.cancel();
        serving.await.unwrap();
        assert_eq!(began.elapsed().as_secs(), GOAWAY_GRACE.as_secs());
        let _ = reading.await.unwrap();
    }

    #[test]
    fn listeners_share_their_address_only_together() {
        let listeners = bind(SocketAddr::from(([127, 0, 0, 1], 0)), 3).unwrap();
        let address = listeners[0].local_addr().unwrap();
        assert!(listeners.iter().all(|listener| listener.local_addr().unwrap() == address));
        assert_eq!(bind(address, 3).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        // Each gets some of 200 connections, except with a probability of 3 in 10^35.
        let clients: Vec<_> = (0..200).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
        let accepted: Vec<_> =
            listeners.iter().map(|listener| std::iter::from_fn(|| listener.accept().ok()).count()).collect();
        assert!(accepted.iter().all(|accepted| *accepted > 0), "{accepted:?}");
        assert_eq!(accepted.iter().sum::<usize>(), clients.len());
    }
}
