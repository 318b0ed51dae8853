//! Connections coming in: one listener for each thread that serves requests, one task for each connection.

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
    Client, ClientIo, ConnectionState, Proxy,
    body::Body,
    client_io::{SocketOf, stall},
    closer::{ClosedLate, Closer},
    memory::Memory,
    stream_stall::{self, StreamExecutor},
};
use crate::config::{Limits, budget::SEND_BUFFER_BYTES};

/// How many connections wait to be accepted, for each listener.
const BACKLOG: i32 = 4096;

/// When nothing has come for a minute, it is asked whether the other side still lives; dead after three times silence.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(10))
    .with_retries(3);

/// How long accepting rests when it fails for want of something (file descriptors, memory).
const REST: Duration = Duration::from_millis(100);

/// The largest frame of HTTP/2 that is taken: the least that must be (RFC 9113, section 4.2).
const FRAME: u32 = 16 << 10;

/// How much memory header compression may take (RFC 7541), for each direction of a connection.
const HEADER_TABLE: u32 = 4096;

/// How many requests of HTTP/2 may be reset in the time that it takes us to look at them.
const UNSEEN_RESETS: usize = 20;

/// How much of its bodies an HTTP/2 client may send ahead, for all of its streams together.
const WINDOW: u32 = 1 << 20;

/// Binds `count` listeners to one address, so that the kernel spreads connections over them.
///
/// # Errors
/// When the address cannot be had. The first socket is bound alone, and shares the address only then: several that
/// share from the start would hide that another program has it.
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

