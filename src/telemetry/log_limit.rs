//! Rate limits for log lines per kind, and per kind and source: no client, model server or peer can flood the log,
//! whichever library logs.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
    hash::{BuildHasher, Hasher, RandomState},
    mem,
    sync::atomic::{AtomicU64, Ordering},
};

use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::{
    Event, Level, Subscriber,
    callsite::Identifier,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{Context, Layer};

/// Target of the access log, whose lines are not rate-limited.
pub const ACCESS_TARGET: &str = "anteroom::access";

/// Fields that identify the source of a line; the first one found counts.
const SOURCE_FIELDS: [&str; 8] =
    ["route", "object", "workload", "scaled_object", "address", "peer", "replica", "watch"];

/// Limit for one kind of line. A kind is a call site.
const KIND_RATE: LineRate = LineRate { burst: 1000.0, per_second: 50.0 };

/// Limit for one kind of line from one source or without one.
const SOURCE_RATE: LineRate = LineRate { burst: 100.0, per_second: 5.0 };

/// Maximum number of sources tracked over all kinds; lines of further ones only count towards their kind.
const MAX_SOURCES: usize = 1024;

/// Suppresses and counts lines at level INFO and above that exceed a rate. Finer levels are only logged on request and
/// not limited.
pub(super) struct LogLimit {
    hasher: RandomState,
    buckets: Mutex<Buckets>,
    left_out: AtomicU64,
}

#[derive(Default)]
struct Buckets {
    kinds: HashMap<Identifier, TokenBucket>,
    sources: HashMap<(Identifier, u64), TokenBucket>,
    /// Suppressed lines by target since the last report.
    left_out: HashMap<String, u64>,
}

/// Lines suppressed since the last report.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SuppressedLines {
    pub(super) lines: u64,
    /// Module with the most of them.
    pub(super) mostly_of: String,
}

#[derive(Clone, Copy)]
struct LineRate {
    burst: f64,
    per_second: f64,
}

/// Token bucket of lines.
struct TokenBucket {
    rate: LineRate,
    left: f64,
    at: Instant,
}

/// Hashes the value of the first source field.
struct SourceHash<'a> {
    hasher: &'a RandomState,
    hash: Option<u64>,
}

struct HashWriter<H>(H);

// === impl LogLimit ===

impl LogLimit {
    pub(super) fn new() -> Self {
        Self { hasher: RandomState::new(), buckets: Mutex::default(), left_out: AtomicU64::new(0) }
    }

    /// Returns the number of lines suppressed since the start.
    pub(super) fn suppressed_line_count(&self) -> u64 {
        self.left_out.load(Ordering::Relaxed)
    }

    /// Takes the lines to report.
    pub(super) fn take_suppressed(&self) -> Option<SuppressedLines> {
        let left_out = mem::take(&mut self.buckets.lock().left_out);
        let lines = left_out.values().sum();
        let (mostly_of, _) = left_out.into_iter().max_by_key(|(_, lines)| *lines)?;
        Some(SuppressedLines { lines, mostly_of })
    }

    fn allows(&self, event: &Event<'_>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO || metadata.target() == ACCESS_TARGET {
            return true;
        }
        let mut source = SourceHash { hasher: &self.hasher, hash: None };
        event.record(&mut source);
        let mut buckets = self.buckets.lock();
        let is_allowed = buckets.allow(metadata.callsite(), source.hash);
        if !is_allowed {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            match buckets.left_out.get_mut(metadata.target()) {
                Some(lines) => *lines += 1,
                None => drop(buckets.left_out.insert(metadata.target().to_owned(), 1)),
            }
        }
        is_allowed
    }
}

impl<S: Subscriber> Layer<S> for &'static LogLimit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        self.allows(event)
    }
}

// === impl Buckets ===

impl Buckets {
    /// Takes a token of the kind and one of the source, or neither: suppressed lines of a noisy source use up no
    /// tokens of other sources.
    fn allow(&mut self, kind: Identifier, source: Option<u64>) -> bool {
        let now = Instant::now();
        let Self { kinds, sources, .. } = self;
        let of_kind = kinds.entry(kind.clone()).or_insert_with(|| TokenBucket::full(KIND_RATE, now));
        let has_room = of_kind.has_room(now);
        let source = (kind, source.unwrap_or_default());
        if has_room && !sources.contains_key(&source) {
            if sources.len() >= MAX_SOURCES {
                sources.retain(|_, bucket| !bucket.is_full(now));
            }
            if sources.len() < MAX_SOURCES {
                sources.insert(source.clone(), TokenBucket::full(SOURCE_RATE, now));
            }
        }
        let mut of_source = sources.get_mut(&source);
        let is_allowed = has_room && of_source.as_mut().is_none_or(|of_source| of_source.has_room(now));
        if is_allowed {
            of_kind.left -= 1.0;
            if let Some(of_source) = of_source {
                of_source.left -= 1.0;
            }
        }
        is_allowed
    }
}

