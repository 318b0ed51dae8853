//! Gateways before the servers of a target, which have yet to notice them.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

/// State of an endpoint that is a gateway, or may be one.
///
/// It settles: from when it is found ready until an answer of a model has come through it, an error of it may mean that
/// it has not noticed its servers.
pub struct Front {
    kind: FrontKind,
    /// True once an answer of a model has come through it since it was found ready. Read by every answer.
    has_settled: AtomicBool,
    ready_since: Mutex<Option<Instant>>,
    /// True while its owner must probe `readiness.path` before the next request goes to it.
    asks_first: AtomicBool,
    /// Time and result of the last probe in doubt: true for down. Locked during the probe.
    last_doubt: tokio::sync::Mutex<Option<(Instant, bool)>>,
}

/// Source of the readiness of an endpoint that may be a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontKind {
    /// The pods behind it. Its own `readiness.path` may be answered at zero, or by nobody at any time.
    Gateway,
    /// Its own `readiness.path`.
    Url,
}

// === impl Front ===

impl Front {
    pub(super) fn new(kind: FrontKind) -> Self {
        Self {
            kind,
            has_settled: AtomicBool::new(false),
            ready_since: Mutex::default(),
            asks_first: AtomicBool::new(false),
            last_doubt: tokio::sync::Mutex::default(),
        }
    }

    /// Source of its readiness.
    pub const fn kind(&self) -> FrontKind {
        self.kind
    }

    /// Marks it as ready, and so as not settled, from now on.
    pub fn found_ready(&self) {
        *self.ready_since.lock() = Some(Instant::now());
        self.has_settled.store(false, Ordering::Relaxed);
    }

    /// Marks it as settled: an answer of a model came through it.
    pub fn settle(&self) {
        if !self.has_settled.load(Ordering::Relaxed) {
            self.has_settled.store(true, Ordering::Relaxed);
        }
    }

    /// Returns whether it was found ready less than `within` ago and has not settled.
    pub fn is_settling(&self, within: Duration) -> bool {
        !self.has_settled.load(Ordering::Relaxed)
            && self.ready_since.lock().is_some_and(|since| since.elapsed() < within)
    }

    /// Returns whether an error of it is a reason to probe it. A gateway that never settled has had its time.
    pub fn is_to_be_doubted(&self) -> bool {
        self.kind == FrontKind::Url || self.has_settled.load(Ordering::Relaxed)
    }

    /// Probes it with `ask`, and returns whether it is down. Concurrent callers share one probe. Cancel-safe.
    pub async fn is_down(&self, ask: impl Future<Output = bool>) -> bool {
        let began = Instant::now();
        let mut last = self.last_doubt.lock().await;
        match *last {
            Some((answered, is_down)) if answered >= began => is_down,
            _ => {
                let is_down = ask.await;
                *last = Some((Instant::now(), is_down));
                is_down
            }
        }
    }

    /// Makes its owner probe `readiness.path` before another request goes to it.
    pub fn ask_first(&self) {
        self.asks_first.store(true, Ordering::Relaxed);
    }

    /// Returns whether to probe `readiness.path` before another request goes to it, and clears that.
    pub fn takes_question(&self) -> bool {
        self.asks_first.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn those_who_doubt_at_once_ask_once() {
        let front = Front::new(FrontKind::Url);
        let asked = Mutex::new(0);
        let ask = async || {
            *asked.lock() += 1;
            sleep(Duration::from_millis(100)).await;
            true
        };
        let doubt = async |after: u64| {
            sleep(Duration::from_millis(after)).await;
            front.is_down(ask()).await
        };
        // The second and the third come while the first one's question is on its way; the last one after it.
        let answers = tokio::join!(doubt(0), doubt(1), doubt(99), doubt(150));
        assert_eq!((answers, *asked.lock()), ((true, true, true, true), 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_that_is_given_up_is_asked_by_the_next() {
        let front = Front::new(FrontKind::Url);
        let given_up = tokio::time::timeout(Duration::from_secs(1), front.is_down(std::future::pending()));
        let next = front.is_down(async { false });
        let (given_up, next) = tokio::join!(given_up, next);
        assert!(given_up.is_err() && !next);
    }

    #[tokio::test(start_paused = true)]
    async fn a_front_settles_with_an_answer_or_with_time() {
        let (front, within) = (Front::new(FrontKind::Gateway), Duration::from_secs(30));
        assert!(!front.is_settling(within) && !front.is_to_be_doubted(), "it was never ready");
        front.found_ready();
        sleep(Duration::from_millis(29_999)).await;
        assert!(front.is_settling(within) && !front.is_to_be_doubted());
        sleep(Duration::from_millis(1)).await;
        assert!(!front.is_settling(within) && !front.is_to_be_doubted());
        front.found_ready();
        front.settle();
        assert!(!front.is_settling(within) && front.is_to_be_doubted());
        assert!(Front::new(FrontKind::Url).is_to_be_doubted(), "its probe is all there is to know of it");
    }
}