/// Accepts connections until `closing`, each served in a task of its own among `tasks`, which after `closing` end with
/// the requests that are under way.
pub async fn serve_listener(
    listener: TcpListener,
    proxy: Arc<Proxy>,
    closing: CancellationToken,
    tasks: TaskTracker,
) {
    let (closer, closed) = Closer::new();
    tasks.spawn(closed);
    loop {
        // Further connections wait in the kernel's queue.
        let connections = &proxy.shared().connections;
        let full = !connections.has_room(proxy.shared().limits.load().max_connections);
        let accepted = tokio::select! {
            // Nothing is accepted any more once we stop.
            biased;
            () = closing.cancelled() => return,
            accepted = listener.accept(), if !full => accepted,
            () = sleep(REST), if full => continue,
        };
        match accepted {
            Ok((stream, address)) => {
                // The one whose place it was to take may have become busy by now.
                while !connections.has_room(proxy.shared().limits.load().max_connections) {
                    tokio::select! {
                        biased; // the end first, as above
                        () = closing.cancelled() => return,
                        () = sleep(REST) => {}
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
                // Tokens are small, and each should go out by itself. And a client that vanished without a word is
                // noticed while it is held, too. Neither fails on a connection that lives.
                let _ = stream.set_nodelay(true);
                let _ = SockRef::from(&stream).set_tcp_keepalive(&KEEPALIVE);
                let stream = ClosedLate::new(stream, connected, closer.clone());
                let socket: SocketOf<_> = ClosedLate::socket;
                tasks.spawn(serve_client(stream, Some(socket), client, proxy.clone(), closing.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(REST).await;
            }
        }
    }
}

/// Serves one connection, HTTP/1.1 or HTTP/2 without TLS, until it ends. After `closing` it ends with the requests that
/// are under way.
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
    // Not in the future, which would keep room for what these are made of.
    let limits = proxy.shared().limits.load_full();
    client.connection.stays_open_for(limits.idle_timeout.get());
    let memory = proxy.shared().memory.clone();
    let mut io = ClientIo::new(io, client.connection.clone(), limits, memory).with_socket(socket);
    async move {
        let after_http = AfterHttp(client.connection.clone());
        let begins_http2 = tokio::select! {
            // Whoever has said something is served.
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
            // On the heap: most connections are not.
            Ok(true) => {
                let http2 = http2(&proxy.shared().limits.load(), &proxy.shared().memory);
                let max_headers = proxy.shared().limits.load().max_headers;
                let service = service_fn(move |request: Request<Incoming>| {
                    let (proxy, client) = (proxy.clone(), client.clone());
                    let early = client.connection.early();
                    async move {
                        // HTTP/1.1's are counted where they are parsed.
                        let response = match request.headers().len() > max_headers {
                            true => Ok(too_many_headers()),
                            false => proxy.answer(client, request).await,
                        };
                        early.answered();
                        // From now on its client has something to read.
                        stream_stall::asked(Some(0));
                        response
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
                if let Some(next) = after_http.0.take_next() {
                    next.await;
                }
            }
            Err(error) => tracing::trace!(%error, "a connection ended"),
        }
    }
}

/// What comes after HTTP is dropped with the connection at the latest.
struct AfterHttp(Arc<ConnectionState>);

impl Drop for AfterHttp {
    fn drop(&mut self) {
        drop(self.0.take_next());
    }
}

/// Serves a connection to its end; after `closing`, or when it is asked to end, to the end of what is under way. It is pinned outside, since a
/// future has room for what it is given and for what it makes of that.
async fn drive<C: Future<Output = hyper::Result<()>>>(
    mut connection: Pin<&mut C>,
    close: impl FnOnce(Pin<&mut C>),
    state: &ConnectionState,
    closing: CancellationToken,
) -> hyper::Result<()> {
    tokio::select! {
        // Mostly there is something to do, and seldom to close.
        biased;
        ended = connection.as_mut() => return ended,
        () = closing.cancelled() => {}
        () = state.closing() => {}
    }
    // Over HTTP/2 the library waits until the client has answered a PING; this bounds the time for it.
    state.close();
    close(connection.as_mut());
    connection.await
}

/// Time-outs and hang-ups are ClientIo's.
fn http1(limits: &Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        // Not half-closed, but looked after by ClientIo: hyper would need a second read buffer for each request to see that
        // its client hangs up.
        .half_close(true)
        // A read may bring more than the one takes, and the other is exact.
        .max_buf_size(limits.max_header_bytes.get().max(8192))
        .max_header_size(limits.max_header_bytes.get());
    // As many as hyper takes by itself are parsed a little faster than as many as it is told.
    if limits.max_headers != 100 {
        builder.max_headers(limits.max_headers);
    }
    builder
}

/// What the library bounds it bounds because it is told here, not because its defaults are so today.
fn http2(limits: &Limits, memory: &Arc<Memory>) -> http2::Builder<StreamExecutor> {
    let executor = StreamExecutor { allowed: stall(limits), memory: memory.clone() };
    let mut builder = http2::Builder::new(executor);
    builder
        .timer(TokioTimer::new())
        // Beyond it a request is 431; a frame that unpacks to four times of it ends the connection. The number of CONTINUATION
        // frames follows from it and the largest frame (CVE-2024-27316).
        .max_header_list_size(u32::try_from(limits.max_header_bytes.get()).unwrap_or(u32::MAX))
        .max_frame_size(FRAME)
        .header_table_size(HEADER_TABLE)
        .max_concurrent_streams(limits.max_concurrent_streams)
        // Requests that are reset before they are even looked at (CVE-2023-44487), and those that are reset by us
        // since the client broke the protocol (CVE-2025-8671).
        .max_pending_accept_reset_streams(UNSEEN_RESETS)
        .max_local_error_reset_streams(usize::try_from(limits.max_rapid_resets).unwrap_or(usize::MAX))
        // What a client may send before it is read, on a stream and in all; and what may be written ahead.
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
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
    async fn closing_waits_for_no_client_that_ignores_it() {
        let (client, server) = duplex(4096);
        let proxy = Proxy::new(Shared::new(Limits::default()), Dialer::Tcp);
        let closing = CancellationToken::new();
        let serving = tokio::spawn(serve_connection(server, None, proxy, closing.clone()));
        let (mut reads, mut writes) = split(client);
        // Its settings, and nothing further, whatever it is told.
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
    fn listeners_share_their_address_with_nobody_else() {
        let listeners = bind(SocketAddr::from(([127, 0, 0, 1], 0)), 3).unwrap();
        let address = listeners[0].local_addr().unwrap();
        assert!(listeners.iter().all(|listener| listener.local_addr().unwrap() == address));
        assert_eq!(bind(address, 3).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        // Each gets some of the connections: that none does of 200 has a chance of 3 in 10^35.
        let clients: Vec<_> = (0..200).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
        let accepted: Vec<_> =
            listeners.iter().map(|listener| std::iter::from_fn(|| listener.accept().ok()).count()).collect();
        assert!(accepted.iter().all(|accepted| *accepted > 0), "{accepted:?}");
        assert_eq!(accepted.iter().sum::<usize>(), clients.len());
    }
}
