//! Closing connections when there is nothing better to do.
//!
//! For the kernel, closing one costs more than everything else that a hang-up takes. When thousands of clients leave at
//! once, demand is right in half the time if all of them are heard before any of their connections is closed.

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

/// How many are closed before others get a turn.
const BATCH: usize = 16;

/// How many times one is passed over, at most. A turn of a busy thread takes a few hundred µs, so that no client waits
/// noticeably for the end of a connection that it has closed.
const PASSED_OVER: u64 = 256;

/// Where the connections of one thread go when they have ended. They are counted as open until they are closed, by which
/// their number is bounded.
pub struct Closer<C> {
    ended: mpsc::UnboundedSender<C>,
    /// How often connections of this thread were read from.
    reads: Arc<AtomicU64>,
}

/// A connection that is closed late, with what counts it.
pub struct ClosedLate<I, G> {
    /// None once it has ended.
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
    /// With what closes them: it ends when all have been closed and none can come any more.
    pub fn new() -> (Self, impl Future<Output = ()>) {
        let (ended, endings) = mpsc::unbounded_channel();
        let reads = Arc::new(AtomicU64::new(0));
        (Self { ended, reads: reads.clone() }, close(endings, reads))
    }

    fn read(&self) {
        // By one thread alone: no need to count in one step.
        self.reads.store(self.reads.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

/// Others have had a turn between two looks: if none of them read, there is nothing else to do.
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
            for _ in 0..BATCH {
                let due = |(since, _): &(u64, C)| is_idle || turn - since >= PASSED_OVER;
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

// === impl ClosedLate ===

impl<I, G> ClosedLate<I, G> {
    /// Leaves closing it to `closer`.
    pub fn new(io: I, counted: G, closer: Closer<(I, G)>) -> Self {
        Self { parts: Some((io, counted)), closer }
    }
}

impl<I: AsFd, G> ClosedLate<I, G> {
    /// Its socket, unless it has ended.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.parts.as_ref().map(|(io, _)| io.as_fd())
    }
}

impl<I: Unpin, G> ClosedLate<I, G> {
    fn io(&mut self) -> io::Result<Pin<&mut I>> {
        self.parts.as_mut().map(|(io, _)| Pin::new(io)).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl<I, G> Drop for ClosedLate<I, G> {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            // Where nobody closes any more, it is closed here and now.
            let _ = self.closer.ended.send(parts);
        }
    }
}

// Nothing in it is pinned.
impl<I, G> Unpin for ClosedLate<I, G> {}

impl<I: AsyncRead + Unpin, G> AsyncRead for ClosedLate<I, G> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.closer.read();
        self.io()?.poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin, G> AsyncWrite for ClosedLate<I, G> {
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

    /// Counts what is open.
    struct Open(Arc<AtomicUsize>);

    impl Open {
        fn one_more(open: &Arc<AtomicUsize>) -> Self {
            open.fetch_add(1, Ordering::Relaxed);
            Self(open.clone())
        }
    }

    impl Drop for Open {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn connections_are_closed_when_nothing_else_is_read() {
        let open = Arc::new(AtomicUsize::new(0));
        let (closer, closing) = Closer::new();
        let closing = tokio::spawn(closing);
        let mut busy = ClosedLate::new(empty(), Open::one_more(&open), closer.clone());
        for _ in 0..1000 {
            drop(ClosedLate::new(empty(), Open::one_more(&open), closer.clone()));
        }
        for _ in 0..100 {
            busy.read_u8().await.unwrap_err();
            yield_now().await;
            assert_eq!(open.load(Ordering::Relaxed), 1001, "others are heard first");
        }
        for _ in 0..100 {
            yield_now().await;
        }
        assert_eq!(open.load(Ordering::Relaxed), 1);
        drop((busy, closer));
        closing.await.unwrap();
        assert_eq!(open.load(Ordering::Relaxed), 0, "the last one, too");
    }

    #[tokio::test]
    async fn closer_closes_connections_even_when_busy() {
        let open = Arc::new(AtomicUsize::new(0));
        let (closer, closing) = Closer::new();
        tokio::spawn(closing);
        let mut busy = ClosedLate::new(empty(), Open::one_more(&open), closer.clone());
        drop(ClosedLate::new(empty(), Open::one_more(&open), closer));
        for _ in 0..=PASSED_OVER + 1 {
            busy.read_u8().await.unwrap_err();
            yield_now().await;
        }
        assert_eq!(open.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn where_nobody_closes_a_connection_is_closed_at_once() {
        let open = Arc::new(AtomicUsize::new(0));
        let (closer, closing) = Closer::new();
        drop(closing);
        drop(ClosedLate::new(empty(), Open::one_more(&open), closer));
        assert_eq!(open.load(Ordering::Relaxed), 0);
    }
}
