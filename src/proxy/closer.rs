//! Deferred closing of sockets.
//!
//! `close` is the most expensive part of handling a disconnect. When thousands of clients leave at once, demand is
//! up to date in half the time if all disconnects are read before any socket is closed.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
    task::yield_now,
};

/// Sockets closed before the task yields.
const CLOSES_PER_TURN: usize = 16;

/// Turns for which a close may be deferred. A turn of a busy thread takes a few hundred µs, so clients do not notice.
const MAX_DEFERRED_TURNS: u64 = 256;

/// Closes the ended connections of one thread. They count as open until closed, which bounds their number.
pub struct Closer<C> {
    ended: mpsc::UnboundedSender<C>,
    /// Number of reads from connections of this thread.
    reads: Arc<AtomicU64>,
}

/// A connection whose close is deferred, with the guard that counts it as open.
pub struct DeferredClose<I, G> {
    /// `None` once dropped.
    parts: Option<(I, G)>,
    closer: Closer<(I, G)>,
}

// === impl Closer ===

impl<C> Clone for Closer<C> {
    fn clone(&self) -> Self {
        Self { ended: self.ended.clone(), reads: self.reads.clone() }
    }
}

impl<C> Closer<C> {
    /// Creates a closer, and the task that closes: it ends once all handles are dropped and all connections closed.
    pub fn new() -> (Self, impl Future<Output = ()>) {
        let (ended, endings) = mpsc::unbounded_channel();
        let reads = Arc::new(AtomicU64::new(0));
        (Self { ended, reads: reads.clone() }, close(endings, reads))
    }

    fn read(&self) {
        // Written by one thread only, so no read-modify-write is needed.
        self.reads.store(self.reads.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

/// Closes connections while no other task of the thread reads, or when they are overdue.
async fn close<C>(mut endings: mpsc::UnboundedReceiver<C>, reads: Arc<AtomicU64>) {
    let mut waiting = VecDeque::new();
    let mut turn = 0_u64;
    while let Some(first) = endings.recv().await {
        waiting.push_back((turn, first));
        while !waiting.is_empty() {
            let before = reads.load(Ordering::Relaxed);
            yield_now().await;
            turn += 1;
            let is_idle = reads.load(Ordering::Relaxed) == before;
            for _ in 0..CLOSES_PER_TURN {
                let due = |(since, _): &(u64, C)| is_idle || turn - since >= MAX_DEFERRED_TURNS;
                if waiting.pop_front_if(|first| due(first)).is_none() {
                    break;
                }
            }
            while let Ok(next) = endings.try_recv() {
                waiting.push_back((turn, next));
            }
        }
    }
}

// === impl DeferredClose ===

impl<I, G> DeferredClose<I, G> {
    /// Defers the close to `closer`.
    pub fn new(io: I, counted: G, closer: Closer<(I, G)>) -> Self {
        Self { parts: Some((io, counted)), closer }
    }
}

impl<I: AsFd, G> DeferredClose<I, G> {
    /// Returns the socket, unless dropped.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.parts.as_ref().map(|(io, _)| io.as_fd())
    }
}

impl<I: Unpin, G> DeferredClose<I, G> {
    fn io(&mut self) -> io::Result<Pin<&mut I>> {
        self.parts.as_mut().map(|(io, _)| Pin::new(io)).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl<I, G> Drop for DeferredClose<I, G> {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            // Closes immediately if the task has ended.
            let _ = self.closer.ended.send(parts);
        }
    }
}

// No field is structurally pinned.
impl<I, G> Unpin for DeferredClose<I, G> {}

impl<I: AsyncRead + Unpin, G> AsyncRead for DeferredClose<I, G> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.closer.read();
        self.io()?.poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin, G> AsyncWrite for DeferredClose<I, G> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.io()?.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.io()?.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.parts.as_ref().is_some_and(|(io, _)| io.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io()?.poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::io::{AsyncReadExt, empty};

    use super::*;

    /// Counts open connections.
    struct OpenGuard(Arc<AtomicUsize>);

    impl OpenGuard {
        fn one_more(open: &Arc<AtomicUsize>) -> Self {
            open.fetch_add(1, Ordering::Relaxed);
            Self(open.clone())
        }
    }

    impl Drop for OpenGuard {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn connections_are_closed_when_no_task_reads() {
        let open = Arc::new(AtomicUsize::new(0));
        let (closer, closing) = Closer::new();
        let closing = tokio::spawn(closing);
        let mut busy = DeferredClose::new(empty(), OpenGuard::one_more(&open), closer.clone());
        for _ in 0..1000 {
            drop(DeferredClose::new(empty(), OpenGuard::one_more(&open), closer.clone()));
        }
        for _ in 0..100 {
            busy.read_u8().await.unwrap_err();
            yield_now().await;
            assert_eq!(open.load(Ordering::Relaxed), 1001, "reads go first");
        }
        for _ in 0..100 {
            yield_now().await;
        }
        assert_eq!(open.load(Ordering::Relaxed), 1);
        drop((busy, closer));
        closing.await.unwrap();
        assert_eq!(open.load(Ordering::Relaxed), 0, "including the last one");
    }

    #[tokio::test]
    async fn closer_closes_connections_even_when_busy() {
        let open = Arc::new(AtomicUsize::new(0));
        let (closer, closing) = Closer::new();
        tokio::spawn(closing);
        let mut busy = DeferredClose::new(empty(), OpenGuard::one_more(&open), closer.clone());
        drop(DeferredClose::new(empty(), OpenGuard::one_more(&open), closer));
        for _ in 0..=MAX_DEFERRED_TURNS + 1 {
            busy.read_u8().await.unwrap_err();
            yield_now().await;
        }
        assert_eq!(open.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn connection_is_closed_immediately_without_closer() {
        let open = Arc::new(AtomicUsize::new(0));
        let (closer, closing) = Closer::new();
        drop(closing);
        drop(DeferredClose::new(empty(), OpenGuard::one_more(&open), closer));
        assert_eq!(open.load(Ordering::Relaxed), 0);
    }
}