// === impl TokenBucket ===

impl TokenBucket {
    const fn full(rate: LineRate, now: Instant) -> Self {
        Self { rate, left: rate.burst, at: now }
    }

    fn is_full(&mut self, now: Instant) -> bool {
        self.has_room(now);
        self.left >= self.rate.burst
    }

    fn has_room(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.rate.per_second;
        self.left = (self.left + earned).min(self.rate.burst);
        self.at = now;
        self.left >= 1.0
    }
}

// === impl SourceHash ===

impl Visit for SourceHash<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.hash.is_none() && SOURCE_FIELDS.contains(&field.name()) {
            let mut writer = HashWriter(self.hasher.build_hasher());
            let _ = write!(writer, "{value:?}");
            self.hash = Some(writer.0.finish());
        }
    }
}

impl<H: Hasher> fmt::Write for HashWriter<H> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use tokio::time::advance;
    use tracing_subscriber::{layer::SubscriberExt as _, registry};

    use super::*;

    /// Counts the lines that pass.
    #[derive(Clone, Default)]
    struct PassedLines(Arc<AtomicU64>);

    impl<S: Subscriber> Layer<S> for PassedLines {
        fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl PassedLines {
        /// Returns the number of logged lines.
        fn of(&self, log: impl FnOnce()) -> u64 {
            let before = self.0.load(Ordering::Relaxed);
            log();
            self.0.load(Ordering::Relaxed) - before
        }
    }

    fn limited() -> (&'static LogLimit, PassedLines, tracing::subscriber::DefaultGuard) {
        let (limit, passed) = (&*Box::leak(Box::new(LogLimit::new())), PassedLines::default());
        let subscriber = registry().with(limit).with(passed.clone());
        (limit, passed, tracing::subscriber::set_default(subscriber))
    }

    /// Logs as a library does about its peer.
    fn warn(lines: u64) {
        for _ in 0..lines {
            tracing::warn!(target: "h2::proto::ping_pong", "recv PING ack that we never sent");
        }
    }

    fn of_route(route: u64, lines: u64) {
        for _ in 0..lines {
            tracing::info!(route, "ready");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_kind_has_a_burst_and_a_rate() {
        let (limit, passed, _guard) = limited();
        assert_eq!(passed.of(|| warn(9_000)), 100);
        // The kind gets 5 lines a second without a source; other kinds keep their own limits.
        advance(Duration::from_secs(1)).await;
        assert_eq!(passed.of(|| warn(9_000)), 5);
        assert_eq!(passed.of(|| of_route(1, 1)), 1);
        let left_out = SuppressedLines { lines: 2 * 9_000 - 105, mostly_of: "h2::proto::ping_pong".into() };
        assert_eq!(
            (limit.suppressed_line_count(), limit.take_suppressed()),
            (left_out.lines, Some(left_out))
        );
        assert_eq!(limit.take_suppressed(), None, "it was reported");
    }

    #[tokio::test(start_paused = true)]
    async fn noisy_source_takes_nothing_from_others() {
        let (_, passed, _guard) = limited();
        assert_eq!(passed.of(|| of_route(0, 100_000)), 100);
        assert_eq!(passed.of(|| (1..=50).for_each(|route| of_route(route, 10))), 500);
        // The kind has 400 of its 1,000 lines left, for any number of sources.
        assert_eq!(passed.of(|| (100..10_000).for_each(|route| of_route(route, 1))), 400);
        assert_eq!(passed.of(|| of_route(20_000, 1)), 0);
        advance(Duration::from_secs(1)).await;
        assert_eq!(passed.of(|| (30_000..40_000).for_each(|route| of_route(route, 1))), 50);
    }

    #[tokio::test(start_paused = true)]
    async fn sources_are_bounded_and_forgotten_once_quiet() {
        let (limit, passed, _guard) = limited();
        for number in 0..4 * MAX_SOURCES as u64 {
            assert_eq!(passed.of(|| of_route(number, 1)), 1);
            assert!(limit.buckets.lock().sources.len() <= MAX_SOURCES);
            advance(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn finer_levels_are_logged_in_full() {
        let (_, passed, _guard) = limited();
        assert_eq!(passed.of(|| (0..5_000).for_each(|_| tracing::debug!("as asked for"))), 5_000);
    }
}
