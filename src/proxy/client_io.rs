//! Client side of a connection. Ends connections that disconnect, idle, send their head too slowly, read too slowly, or
//! abuse HTTP/2.

use std::{
    future::Future,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::BorrowedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep_until},
};

use super::{
    connection_state::ConnectionState,
    h1_framing::RequestFraming,
    memory::{Memory, UnreadKind, WaitingShare},
    pace::PaceLimit,
    stall::{HeldMemory, Stall},
};
use crate::{
    config::{
        Limits,
        budget::{
            H2_HEAD_FACTOR, RELAY_COST_BYTES, SEND_BUFFER_BYTES, TUNNEL_COST_BYTES, UNCOUNTED_HEAD_BYTES,
        },
    },
    h2_frames::{H2FrameParser, PREFACE, TOO_MANY_FRAMES},
};

/// A client connection that enforces timeouts.
///
/// The timer is armed once and checked when it fires; activity in between only moves the deadline. So a request costs
/// no timer operation.
pub struct ClientIo<I> {
    io: I,
    state: Arc<ConnectionState>,
    /// Limits as of the start of the connection.
    limits: Arc<Limits>,
    /// Frame counter of HTTP/2; `None` over HTTP/1. Boxed because most connections are HTTP/1.
    http2: Option<Box<H2FrameParser>>,
    /// hyper has been waiting to read since before the last flush, and so detects a disconnect itself.
    listening: bool,
    /// Bytes read ahead of hyper, which gets them first when it reads again.
    read_ahead: Vec<u8>,
    /// Bytes of later requests dropped beyond those read ahead. Unless 0, the connection ends with the current request.
    dropped_bytes: u32,
    /// Accessor of the socket, if there is one.
    socket: Option<SocketOf<I>>,
    /// Waits for a disconnect, once a part of a body stays in the kernel.
    hang_up: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// Boundaries of the requests in what hyper has read.
    framing: RequestFraming,
    memory: Arc<Memory>,
    /// Memory of a large, incomplete head.
    head: Option<WaitingShare>,
    quiet: QuietPeriod,
    /// Present once the client has been behind with reading.
    read_stall: Option<Box<Stall>>,
}

/// Returns the socket of a connection.
pub(super) type SocketOf<I> = fn(&I) -> Option<BorrowedFd<'_>>;

/// Period without a request under way.
struct QuietPeriod {
    since: Instant,
    /// A head has begun, or is the first thing awaited.
    in_head: bool,
    /// Requests begun by the start of the period.
    begun: u32,
    /// Time of GOAWAY (HTTP/2).
    leaving: Option<Box<Instant>>,
    timer: Option<Pin<Box<Sleep>>>,
}

/// Bytes read ahead: room for several requests of a client that pipelines.
const MAX_AHEAD_BYTES: usize = 16 << 10;

/// Bytes dropped of a client that keeps sending beyond [`MAX_AHEAD_BYTES`]. Up to this many, its connection ends after
/// the current request; beyond, at once.
const MAX_DROPPED_BYTES: u32 = 1 << 20;

/// Bytes per read while hyper does not read.
const READ_BYTES: usize = 4096;

/// Time between GOAWAY and the end of an HTTP/2 connection. Requests sent meanwhile are answered (RFC 9113, section
/// 6.8), and a client that receives GOAWAY closes the connection itself.
pub const GOAWAY_GRACE: Duration = Duration::from_secs(5);

/// Returns the limit on slow reading.
pub(super) const fn stall(limits: &Limits) -> PaceLimit {
    PaceLimit { pause: limits.stall_timeout.get(), rate: limits.min_rate.get() }
}

/// Waits until a client resets its connection or ends its sending side, even if data is unread. epoll reports both
/// (`EPOLLHUP`, `EPOLLRDHUP`), and nothing else satisfies this interest of tokio. The future owns a duplicate of the
/// descriptor, as it cannot borrow one that others read from.
async fn hang_up(socket: TcpStream) {
    #[cfg(target_os = "linux")]
    let interest = Interest::PRIORITY | Interest::ERROR;
    #[cfg(not(target_os = "linux"))]
    let interest = Interest::ERROR;
    let _ = socket.ready(interest).await;
}

