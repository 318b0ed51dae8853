//! Connections to an endpoint, and their termination once nothing is behind it any more.

use std::{
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Handle for terminating one connection. The publisher of the endpoint holds it.
///
/// A pod can vanish without closing its connections, when its node dies. A request in flight would then wait for the
/// full response timeout of the route. The cost per request is one store when its response begins.
#[derive(Debug, Default)]
pub struct Cut {
    is_cut: AtomicBool,
    is_answering: AtomicBool,
    /// Shared by all connections of the endpoint.
    is_heard: Arc<AtomicBool>,
    reader: AtomicWaker,
}

/// Connections of one endpoint.
#[derive(Default)]
pub(super) struct SeverableConnections {
    open_cuts: Mutex<Vec<Weak<Cut>>>,
    is_severed: AtomicBool,
    severed: Notify,
    /// True if data has arrived on any connection since this flag was last taken.
    is_heard: Arc<AtomicBool>,
}

// === impl Cut ===

impl Cut {
    /// Records whether a response is in progress; it gets a grace period.
    pub fn set_answering(&self, is_answering: bool) {
        self.is_answering.store(is_answering, Ordering::Relaxed);
    }

    /// Records that data arrived. Only loads in the common case, so that cores do not contend for the cache line.
    pub fn record_arrived_data(&self) {
        if !self.is_heard.load(Ordering::Relaxed) {
            self.is_heard.store(true, Ordering::Relaxed);
        }
    }

    /// Returns whether the connection is terminated.
    pub fn is_cut(&self) -> bool {
        self.is_cut.load(Ordering::Acquire)
    }

    /// Polls for termination; wakes only the task that polled last.
    pub fn poll_cut(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.reader.register(cx.waker());
        if self.is_cut() { Poll::Ready(()) } else { Poll::Pending }
    }

    fn cut(&self) {
        self.is_cut.store(true, Ordering::Release);
        self.reader.wake();
    }
}

// === impl SeverableConnections ===

impl SeverableConnections {
    pub(super) fn reopen(&self) {
        self.is_severed.store(false, Ordering::SeqCst);
    }

    /// Registers a new connection.
    pub(super) fn add(&self) -> Arc<Cut> {
        let is_heard = self.is_heard.clone();
        let cut = Arc::new(Cut { is_heard, ..Cut::default() });
        let mut open = self.open_cuts.lock();
        if open.len() == open.capacity() {
            // Remove ended connections before the vector would grow.
            open.retain(|cut| cut.strong_count() > 0);
        }
        open.push(Arc::downgrade(&cut));
        drop(open);
        // `sever` sets the flag before it lists connections; this order closes the race.
        if self.is_severed.load(Ordering::SeqCst) {
            cut.cut();
        }
        cut
    }

    /// Terminates the connections without a response in progress; with `all`, every one.
    pub(super) fn sever(&self, all: bool) {
        self.is_severed.store(true, Ordering::SeqCst);
        let open = self.open_cuts.lock().clone();
        for cut in open.iter().filter_map(Weak::upgrade) {
            if all || !cut.is_answering.load(Ordering::Relaxed) {
                cut.cut();
            }
        }
        self.severed.notify_waiters();
    }

    /// Returns whether data arrived since the last call.
    pub(super) fn take_arrived_flag(&self) -> bool {
        self.is_heard.swap(false, Ordering::Relaxed)
    }

    /// Waits until the connections are severed. Cancel-safe.
    pub(super) async fn severed(&self) {
        loop {
            let mut severed = pin!(self.severed.notified());
            severed.as_mut().enable();
            if self.is_severed.load(Ordering::SeqCst) {
                return;
            }
            severed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use crate::state::{Endpoint, TargetState};

    #[test]
    fn severing_spares_responses_for_the_grace() {
        let endpoint = Endpoint::new("10.0.0.1:8000", 1);
        let (waiting, answering) = (endpoint.connection(), endpoint.connection());
        answering.set_answering(true);
        assert_eq!(endpoint.severed().now_or_never(), None);
        endpoint.sever(false);
        assert_eq!(endpoint.severed().now_or_never(), Some(()));
        assert!(waiting.is_cut() && !answering.is_cut());
        assert!(endpoint.connection().is_cut(), "a connection attempt that was in progress");
        endpoint.sever(true);
        assert!(answering.is_cut());
        TargetState::default().ready(&endpoint, None);
        assert!(!endpoint.connection().is_cut(), "the address belongs to another pod now");
    }

    #[test]
    fn ended_connections_leave_the_list() {
        let endpoint = Endpoint::new("10.0.0.1:8000", 1);
        (0..1000).for_each(|_| drop(endpoint.connection()));
        assert!(endpoint.connections.open_cuts.lock().len() < 10);
    }
}
