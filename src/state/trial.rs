//! Doubt about an endpoint that broke off a request: either the endpoint died, or the request is at fault.

use std::{
    pin::pin,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use tokio::sync::Notify;

/// Unsettled question about an endpoint that broke off a request: is it alive?
///
/// Until it is settled, the endpoint keeps its capacity and proven ramp, so that one request that crashes servers does
/// not throttle others. The owner probes immediately; a response to any other request settles the doubt too. The
/// requests that were broken off wait for the verdict ([`Self::verdict`]).
#[derive(Default)]
pub(super) struct Trial {
    is_open: AtomicBool,
    /// Responses after a failure, to probes and requests; wraps around.
    answers: AtomicU32,
    settled: Notify,
}

/// Verdict on a doubted endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrialResult {
    /// The endpoint has responded since; the request is at fault.
    Alive,
    /// The endpoint accepts no more requests.
    Down,
}

// === impl Trial ===

impl Trial {
    /// Opens the question. Returns whether it was closed.
    pub(super) fn open(&self) -> bool {
        !self.is_open.swap(true, Ordering::SeqCst)
    }

    pub(super) fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    /// Counts a response and settles the question.
    pub(super) fn answered(&self) {
        self.answers.fetch_add(1, Ordering::SeqCst);
        self.settle();
    }

    pub(super) fn answers(&self) -> u32 {
        self.answers.load(Ordering::SeqCst)
    }

    /// Waits until the number of responses differs from `answers` or `is_ready` is false. Cancel-safe.
    pub(super) async fn verdict(&self, answers: u32, is_ready: impl Fn() -> bool) -> TrialResult {
        loop {
            let mut settled = pin!(self.settled.notified());
            // Registered before the state is read, so that no verdict falls in between.
            settled.as_mut().enable();
            if !is_ready() {
                return TrialResult::Down;
            }
            if self.answers() != answers {
                return TrialResult::Alive;
            }
            settled.await;
        }
    }

    /// Closes the question and wakes the requests that wait for the verdict.
    pub(super) fn settle(&self) {
        self.is_open.store(false, Ordering::SeqCst);
        self.settled.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use crate::state::{Endpoint, TargetState};

    #[test]
    fn doubt_keeps_the_limit_until_the_verdict() {
        let endpoint = Endpoint::new("127.0.0.1:1", 64);
        TargetState::default().ready(&endpoint, None);
        let before = endpoint.answers();
        endpoint.doubt();
        assert!(endpoint.is_ready() && endpoint.is_doubted() && endpoint.acquire());
        assert_eq!((endpoint.limit(), endpoint.verdict(before).now_or_never()), (64, None));
        endpoint.succeeded(endpoint.level());
        assert_eq!(
            endpoint.verdict(before).now_or_never(),
            Some(TrialResult::Alive),
            "it answered another request"
        );
        assert!(!endpoint.is_doubted());

        let before = endpoint.answers();
        endpoint.doubt();
        endpoint.suspect();
        assert_eq!(endpoint.verdict(before).now_or_never(), Some(TrialResult::Down));
        assert_eq!((endpoint.limit(), endpoint.is_doubted()), (1, false));
    }

    #[tokio::test]
    async fn doubt_wakes_its_owner_once() {
        let endpoint = Endpoint::new("127.0.0.1:1", 64);
        TargetState::default().ready(&endpoint, None);
        endpoint.doubt();
        endpoint.doubt();
        endpoint.attention().await;
        assert_eq!(endpoint.attention().now_or_never(), None, "the second adds nothing");
    }

    #[tokio::test]
    async fn retiring_wakes_waiters_for_the_verdict() {
        let endpoint = Endpoint::new("127.0.0.1:1", 64);
        TargetState::default().ready(&endpoint, None);
        let before = endpoint.answers();
        endpoint.doubt();
        let retiring = async { endpoint.retire() };
        assert_eq!(tokio::join!(endpoint.verdict(before), retiring).0, TrialResult::Down);
    }
}
