//! Sleep mode of the engine.

use tokio::sync::watch;

/// Sleep level and memory of the engine.
pub(super) struct SleepMode(watch::Sender<SleepState>);

#[derive(Clone, Copy, Default)]
struct SleepState {
    /// 0 when awake.
    level: u8,
    lacks_weights: bool,
    lacks_kv_cache: bool,
    /// Set by level 2: the memory comes back without the weights.
    discarded: bool,
}

// === impl SleepMode ===

impl Default for SleepMode {
    fn default() -> Self {
        Self(watch::Sender::new(SleepState::default()))
    }
}

impl SleepMode {
    /// Returns the sleep level; 0 when awake.
    pub(super) fn level(&self) -> u8 {
        self.0.borrow().level
    }

    pub(super) fn is_sleeping(&self) -> bool {
        self.level() > 0
    }

    /// Returns `false` if the weights were discarded and not reloaded: answers are garbage then.
    pub(super) fn has_weights(&self) -> bool {
        !self.0.borrow().discarded
    }

    /// Suspends the processing of new requests.
    pub(super) fn fall_asleep(&self, level: u8) {
        self.0.send_modify(|state| {
            let discarded = state.discarded || level == 2;
            *state = SleepState { level, lacks_weights: true, lacks_kv_cache: true, discarded };
        });
    }

    /// Restores memory of the weights, the KV cache, or both. Returns whether the engine is awake.
    pub(super) fn wake_up(&self, weights: bool, kv_cache: bool) -> bool {
        self.0.send_modify(|state| {
            state.lacks_weights &= !weights;
            state.lacks_kv_cache &= !kv_cache;
            if !state.lacks_weights && !state.lacks_kv_cache {
                state.level = 0;
            }
        });
        !self.is_sleeping()
    }

    /// Reloads the weights if their memory is available.
    pub(super) fn reload_weights(&self) {
        self.0.send_modify(|state| state.discarded &= state.lacks_weights);
    }

    /// Waits until the engine is awake. Cancel-safe.
    pub(super) async fn awake(&self) {
        // Cannot fail: `self` owns the sender.
        let _ = self.0.subscribe().wait_for(|state| state.level == 0).await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn engine_wakes_with_all_memory_restored() {
        let sleep = SleepMode::default();
        assert!(!sleep.is_sleeping() && sleep.awake().now_or_never().is_some());
        sleep.fall_asleep(2);
        assert!(sleep.is_sleeping() && sleep.awake().now_or_never().is_none());
        assert!(!sleep.wake_up(true, false) && sleep.awake().now_or_never().is_none());
        assert!(!sleep.has_weights());
        sleep.reload_weights();
        assert!(sleep.wake_up(false, true) && sleep.has_weights());
        sleep.fall_asleep(1);
        assert!(sleep.wake_up(true, true) && sleep.has_weights(), "level 1 keeps the weights");
        sleep.fall_asleep(2);
        sleep.reload_weights();
        assert!(sleep.wake_up(true, true) && !sleep.has_weights(), "no memory to reload into");
    }
}
