//! Current state for dashboards: rendered when it has changed and is watched, once for all watchers.

mod samples;
mod shown;
#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::View;
use crate::{coldstart::ColdStarts, config::budget::ADMIN_WATCHERS, telemetry::Pulse};
use samples::Samples;
pub(super) use shown::RenderedState;
use shown::{About, StateRenderer};

/// Maximum number of watchers. Each costs a connection and a reference to the newest state, without a queue.
pub(super) const WATCHERS: usize = ADMIN_WATCHERS;

/// Interval of samples of held requests, and of updates without changes.
const TICK_INTERVAL: Duration = Duration::from_secs(1);

/// Minimum interval between updates; changes in between are combined.
const MIN_UPDATE_INTERVAL: Duration = Duration::from_millis(100);

/// Renders the proxy's state when it changes, once for all watchers.
pub(super) struct Live {
    view: Arc<dyn View>,
    cold_starts: Arc<ColdStarts>,
    draining: Arc<AtomicBool>,
    places: Arc<Semaphore>,
    shown: watch::Sender<Arc<RenderedState>>,
    making: Mutex<RenderState>,
    stopped: CancellationToken,
    instance: Arc<str>,
    began: Instant,
}

struct RenderState {
    maker: StateRenderer,
    samples: Samples,
    last: Instant,
}

/// A watcher. Dropping it frees its slot.
pub(super) struct Watcher {
    live: Arc<Live>,
    shown: watch::Receiver<Arc<RenderedState>>,
    seen: u64,
    _place: OwnedSemaphorePermit,
}

// === impl Live ===

impl Live {
    pub(super) fn new(
        view: Arc<dyn View>,
        cold_starts: Arc<ColdStarts>,
        draining: Arc<AtomicBool>,
        stopped: CancellationToken,
    ) -> Arc<Self> {
        let making = RenderState {
            maker: StateRenderer::default(),
            samples: Samples::default(),
            last: Instant::now(),
        };
        Arc::new(Self {
            view,
            cold_starts,
            draining,
            places: Arc::new(Semaphore::new(WATCHERS)),
            shown: watch::Sender::default(),
            making: Mutex::new(making),
            stopped,
            instance: instance().into(),
            began: Instant::now(),
        })
    }

    fn pulse(&self) -> &Pulse {
        self.cold_starts.pulse()
    }

    /// Samples and publishes changes until stopped.
    pub(super) async fn run(self: Arc<Self>) {
        let mut ticks = interval(TICK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // Stop first; then the tick, which covers all earlier changes.
                biased;
                () = self.stopped.cancelled() => return,
                _ = ticks.tick() => self.tick(),
                () = self.changed() => self.make(),
            }
        }
    }

    /// Waits for a change, then for the end of the minimum interval. Cancel-safe: only `render_next_state` clears the pulse.
    async fn changed(&self) {
        self.pulse().await_change().await;
        let next = self.making.lock().last + MIN_UPDATE_INTERVAL;
        sleep_until(next).await;
    }

    fn tick(&self) {
        let mut making = self.making.lock();
        making.samples.tick(&self.view.gates());
        let watched = self.shown.receiver_count() > 0;
        // Under the lock, since `watch` may be running concurrently.
        self.pulse().watch(watched);
        if watched {
            self.render_next_state(&mut making);
        }
    }

    fn make(&self) {
        self.render_next_state(&mut self.making.lock());
    }

    fn render_next_state(&self, making: &mut RenderState) {
        self.pulse().clear_pending();
        let gates = self.view.gates();
        making.samples.record_held_peaks(&gates);
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let about = About {
            version: env!("CARGO_PKG_VERSION"),
            instance: self.instance.clone(),
            uptime_ms: millis(self.began.elapsed()),
            now_ms: millis(now),
            port: self.view.address().port(),
            model: self.view.example(),
            draining: self.draining.load(Ordering::Relaxed),
            awaits_routes: self.view.awaits_routes(),
            tick: making.samples.ticks(),
            peers: self.view.peers(),
        };
        let shown = making.maker.make(about, &gates, &self.cold_starts, &making.samples);
        making.last = Instant::now();
        self.shown.send_replace(Arc::new(shown));
    }

    /// Adds a watcher; `None` if there are too many.
    pub(super) fn watch(self: &Arc<Self>) -> Option<Watcher> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        let mut making = self.making.lock();
        let shown = self.shown.subscribe();
        self.pulse().watch(true);
        // The state is not rendered while there are no watchers.
        self.render_next_state(&mut making);
        drop(making);
        Some(Watcher { live: self.clone(), shown, seen: 0, _place: place })
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Returns the name of this replica: of the pod or of the machine.
fn instance() -> String {
    let of_pod = std::env::var("HOSTNAME").ok();
    let name = of_pod.or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok());
    name.map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".into())
}

// === impl Watcher ===

impl Watcher {
    /// Returns the next event: the full state first, then the changes since the event before, however long ago. `None`
    /// once the proxy stops. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<String> {
        if self.seen > 0 {
            tokio::select! {
                // Deliver the last state before the end.
                biased;
                changed = self.shown.changed() => changed.ok()?,
                () = self.live.stopped.cancelled() => return None,
            }
        }
        let shown = self.shown.borrow_and_update().clone();
        let event = match self.seen {
            0 => shown.snapshot(&self.live.making.lock().samples),
            seen => shown.update(seen),
        };
        self.seen = shown.version();
        Some(event)
    }
}
