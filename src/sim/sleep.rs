//! Sleep mode: which memory is there, and who waits for it to come back.

use tokio::sync::watch;

/// Whether the engine sleeps, how deep, and what it still lacks.
pub(super) struct Sleep(watch::Sender<State>);

#[derive(Clone, Copy, Default)]
struct State {
    /// 0 is awake.
    level: u8,
    lacks_weights: bool,
    lacks_kv_cache: bool,
    /// Level 2 discards the weights: the memory comes back without them.
    discarded: bool,
}

// === impl Sleep ===

impl Default for Sleep {
    fn default() -> Self {
        Self(watch::Sender::new(State::default()))
    }
}

impl Sleep {
    /// 0 when it is awake. Only of level 1 and 2 does vLLM's metric tell.
    pub(super) fn level(&self) -> u8 {
        self.0.borrow().level
    }

    pub(super) fn is_sleeping(&self) -> bool {
        self.level() > 0
    }

    /// Whether what it says is what the model says.
    pub(super) fn has_weights(&self) -> bool {
        !self.0.borrow().discarded
    }

    /// Nothing is begun from now on.
    pub(super) fn fall_asleep(&self, level: u8) {
        self.0.send_modify(|state| {
            let discarded = state.discarded || level == 2;
            *state = State { level, lacks_weights: true, lacks_kv_cache: true, discarded };
        });
    }

    /// Brings back memory: of the weights, of the KV cache, or both. Says whether it is awake.
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

    /// Reads the weights again.
    pub(super) fn reload_weights(&self) {
        self.0.send_modify(|state| state.discarded &= state.lacks_weights);
    }

    /// Waits until it is awake. Cancel-safe.
    pub(super) async fn awake(&self) {
        // We have the sender, so this ends only with the state.
        let _ = self.0.subscribe().wait_for(|state| state.level == 0).await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn it_is_awake_when_all_memory_is_back_and_itself_when_the_weights_are() {
        let sleep = Sleep::default();
        assert!(!sleep.is_sleeping() && sleep.awake().now_or_never().is_some());
        sleep.fall_asleep(2);
        assert!(sleep.is_sleeping() && sleep.awake().now_or_never().is_none());
        assert!(!sleep.wake_up(true, false) && sleep.awake().now_or_never().is_none());
        assert!(!sleep.has_weights());
        sleep.reload_weights();
        assert!(sleep.wake_up(false, true) && sleep.has_weights());
        sleep.fall_asleep(1);
        assert!(sleep.wake_up(true, true) && sleep.has_weights(), "level 1 keeps them");
        sleep.fall_asleep(2);
        sleep.reload_weights();
        assert!(sleep.wake_up(true, true) && !sleep.has_weights(), "there was no memory to read them to");
    }
}
