//! Connections to an endpoint, and how they are broken off when nothing stands behind it any more.

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

use super::Endpoint;

/// One connection's end, in the hands of whoever publishes the endpoint.
///
/// A pod can vanish without closing its connections: its node has died. What is in flight would wait for an answer for as
/// long as the route allows one to take. A request pays a store when its answer begins, and nothing is registered for it.
#[derive(Debug, Default)]
pub struct Cut {
    is_cut: AtomicBool,
    is_answering: AtomicBool,
    /// The endpoint's.
    is_heard: Arc<AtomicBool>,
    reader: AtomicWaker,
}

/// The connections of one endpoint.
#[derive(Default)]
pub(super) struct Connections {
    open: Mutex<Vec<Weak<Cut>>>,
    is_severed: AtomicBool,
    severed: Notify,
    /// Something has come over one of them.
    is_heard: Arc<AtomicBool>,
}

// === impl Cut ===

impl Cut {
    /// Notes whether an answer is on its way: then it has a grace.
    pub fn set_answering(&self, is_answering: bool) {
        self.is_answering.store(is_answering, Ordering::Relaxed);
    }

    /// Notes that the endpoint has sent something: mostly a load, of what nobody has written to meanwhile.
    pub fn hear(&self) {
        if !self.is_heard.load(Ordering::Relaxed) {
            self.is_heard.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the connection is broken off.
    pub fn is_cut(&self) -> bool {
        self.is_cut.load(Ordering::Acquire)
    }

    /// Ready once the connection is broken off; wakes the last task that asked.
    pub fn poll_cut(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.reader.register(cx.waker());
        if self.is_cut() { Poll::Ready(()) } else { Poll::Pending }
    }

    fn cut(&self) {
        self.is_cut.store(true, Ordering::Release);
        self.reader.wake();
    }
}

// === impl Connections ===

impl Connections {
    pub(super) fn reopen(&self) {
        self.is_severed.store(false, Ordering::SeqCst);
    }
}

// === impl Endpoint ===

impl Endpoint {
    /// A new connection to the endpoint.
    pub fn connection(&self) -> Arc<Cut> {
        let is_heard = self.connections.is_heard.clone();
        let cut = Arc::new(Cut { is_heard, ..Cut::default() });
        let mut open = self.connections.open.lock();
        if open.len() == open.capacity() {
            // Those that have ended go whenever there would have to be room for more.
            open.retain(|cut| cut.strong_count() > 0);
        }
        open.push(Arc::downgrade(&cut));
        drop(open);
        // Read after the connection can be found, as `sever` does the reverse.
        if self.connections.is_severed.load(Ordering::SeqCst) {
            cut.cut();
        }
        cut
    }

    /// Breaks off the connections over which no answer comes, as nothing stands behind the endpoint any more; or, after a
    /// grace, all of them (`all`). The endpoint must have been retired. It may be used again when it is made ready.
    pub fn sever(&self, all: bool) {
        self.connections.is_severed.store(true, Ordering::SeqCst);
        let open = self.connections.open.lock().clone();
        for cut in open.iter().filter_map(Weak::upgrade) {
            if all || !cut.is_answering.load(Ordering::Relaxed) {
                cut.cut();
            }
        }
        self.connections.severed.notify_waiters();
    }

    /// Whether the endpoint has sent anything since this was asked last.
    pub fn take_heard(&self) -> bool {
        self.connections.is_heard.swap(false, Ordering::Relaxed)
    }

    /// Waits until the connections of the endpoint are broken off. Cancel-safe.
    pub async fn severed(&self) {
        loop {
            let mut severed = pin!(self.connections.severed.notified());
            severed.as_mut().enable();
            if self.connections.is_severed.load(Ordering::SeqCst) {
                return;
            }
            severed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use crate::state::TargetState;

    #[test]
    fn severing_spares_answers_until_the_grace_is_over() {
        let endpoint = Endpoint::new("10.0.0.1:8000", 1);
        let (waiting, answering) = (endpoint.connection(), endpoint.connection());
        answering.set_answering(true);
        assert_eq!(endpoint.severed().now_or_never(), None);
        endpoint.sever(false);
        assert_eq!(endpoint.severed().now_or_never(), Some(()));
        assert!(waiting.is_cut() && !answering.is_cut());
        assert!(endpoint.connection().is_cut(), "one that was being made meanwhile");
        endpoint.sever(true);
        assert!(answering.is_cut());
        TargetState::default().ready(&endpoint, None);
        assert!(!endpoint.connection().is_cut(), "another pod has the address now");
    }

    #[test]
    fn connections_that_ended_are_forgotten() {
        let endpoint = Endpoint::new("10.0.0.1:8000", 1);
        (0..1000).for_each(|_| drop(endpoint.connection()));
        assert!(endpoint.connections.open.lock().len() < 10);
    }
}
