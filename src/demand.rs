//! Demand: what a scaler reads. Counts of requests, kept alive by the lease and the linger.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

/// The demand of one route, but for the counts, which live where the requests do.
pub struct Demand {
    base: Instant,
    /// When the last request came or went, in milliseconds from `base`; 0: never. One store a request.
    last: AtomicU64,
    raised: Mutex<Raised>,
    /// Rises with every signal.
    signals: watch::Sender<u64>,
    /// Requests that wait in the queues of the model servers themselves, where they are asked.
    server_queue: AtomicU64,
}

#[derive(Default)]
struct Raised {
    /// The first request that found nothing ready.
    since: Option<Instant>,
    /// Until when demand is true whoever is left: the lease of the activation.
    lease: Option<Instant>,
}

// === impl Demand ===

impl Default for Demand {
    fn default() -> Self {
        Self {
            base: Instant::now(),
            last: AtomicU64::new(0),
            raised: Mutex::default(),
            signals: watch::Sender::new(0),
            server_queue: AtomicU64::new(0),
        }
    }
}

impl Demand {
    /// A request came or went.
    pub fn touch(&self) {
        let elapsed = self.base.elapsed().as_millis();
        self.last.store(u64::try_from(elapsed).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }

    /// Nothing is ready, and a request wants it: whoever starts the target is told at once. The lease keeps demand
    /// true for `lease`, even if every client hangs up, until the activation ends.
    pub fn signal(&self, lease: Duration) {
        let now = Instant::now();
        let mut raised = self.raised.lock();
        raised.since.get_or_insert(now);
        raised.lease.get_or_insert(now + lease);
        drop(raised);
        self.signals.send_modify(|signals| *signals += 1);
    }

    /// Somebody waits although something is up: there is not enough of it.
    pub fn stir(&self) {
        self.signals.send_modify(|signals| *signals += 1);
    }

    /// So many requests wait in the model servers' own queues.
    pub fn set_server_queue(&self, waiting: u64) {
        self.server_queue.store(waiting, Ordering::Relaxed);
    }

    /// How many requests wait in the model servers' own queues, by the last look at them; 0 where nobody looks.
    pub fn server_queue(&self) -> u64 {
        self.server_queue.load(Ordering::Relaxed)
    }

    /// Since when something is wanted that is not there.
    pub fn raised_since(&self) -> Option<Instant> {
        self.raised.lock().since
    }

    /// The activation has ended, for good or bad: no lease any more.
    pub fn settle(&self) {
        *self.raised.lock() = Raised::default();
    }

    /// Changes with every signal, and with every request that waits while something is up.
    pub fn signals(&self) -> watch::Receiver<u64> {
        self.signals.subscribe()
    }

    /// Whether the lease of an activation is running.
    pub fn is_leased(&self) -> bool {
        self.raised.lock().lease.is_some_and(|until| Instant::now() < until)
    }

    /// How long no request has come or gone; `None` if there never was one.
    pub fn quiet_for(&self) -> Option<Duration> {
        match self.last.load(Ordering::Relaxed) {
            0 => None,
            last => Some(self.base.elapsed().saturating_sub(Duration::from_millis(last))),
        }
    }

    /// Whether demand is true: something is held or in flight, or the lease runs, or the last request was less than
    /// `linger` ago.
    pub fn is_active(&self, requests: u64, linger: Duration) -> bool {
        requests > 0 || self.is_leased() || self.quiet_for().is_some_and(|quiet| quiet < linger)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_lease_outlives_the_clients_and_the_linger_the_last_request() {
        let demand = Demand::default();
        let linger = Duration::from_secs(60);
        assert!(!demand.is_active(0, linger), "nobody ever came");
        let mut signals = demand.signals();
        demand.touch();
        demand.signal(Duration::from_secs(1800));
        assert!(signals.has_changed().unwrap());
        signals.mark_unchanged();
        tokio::time::advance(Duration::from_secs(1799)).await;
        assert!(demand.is_active(0, linger), "1799 s of 1800 s");
        demand.signal(Duration::from_secs(1800));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!demand.is_active(0, linger), "a second signal does not prolong the lease");
        demand.settle();
        demand.touch();
        tokio::time::advance(Duration::from_millis(59_999)).await;
        assert!(demand.is_active(0, linger));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(!demand.is_active(0, linger), "60 s after the last request");
        assert!(demand.is_active(1, linger));
    }
}
