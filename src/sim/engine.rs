//! The engine: who runs, who waits, and when the tokens come.

use super::{
    SimArgs,
    sleep::Sleep,
    text::{Prompt, Words},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};

/// What all requests share.
pub(super) struct Engine {
    seed: u64,
    tokens: u64,
    max_running: u32,
    time_to_first_token: Duration,
    inter_token_time: Duration,
    /// A fair semaphore: its queue is the waiting queue.
    slots: Arc<Semaphore>,
    pub(super) sleep: Sleep,
    waiting: AtomicU64,
    prompt_tokens: AtomicU64,
    generation_tokens: AtomicU64,
    finished: [AtomicU64; Finish::ALL.len()],
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Finish {
    Stop,
    Length,
    /// The client went away.
    Abort,
}

/// What `/metrics` tells.
pub(super) struct Reading {
    pub(super) waiting: u64,
    pub(super) running: u64,
    /// The share of slots that are taken: a KV cache that is full when no more can run.
    pub(super) kv_cache_usage: f64,
    /// The level at which it sleeps; 0 when it is awake.
    pub(super) sleeps_at: u8,
    pub(super) prompt_tokens: u64,
    pub(super) generation_tokens: u64,
    pub(super) finished: [u64; Finish::ALL.len()],
}

/// One request in the engine. It takes its place in the queue when it is first polled, and dropping it before
/// its last token aborts it.
pub(super) struct Generation {
    engine: Arc<Engine>,
    words: Words,
    prompt: Prompt,
    slot: Option<OwnedSemaphorePermit>,
    due: Instant,
    pub(super) prompt_tokens: u64,
    pub(super) tokens: u64,
    /// Tokens when it will be complete.
    pub(super) budget: u64,
    /// How it ends if nobody goes away.
    pub(super) finish: Finish,
    ended: bool,
}

struct Waiting<'a>(&'a AtomicU64);

// === impl Finish ===

impl Finish {
    pub(super) const ALL: [Self; 3] = [Self::Stop, Self::Length, Self::Abort];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
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
            sleep: Sleep::default(),
            waiting: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            generation_tokens: AtomicU64::new(0),
            finished: Default::default(),
        }
    }

    /// An answer of the configured length, or of `limit` tokens if that is less.
    pub(super) fn submit(self: &Arc<Self>, prompt: Prompt, limit: Option<u64>) -> Generation {
        let (budget, finish) = match limit {
            Some(limit) if limit < self.tokens => (limit.max(1), Finish::Length),
            _ => (self.tokens, Finish::Stop),
        };
        Generation {
            engine: Arc::clone(self),
            words: Words::new(self.seed, prompt),
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

    pub(super) fn read(&self) -> Reading {
        let running = u64::from(self.max_running) - self.slots.available_permits() as u64;
        Reading {
            waiting: self.waiting.load(Relaxed),
            running,
            kv_cache_usage: running as f64 / f64::from(self.max_running),
            sleeps_at: self.sleep.level(),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            generation_tokens: self.generation_tokens.load(Relaxed),
            finished: std::array::from_fn(|reason| self.finished[reason].load(Relaxed)),
        }
    }
}

// === impl Generation ===

impl Generation {
    /// Waits for a slot, and for the prompt's time in it. While the engine sleeps it waits, too: vLLM takes requests
    /// then, and does nothing for them.
    async fn prefill(&mut self) {
        let waiting = Waiting::enter(&self.engine.waiting);
        self.engine.sleep.awake().await;
        let slots = Arc::clone(&self.engine.slots);
        self.slot = slots.acquire_owned().await.ok();
        drop(waiting);
        if !self.engine.sleep.has_weights() {
            self.words = Words::new(!self.engine.seed, self.prompt);
        }
        self.engine.prompt_tokens.fetch_add(self.prompt_tokens, Relaxed);
        self.due = Instant::now() + self.engine.time_to_first_token;
        sleep_until(self.due).await;
    }

    /// The next token, when it is due. Tokens keep their distance from the first one, so that a client that
    /// reads slowly finds those that it has missed.
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

    /// All of the text at once.
    pub(super) async fn text(&mut self) -> String {
        let mut text = String::new();
        while let Some(word) = self.next().await {
            text.push_str(word);
        }
        text
    }

    /// What an embedding needs: its turn, and no token.
    pub(super) async fn pool(&mut self) {
        self.prefill().await;
        self.end(Finish::Stop);
    }

    fn end(&mut self, finish: Finish) {
        self.ended = true;
        self.slot = None;
        self.engine.finished[finish as usize].fetch_add(1, Relaxed);
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.ended {
            self.end(Finish::Abort);
        }
    }
}

// === impl Waiting ===

impl<'a> Waiting<'a> {
    fn enter(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
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
    async fn tokens_come_on_time() {
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
    async fn queue_is_first_come_first_served() {
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
        // The slot is free, and it is the second's, whoever asks first.
        assert!(third.as_mut().now_or_never().is_none());
        second.await;
        third.await;
        assert_eq!(engine.read().finished, [3, 0, 0]);
    }

    #[test]
    fn limit_wins_where_it_is_lower() {
        let engine = engine(SimArgs { tokens: 10, ..SimArgs::default() });
        for (limit, budget, finish) in [
            (None, 10, Finish::Stop),
            (Some(9), 9, Finish::Length),
            (Some(10), 10, Finish::Stop),
            (Some(0), 1, Finish::Length),
        ] {
            let generation = engine.submit(Prompt::new(), limit);
            assert_eq!((generation.budget, generation.finish), (budget, finish));
        }
    }
}
