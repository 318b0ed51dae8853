//! Gateways in front of a target's servers, which discover them with a delay.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

/// State of an endpoint that is or may be a gateway.
///
/// A gateway is settling from the moment it is found ready until a model's response has passed through it. Until then,
/// an error may mean that it has not discovered its servers yet.
pub struct Front {
    kind: FrontKind,
    /// True once a model's response has passed through since the gateway was found ready. Loaded for every response.
    has_settled: AtomicBool,
    ready_since: Mutex<Option<Instant>>,
    /// True while `readiness.path` must be probed before the next dispatch.
    probe_required: AtomicBool,
    /// Time and result (true: down) of the last probe made because of a doubtful error. Locked during the probe.
    last_probe: tokio::sync::Mutex<Option<(Instant, bool)>>,
}

/// Source of readiness for an endpoint that may be a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontKind {
    /// The pods behind the gateway, which itself may answer `readiness.path` with none running, or never.
    Gateway,
    /// The response of the endpoint to `readiness.path`.
    Url,
}

// === impl Front ===

impl Front {
    pub(super) fn new(kind: FrontKind) -> Self {
        Self {
            kind,
            has_settled: AtomicBool::new(false),
            ready_since: Mutex::default(),
            probe_required: AtomicBool::new(false),
            last_probe: tokio::sync::Mutex::default(),
        }
    }

    /// Returns the source of readiness.
    pub const fn kind(&self) -> FrontKind {
        self.kind
    }

    /// Marks the gateway as ready and settling.
    pub fn found_ready(&self) {
        *self.ready_since.lock() = Some(Instant::now());
        self.has_settled.store(false, Ordering::Relaxed);
    }

    /// Marks the gateway as settled: a model's response passed through it.
    pub fn settle(&self) {
        if !self.has_settled.load(Ordering::Relaxed) {
            self.has_settled.store(true, Ordering::Relaxed);
        }
    }

    /// Returns whether the gateway was found ready less than `within` ago and has not settled.
    pub fn is_settling(&self, within: Duration) -> bool {
        !self.has_settled.load(Ordering::Relaxed)
            && self.ready_since.lock().is_some_and(|since| since.elapsed() < within)
    }

    /// Returns whether an error warrants a probe. Not for a gateway that has never settled: its settling time has
    /// passed.
    pub fn warrants_probe(&self) -> bool {
        self.kind == FrontKind::Url || self.has_settled.load(Ordering::Relaxed)
    }

    /// Awaits `probe` and returns its result: whether the endpoint is down. Concurrent callers share one probe.
    /// Cancel-safe.
    pub async fn is_down(&self, probe: impl Future<Output = bool>) -> bool {
        let began = Instant::now();
        let mut last = self.last_probe.lock().await;
        match *last {
            Some((answered, is_down)) if answered >= began => is_down,
            _ => {
                let is_down = probe.await;
                *last = Some((Instant::now(), is_down));
                is_down
            }
        }
    }

    /// Requires a probe of `readiness.path` before the next dispatch.
    pub fn require_probe(&self) {
        self.probe_required.store(true, Ordering::Relaxed);
    }

    /// Returns whether a probe of `readiness.path` is required before the next dispatch, and clears the requirement.
    pub fn take_probe_required(&self) -> bool {
        self.probe_required.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn concurrent_doubts_share_one_probe() {
        let front = Front::new(FrontKind::Url);
        let probes = Mutex::new(0);
        let probe = async || {
            *probes.lock() += 1;
            sleep(Duration::from_millis(100)).await;
            true
        };
        let doubt = async |after: u64| {
            sleep(Duration::from_millis(after)).await;
            front.is_down(probe()).await
        };
        // The second and third start during the first probe (0 to 100 ms), the last one after it.
        let answers = tokio::join!(doubt(0), doubt(1), doubt(99), doubt(150));
        assert_eq!((answers, *probes.lock()), ((true, true, true, true), 2));
    }

    #[tokio::test(start_paused = true)]
    async fn cancelled_probe_is_repeated_by_the_next_caller() {
        let front = Front::new(FrontKind::Url);
        let given_up = tokio::time::timeout(Duration::from_secs(1), front.is_down(std::future::pending()));
        let next = front.is_down(async { false });
        let (given_up, next) = tokio::join!(given_up, next);
        assert!(given_up.is_err() && !next);
    }

    #[tokio::test(start_paused = true)]
    async fn front_settles_with_a_response_or_with_time() {
        let (front, within) = (Front::new(FrontKind::Gateway), Duration::from_secs(30));
        assert!(!front.is_settling(within) && !front.warrants_probe(), "it was never ready");
        front.found_ready();
        sleep(Duration::from_millis(29_999)).await;
        assert!(front.is_settling(within) && !front.warrants_probe());
        sleep(Duration::from_millis(1)).await;
        assert!(!front.is_settling(within) && !front.warrants_probe());
        front.found_ready();
        front.settle();
        assert!(!front.is_settling(within) && front.warrants_probe());
        assert!(Front::new(FrontKind::Url).warrants_probe(), "for a url, only the probe counts");
    }
}
