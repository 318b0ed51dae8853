//! What happened to requests, and when: to every one that waits now, and for a while to those that waited, failed or
//! were refused. What is answered at once leaves nothing here, and costs nothing.

mod sequence;
mod story;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use parking_lot::Mutex;
use serde::Serialize;

pub use sequence::{Heartbeats, Moment, Sequence};
pub use story::{Arrival, Asked, Ending, Event, Story, Why};

/// The requests that are told of: those that have not ended, and the last of those that have, in two rings, so that a
/// flood of refusals does not push out what waited.
pub struct History {
    since: SystemTime,
    /// How many a ring keeps.
    max: AtomicUsize,
    next: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    running: HashMap<u64, Arc<Story>>,
    waited: Ring,
    at_once: Ring,
}

/// The last that ended, oldest first.
#[derive(Default)]
struct Ring {
    ended: VecDeque<Arc<Story>>,
    bytes: usize,
    /// One has been dropped.
    is_full: bool,
}

/// Which requests are asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query<'a> {
    /// Of this route.
    pub route: Option<&'a str>,
    /// That ended so; or [`Self::FAILED`] or [`Self::RUNNING`].
    pub outcome: Option<&'a str>,
}

/// What is kept, for who looks for something that is not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Requests that wait, or are being answered after that.
    pub running: usize,
    /// Requests that waited.
    pub waited: KeptRing,
    /// Requests that failed or were refused at once.
    pub at_once: KeptRing,
}

/// What is kept of one sort.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeptRing {
    /// How many there are.
    pub count: usize,
    /// How many there may be: `history.requests`.
    pub max: usize,
    /// All are there that ended from then on, RFC 3339.
    pub since: String,
}

// === impl History ===

impl History {
    /// What a request may take on average among those that have ended: a ring of `max` has at most `max` times that.
    /// One with a few events takes about a third of it, the longest possible about four times as much.
    pub const BYTES_EACH: usize = 2 << 10;

    /// Keeps the last `max` of either sort; 0: none.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            since: SystemTime::now(),
            max: AtomicUsize::new(max),
            next: AtomicU64::new(0),
            inner: Mutex::default(),
        })
    }

    /// Keeps so many from now on.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
        let mut inner = self.inner.lock();
        let Inner { running, waited, at_once } = &mut *inner;
        let dropped = [waited.shrink(max), at_once.shrink(max)];
        if max == 0 {
            running.clear();
        }
        drop(inner);
        drop(dropped);
    }

    /// A request that has begun to wait, or has failed. It is told of until it ends; then see [`Self::end`].
    pub fn begin(&self, arrival: Arrival<'_>, asked: Option<Asked>) -> Arc<Story> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let story = Arc::new(Story::new(number, arrival, asked));
        if self.max.load(Ordering::Relaxed) > 0 {
            self.inner.lock().running.insert(number, story.clone());
        }
        story
    }

    /// It has ended.
    pub fn end(&self, story: Arc<Story>, ending: Ending) {
        let bytes = story.end(ending);
        let mut inner = self.inner.lock();
        inner.running.remove(&story.number());
        // Read under the lock, by which a smaller number shrinks what is there.
        let max = self.max.load(Ordering::Relaxed);
        let ring = if story.has_waited() { &mut inner.waited } else { &mut inner.at_once };
        ring.bytes += bytes;
        ring.ended.push_back(story);
        let dropped = ring.shrink(max);
        drop(inner);
        drop(dropped);
    }

    /// The requests of this id, newest first: clients may use one again.
    pub fn find(&self, request_id: &str) -> Vec<Sequence> {
        let request_id = Story::id(request_id);
        let mut found = self.all(|story| story.request_id() == request_id);
        found.sort_by_key(|story| std::cmp::Reverse(story.number()));
        found.iter().map(|story| story.sequence()).collect()
    }

    /// The last that ended, or of those that have not, newest first.
    pub fn recent(&self, query: Query<'_>, limit: usize) -> Vec<Sequence> {
        let mut found = self.all(|story| {
            query.route.is_none_or(|route| story.route().as_str() == route) && story.fits(query.outcome)
        });
        found.sort_by_key(|story| std::cmp::Reverse(story.latest()));
        found.iter().take(limit).map(|story| story.sequence()).collect()
    }

    /// What is kept.
    pub fn kept(&self) -> Kept {
        let inner = self.inner.lock();
        let max = self.max.load(Ordering::Relaxed);
        let kept = |ring: &Ring| {
            let oldest = ring.ended.front().filter(|_| ring.is_full).and_then(|story| story.ended_at());
            let since = humantime::format_rfc3339_millis(oldest.unwrap_or(self.since)).to_string();
            KeptRing { count: ring.ended.len(), max, since }
        };
        Kept { running: inner.running.len(), waited: kept(&inner.waited), at_once: kept(&inner.at_once) }
    }

    /// How many bytes those that have ended take.
    pub fn bytes(&self) -> usize {
        let inner = self.inner.lock();
        inner.waited.bytes + inner.at_once.bytes
    }

    /// How many requests there have been to tell of.
    pub fn begun(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    fn all(&self, wanted: impl Fn(&Story) -> bool) -> Vec<Arc<Story>> {
        let inner = self.inner.lock();
        let all = inner.running.values().chain(&inner.waited.ended).chain(&inner.at_once.ended);
        all.filter(|story| wanted(story)).cloned().collect()
    }
}

impl std::fmt::Debug for History {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("History").field("kept", &self.kept()).finish_non_exhaustive()
    }
}

// === impl Ring ===

impl Ring {
    /// Takes the oldest out until it is within its bounds. They are dropped by the caller, without the lock.
    fn shrink(&mut self, max: usize) -> Vec<Arc<Story>> {
        let mut dropped = Vec::new();
        while self.ended.len() > max || self.bytes > max.saturating_mul(History::BYTES_EACH) {
            let Some(oldest) = self.ended.pop_front() else { break };
            self.bytes -= oldest.bytes();
            self.is_full = true;
            dropped.push(oldest);
        }
        dropped
    }
}

// === impl Query ===

impl Query<'_> {
    /// The outcome that stands for everything that went wrong: all but answers below 500 and clients that went away.
    pub const FAILED: &'static str = "failed";
    /// The outcome that stands for none yet.
    pub const RUNNING: &'static str = "running";
}

// === impl Kept ===

impl Kept {
    /// Why a request may not be there, in words.
    pub fn explain(&self) -> String {
        let Self { waited, at_once, .. } = self;
        if waited.max == 0 {
            return "No request is kept: `history.requests` is 0.".into();
        }
        format!(
            "Kept are those that wait now, the last {} that waited (now {}, since {}) and the last {} that failed or \
             were refused at once (now {}, since {}). A request that was answered at once is not kept, nor one that \
             belonged to no route, that another replica served, or that came before this process started.",
            waited.max, waited.count, waited.since, at_once.max, at_once.count, at_once.since
        )
    }
}

#[cfg(test)]
mod tests;