/// Returns the read error that hyper gets in place of ambiguously framed bytes.
fn ambiguous_framing_error() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the request can be read in two ways")
}

fn stopped_reading() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the client stopped reading")
}

// === impl ClientIo ===

impl<I> ClientIo<I> {
    /// Wraps `io`.
    pub fn new(io: I, state: Arc<ConnectionState>, limits: Arc<Limits>, memory: Arc<Memory>) -> Self {
        let now = Instant::now();
        state.mark_idle_since(now);
        let quiet = QuietPeriod { since: now, in_head: true, begun: 0, leaving: None, timer: None };
        Self {
            io,
            state,
            limits,
            http2: None,
            listening: false,
            read_ahead: Vec::new(),
            dropped_bytes: 0,
            socket: None,
            hang_up: None,
            framing: RequestFraming::default(),
            memory,
            head: None,
            quiet,
            read_stall: None,
        }
    }

    /// Sets the accessor of the socket of `io`.
    pub(super) const fn with_socket(mut self, socket: Option<SocketOf<I>>) -> Self {
        self.socket = socket;
        self
    }

    /// Records that bytes were read.
    fn record_read_bytes(&mut self) {
        if self.http2.is_some() && self.state.begun() > 0 {
            // PING, acknowledgements and WINDOW_UPDATE between requests begin none.
            return;
        }
        if !self.state.is_active() && (self.quiet.begun != self.state.begun() || !self.quiet.in_head) {
            self.quiet.restart(self.state.begun(), true);
            self.state.mark_busy();
        }
    }

    /// Polls the timeout of the next request or its head while there is nothing to read, or nothing left to write.
    /// Completes when it has passed.
    fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.state.is_stalled() {
            return Poll::Ready(stopped_reading());
        }
        if self.state.is_active() {
            return Poll::Pending;
        }
        let quiet = &mut self.quiet;
        if quiet.begun != self.state.begun() {
            quiet.restart(self.state.begun(), false);
            self.state.mark_idle_since(quiet.since);
        }
        let (limit, what) = match quiet.in_head {
            true => (self.limits.header_timeout.get(), "the head of a request did not come"),
            false => (self.limits.idle_timeout.get(), "no request arrived"),
        };
        let mut due = quiet.since + limit;
        // HTTP/2 announces the end first. HTTP/1.1 has no means to, and a client without a request loses nothing.
        if self.http2.is_some() {
            let is_over = || quiet.timer.as_ref().is_some_and(|timer| timer.is_elapsed());
            let is_due = quiet.begun > 0 && is_over() && due <= Instant::now();
            if quiet.leaving.is_none() && (is_due || self.state.is_closing()) {
                quiet.leaving = Some(Box::new(Instant::now()));
                self.state.close();
            }
            if let Some(leaving) = &quiet.leaving {
                due = quiet.since.max(**leaving) + GOAWAY_GRACE;
            }
        }
        match &mut quiet.timer {
            // The timer wakes the task that polls the connection, which is always the same.
            Some(timer) if !timer.is_elapsed() && timer.deadline() <= due => return Poll::Pending,
            Some(_) if due <= Instant::now() => {
                return Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            Some(timer) => timer.as_mut().reset(due),
            None => quiet.timer = Some(Box::pin(sleep_until(due))),
        }
        match quiet.timer.as_mut().map(|timer| timer.as_mut().poll(cx)) {
            Some(Poll::Ready(())) => Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, what)),
            _ => Poll::Pending,
        }
    }

    /// Returns the bytes of an incomplete head beyond those covered by the cost of its connection.
    fn head_bytes(&self) -> usize {
        match &self.http2 {
            Some(frames) if frames.is_in_head() => H2_HEAD_FACTOR * self.limits.max_header_bytes.get(),
            Some(_) => 0,
            None => self.framing.head_bytes().saturating_sub(UNCOUNTED_HEAD_BYTES),
        }
    }

    /// Counts the memory of an incomplete head. Completes when the memory is needed elsewhere.
    fn poll_head(&mut self, cx: &Context<'_>) -> Poll<io::Error> {
        let bytes = self.head_bytes();
        self.memory
            .poll_waiting(&mut self.head, bytes, cx)
            .map(|()| io::Error::new(io::ErrorKind::OutOfMemory, "others need the memory of a head"))
    }

    /// Polls the limit on slow reading while the client takes nothing. Completes when it has been exceeded.
    fn poll_stall(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.state.is_stalled() {
            return Poll::Ready(stopped_reading());
        }
        let kept = self.kept_unread();
        let behind = self.read_stall.get_or_insert_with(|| Box::new(Stall::new(stall(&self.limits))));
        behind.poll_over(&self.memory, kept, cx).map(|()| {
            self.state.record_stall();
            stopped_reading()
        })
    }

    /// Returns the memory held while the client does not read. HTTP/2 streams count their own.
    fn kept_unread(&self) -> HeldMemory {
        match () {
            () if self.http2.is_some() => HeldMemory::Nothing,
            () if self.state.leaves_http() => HeldMemory::Unread(UnreadKind::Tunnel, TUNNEL_COST_BYTES),
            // hyper buffers as much for writing as for reading.
            () if self.state.relays() => {
                let more = self.limits.max_header_bytes.get().saturating_sub(SEND_BUFFER_BYTES);
                HeldMemory::Unread(UnreadKind::Relay, RELAY_COST_BYTES + more)
            }
            () => HeldMemory::Nothing,
        }
    }

    fn wrote(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match written {
            Poll::Pending => self.poll_stall(cx).map(Err),
            Poll::Ready(written) => {
                if let Ok(written) = &written {
                    if let Some(behind) = &mut self.read_stall {
                        behind.credit_read(*written);
                    }
                    if let Some(frames) = &mut self.http2 {
                        frames.wrote(*written);
                    }
                }
                Poll::Ready(written)
            }
        }
    }
}

