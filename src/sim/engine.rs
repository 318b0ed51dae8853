//! Scheduling of requests and timing of tokens.

use super::{
    SimArgs,
    sleep::SleepMode,
    text::{Prompt, WordGenerator},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use strum::{IntoStaticStr, VariantArray};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};

/// State shared by all requests.
pub(super) struct Engine {
    seed: u64,
    tokens: u64,
    max_running: u32,
    time_to_first_token: Duration,
    inter_token_time: Duration,
    /// Fair: the queue of the semaphore is the waiting queue.
    slots: Arc<Semaphore>,
    pub(super) sleep: SleepMode,
    waiting: AtomicU64,
    prompt_tokens: AtomicU64,
    generation_tokens: AtomicU64,
    finished: [AtomicU64; FinishReason::ALL.len()],
}

/// `finish_reason` of a request.
#[derive(Clone, Copy, Debug, PartialEq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub(super) enum FinishReason {
    Stop,
    Length,
    /// The client disconnected.
    Abort,
}

/// Values of `/metrics`.
pub(super) struct EngineStats {
    pub(super) waiting: u64,
    pub(super) running: u64,
    /// Share of busy slots.
    pub(super) kv_cache_usage: f64,
    /// Sleep level; 0 when awake.
    pub(super) sleep_level: u8,
    pub(super) prompt_tokens: u64,
    pub(super) generation_tokens: u64,
    pub(super) finished: [u64; FinishReason::ALL.len()],
}

/// One request. Enters the queue when first polled; dropping it before the last token aborts it.
pub(super) struct Generation {
    engine: Arc<Engine>,
    words: WordGenerator,
    prompt: Prompt,
    slot: Option<OwnedSemaphorePermit>,
    due: Instant,
    pub(super) prompt_tokens: u64,
    pub(super) tokens: u64,
    /// Number of tokens of the complete answer.
    pub(super) budget: u64,
    /// Finish reason unless aborted.
    pub(super) finish: FinishReason,
    ended: bool,
}

struct WaitingGuard<'a>(&'a AtomicU64);

// === impl FinishReason ===

impl FinishReason {
    pub(super) const ALL: [Self; Self::VARIANTS.len()] = *Self::VARIANTS.first_chunk().unwrap();

    pub(super) fn name(self) -> &'static str {
        self.into()
    }
}

// === impl Engine ===

impl Engine {
    pub(super) fn new(args: &SimArgs) -> Self {
        Self {
            seed: args.seed,
            tokens: args.tokens,
            max_running: args.max_running,
            time_to_first_token: args.time_to_first_token,
            inter_token_time: args.inter_token_time,
            slots: Arc::new(Semaphore::new(args.max_running as usize)),
            sleep: SleepMode::default(),
            waiting: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            generation_tokens: AtomicU64::new(0),
            finished: Default::default(),
        }
    }

    /// Creates a generation of the configured length, or of `limit` tokens if that is less.
    pub(super) fn submit(self: &Arc<Self>, prompt: Prompt, limit: Option<u64>) -> Generation {
        let (budget, finish) = match limit {
            Some(limit) if limit < self.tokens => (limit.max(1), FinishReason::Length),
            _ => (self.tokens, FinishReason::Stop),
        };
        Generation {
            engine: Arc::clone(self),
            words: WordGenerator::new(self.seed, prompt),
            prompt,
            slot: None,
            due: Instant::now(),
            prompt_tokens: prompt.tokens,
            tokens: 0,
            budget,
            finish,
            ended: false,
        }
    }

    pub(super) fn read(&self) -> EngineStats {
        let running = u64::from(self.max_running) - self.slots.available_permits() as u64;
        EngineStats {
            waiting: self.waiting.load(Relaxed),
            running,
            kv_cache_usage: running as f64 / f64::from(self.max_running),
            sleep_level: self.sleep.level(),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            generation_tokens: self.generation_tokens.load(Relaxed),
            finished: std::array::from_fn(|reason| self.finished[reason].load(Relaxed)),
        }
    }
}

// === impl Generation ===

impl Generation {
    /// Waits for a slot and for the time to first token. Also waits while the engine sleeps: vLLM accepts requests then but
    /// does not process them.
    async fn prefill(&mut self) {
        let waiting = WaitingGuard::enter(&self.engine.waiting);
        self.engine.sleep.awake().await;
        let slots = Arc::clone(&self.engine.slots);
        self.slot = slots.acquire_owned().await.ok();
        drop(waiting);
        if !self.engine.sleep.has_weights() {
            self.words = WordGenerator::new(!self.engine.seed, self.prompt);
        }
        self.engine.prompt_tokens.fetch_add(self.prompt_tokens, Relaxed);
        self.due = Instant::now() + self.engine.time_to_first_token;
        sleep_until(self.due).await;
    }

    /// Returns the next token when due. Due times are relative to the first token, so a slow reader catches up.
    pub(super) async fn next(&mut self) -> Option<&'static str> {
        if self.ended {
            return None;
        }
        if self.slot.is_none() {
            self.prefill().await;
        } else {
            self.due += self.engine.inter_token_time;
            sleep_until(self.due).await;
        }
        self.tokens += 1;
        self.engine.generation_tokens.fetch_add(1, Relaxed);
        if self.tokens == self.budget {
            self.end(self.finish);
        }
        Some(self.words.next())
    }

    /// Generates the whole text.
    pub(super) async fn text(&mut self) -> String {
        let mut text = String::new();
        while let Some(word) = self.next().await {
            text.push_str(word);
        }
        text
    }

    /// Runs an embedding request, which generates no tokens.
    pub(super) async fn pool(&mut self) {
        self.prefill().await;
        self.end(FinishReason::Stop);
    }

    fn end(&mut self, finish: FinishReason) {
        self.ended = true;
        self.slot = None;
        self.engine.finished[finish as usize].fetch_add(1, Relaxed);
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.ended {
            self.end(FinishReason::Abort);
        }
    }
}

// === impl WaitingGuard ===

impl<'a> WaitingGuard<'a> {
    fn enter(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count)
    }
}

impl Drop for WaitingGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    fn engine(args: SimArgs) -> Arc<Engine> {
        Arc::new(Engine::new(&args))
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_arrive_on_schedule() {
        let engine = engine(SimArgs {
            tokens: 3,
            time_to_first_token: Duration::from_millis(200),
            inter_token_time: Duration::from_millis(10),
            ..SimArgs::default()
        });
        let start = Instant::now();
        let mut generation = engine.submit(Prompt::new(), None);
        let mut due = Vec::new();
        while generation.next().await.is_some() {
            due.push(start.elapsed().as_millis());
        }
        assert_eq!(due, [200, 210, 220]);
        let reading = engine.read();
        assert_eq!((reading.running, reading.generation_tokens, reading.finished), (0, 3, [1, 0, 0]));
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_queue_is_fifo() {
        let engine = engine(SimArgs { max_running: 1, tokens: 2, ..SimArgs::default() });
        let mut generations = [(); 3].map(|()| engine.submit(Prompt::new(), None));
        let [running, second, third] = &mut generations;
        assert!(running.next().await.is_some());
        let mut second = Box::pin(second.text());
        let mut third = Box::pin(third.text());
        assert!(second.as_mut().now_or_never().is_none());
        assert!(third.as_mut().now_or_never().is_none());
        assert_eq!((engine.read().running, engine.read().waiting), (1, 2));
        assert!(running.next().await.is_some());
        // The free slot belongs to the second, even if the third is polled first.
        assert!(third.as_mut().now_or_never().is_none());
        second.await;
        third.await;
        assert_eq!(engine.read().finished, [3, 0, 0]);
    }

    #[test]
    fn lower_request_limit_wins() {
        let engine = engine(SimArgs { tokens: 10, ..SimArgs::default() });
        for (limit, budget, finish) in [
            (None, 10, FinishReason::Stop),
            (Some(9), 9, FinishReason::Length),
            (Some(10), 10, FinishReason::Stop),
            (Some(0), 1, FinishReason::Length),
        ] {
            let generation = engine.submit(Prompt::new(), limit);
            assert_eq!((generation.budget, generation.finish), (budget, finish));
        }
    }
}