impl QuietPeriod {
    fn restart(&mut self, begun: u32, in_head: bool) {
        self.begun = begun;
        self.in_head = in_head;
        self.since = Instant::now();
    }
}

impl<I: AsyncRead + Unpin> ClientIo<I> {
    /// Detects a disconnect between a request and its response, while hyper does not read (`half_close`), and keeps
    /// bytes that arrive instead. Usually this costs no system call: a read that left room has shown that there is no
    /// more.
    ///
    /// A disconnect follows the bytes sent before it, so these are read to their end. Bytes that cannot be kept are
    /// dropped: then the response announces the end of the connection, and the client resends the requests that were
    /// not answered (RFC 9112, section 9.3.2). Only a body that its endpoint does not take stays unread; `poll_hang_up`
    /// covers it.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let listening = std::mem::take(&mut self.listening);
        if listening || self.http2.is_some() || !self.state.is_active() || self.state.leaves_http() {
            return Poll::Pending;
        }
        let is_later = self.framing.is_beyond(self.state.begun());
        if is_later {
            self.hang_up = None;
        }
        while is_later || self.read_ahead.len() < MAX_AHEAD_BYTES {
            let left = MAX_AHEAD_BYTES - self.read_ahead.len();
            let mut room = [MaybeUninit::uninit(); READ_BYTES];
            let mut room = ReadBuf::uninit(match left {
                0 => &mut room,
                left => &mut room[..left.min(READ_BYTES)],
            });
            match Pin::new(&mut self.io).poll_read(cx, &mut room) {
                Poll::Pending => break,
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Ready(Ok(())) if room.filled().is_empty() => {
                    return Poll::Ready(io::ErrorKind::ConnectionAborted.into());
                }
                Poll::Ready(Ok(())) if self.dropped_bytes == 0 && left > 0 => {
                    self.read_ahead.extend_from_slice(room.filled());
                }
                Poll::Ready(Ok(())) => {
                    let dropped = std::mem::take(&mut self.read_ahead).len() + room.filled().len();
                    self.dropped_bytes += u32::try_from(dropped).unwrap_or(u32::MAX / 2);
                    if self.dropped_bytes > MAX_DROPPED_BYTES {
                        return Poll::Ready(io::Error::other("too much came behind a request"));
                    }
                    self.state.close();
                }
            }
        }
        if is_later || self.read_ahead.len() < MAX_AHEAD_BYTES {
            Poll::Pending
        } else {
            self.poll_hang_up(cx)
        }
    }

    /// Detects a disconnect behind bytes that stay in the kernel. The end of the sending side counts as a disconnect
    /// here as elsewhere, even if the body is incomplete.
    fn poll_hang_up(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.hang_up.is_none() {
            let Some(socket) = self.socket.and_then(|socket| socket(&self.io)) else { return Poll::Pending };
            let again = socket.try_clone_to_owned();
            match again.and_then(|socket| TcpStream::from_std(std::net::TcpStream::from(socket))) {
                Ok(socket) => self.hang_up = Some(Box::pin(hang_up(socket))),
                Err(error) => tracing::debug!(%error, "a stalled upload is not watched"),
            }
        }
        match self.hang_up.as_mut().map(|hang_up| hang_up.as_mut().poll(cx)) {
            Some(Poll::Ready(())) => Poll::Ready(io::ErrorKind::ConnectionAborted.into()),
            _ => Poll::Pending,
        }
    }

    /// Returns `true` if the first bytes are the HTTP/2 preface (RFC 9113, section 3.3). They can still be read
    /// afterwards.
    ///
    /// # Errors
    /// The connection broke, or nothing arrived in time.
    pub async fn begins_http2(&mut self) -> io::Result<bool> {
        while self.read_ahead.len() < PREFACE.len() && PREFACE.starts_with(&self.read_ahead) {
            let mut room = [0; PREFACE.len()];
            let mut room = ReadBuf::new(&mut room[self.read_ahead.len()..]);
            std::future::poll_fn(|cx| match Pin::new(&mut self.io).poll_read(cx, &mut room) {
                Poll::Pending => self.poll_quiet(cx).map(Err),
                Poll::Ready(read) => Poll::Ready(read),
            })
            .await?;
            if room.filled().is_empty() {
                break;
            }
            self.record_read_bytes();
            self.read_ahead.extend_from_slice(room.filled());
        }
        if self.read_ahead == PREFACE {
            self.http2 = Some(Box::new(H2FrameParser::new(self.limits.max_control_frames)));
        }
        Ok(self.http2.is_some())
    }

    /// Reads the bytes read ahead, then from the connection, in one call, so that hyper's buffer need not grow for a
    /// second one.
    fn poll_next(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.dropped_bytes > 0 {
            // Bytes are missing from here on, so the stream ends for hyper.
            return Poll::Ready(Ok(()));
        }
        let count = self.read_ahead.len().min(buf.remaining());
        if count > 0 {
            buf.put_slice(&self.read_ahead[..count]);
            self.read_ahead.drain(..count);
            if !self.read_ahead.is_empty() || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            self.read_ahead = Vec::new();
        }
        match Pin::new(&mut self.io).poll_read(cx, buf) {
            Poll::Pending if count > 0 => Poll::Ready(Ok(())),
            read => read,
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for ClientIo<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.framing.is_cut() && !self.state.leaves_http() {
            return Poll::Ready(Err(ambiguous_framing_error()));
        }
        let before = buf.filled().len();
        let read = self.poll_next(cx, buf);
        self.listening = read.is_pending();
        match read {
            Poll::Pending => match self.poll_quiet(cx) {
                Poll::Pending => self.poll_head(cx).map(Err),
                over => over.map(Err),
            },
            Poll::Ready(read) => {
                self.record_read_bytes();
                if let Some(frames) = &mut self.http2 {
                    if !frames.parse_frames(&buf.filled()[before..]) {
                        return Poll::Ready(Err(io::Error::other(TOO_MANY_FRAMES)));
                    }
                    if self.state.is_reset_rapidly(self.limits.max_rapid_resets) {
                        return Poll::Ready(Err(io::Error::other("too many requests were reset")));
                    }
                } else if !self.state.leaves_http() {
                    let may_pass = self.framing.admit_bytes(&buf.filled()[before..]);
                    if may_pass == 0 && self.framing.is_cut() {
                        return Poll::Ready(Err(ambiguous_framing_error()));
                    }
                    buf.set_filled(before + may_pass);
                }
                if self.head.is_some() && self.head_bytes() == 0 {
                    self.head = None;
                }
                Poll::Ready(read)
            }
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ClientIo<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.wrote(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.wrote(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Polled here, too: after a response hyper flushes, and awaits the next request without another read.
        if let Poll::Ready(error) = self.poll_quiet(cx) {
            return Poll::Ready(Err(error));
        }
        if let Poll::Ready(error) = self.poll_ahead(cx) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
