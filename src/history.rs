//! History of requests: all that wait now, and the last ones that waited, failed or were refused. A request that is
//! answered at once is not recorded and costs nothing.

mod event;
mod query;
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

pub use event::{Event, HoldReason};
pub use query::Query;
pub use sequence::{Heartbeats, Sequence, TimedEvent};
pub use story::{ArrivedRequest, Ending, RequestInfo, Story};

/// Stories of running requests, and of the last ones that ended. Two rings keep a flood of refusals from evicting requests
/// that waited.
pub struct RequestHistory {
    since: SystemTime,
    /// Capacity of each ring.
    max: AtomicUsize,
    next: AtomicU64,
    inner: Mutex<RequestHistoryState>,
}

#[derive(Default)]
struct RequestHistoryState {
    running: HashMap<u64, Arc<Story>>,
    waited: StoryRing,
    at_once: StoryRing,
}

/// The last requests that ended, oldest first.
#[derive(Default)]
struct StoryRing {
    ended: VecDeque<Arc<Story>>,
    bytes: usize,
    /// A request has been evicted.
    is_full: bool,
}

/// Extent of the history, which explains a missing request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HistoryExtent {
    /// Requests that wait, or are being answered after a wait.
    pub running: usize,
    /// Requests that waited.
    pub waited: RingExtent,
    /// Requests that failed or were refused at once.
    pub at_once: RingExtent,
}

/// Extent of one ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RingExtent {
    /// Requests in the ring.
    pub count: usize,
    /// Capacity, `history.requests`.
    pub max: usize,
    /// Time since which the ring is complete, RFC 3339.
    pub since: String,
}

// === impl RequestHistory ===

impl RequestHistory {
    /// Bytes per ended request on average: a ring of `max` requests is bounded by `max` times that. A request with a few
    /// events takes about a third of it, the largest possible about four times as much.
    pub const MEAN_STORY_BYTES: usize = 2 << 10;

    /// Creates a history of `max` requests per ring; 0 disables it.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            since: SystemTime::now(),
            max: AtomicUsize::new(max),
            next: AtomicU64::new(0),
            inner: Mutex::default(),
        })
    }

    /// Changes the capacity.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
        let mut inner = self.inner.lock();
        let RequestHistoryState { running, waited, at_once } = &mut *inner;
        let dropped = [waited.shrink(max), at_once.shrink(max)];
        if max == 0 {
            running.clear();
        }
        drop(inner);
        drop(dropped);
    }

    /// Begins the story of a request that waits or has failed; [`Self::end`] ends it.
    pub fn begin(&self, arrival: ArrivedRequest<'_>, info: Option<RequestInfo>) -> Arc<Story> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let story = Arc::new(Story::new(number, arrival, info));
        if self.max.load(Ordering::Relaxed) > 0 {
            self.inner.lock().running.insert(number, story.clone());
        }
        story
    }

    /// Ends a story and moves it to its ring.
    pub fn end(&self, story: Arc<Story>, ending: Ending) {
        let bytes = story.end(ending);
        let mut inner = self.inner.lock();
        inner.running.remove(&story.number());
        // Read under the lock, as `set_max` shrinks the rings under it.
        let max = self.max.load(Ordering::Relaxed);
        let ring = if story.has_waited() { &mut inner.waited } else { &mut inner.at_once };
        ring.bytes += bytes;
        ring.ended.push_back(story);
        let dropped = ring.shrink(max);
        drop(inner);
        drop(dropped);
    }

    /// Returns the requests with this id, newest first: clients may reuse one.
    pub fn find(&self, request_id: &str) -> Vec<Sequence> {
        let request_id = Story::truncate_request_id(request_id);
        let mut found = self.all(|story| story.request_id() == request_id);
        found.sort_by_key(|story| std::cmp::Reverse(story.number()));
        found.iter().map(|story| story.sequence()).collect()
    }

    /// Returns up to `limit` matching requests, newest first.
    pub fn recent(&self, query: Query<'_>, limit: usize) -> Vec<Sequence> {
        let mut found = self.all(|story| {
            query.route.is_none_or(|route| story.route().as_str() == route) && story.matches(query.outcome)
        });
        found.sort_by_key(|story| std::cmp::Reverse(story.latest()));
        found.iter().take(limit).map(|story| story.sequence()).collect()
    }

    /// Returns the extent of the history.
    pub fn kept(&self) -> HistoryExtent {
        let inner = self.inner.lock();
        let max = self.max.load(Ordering::Relaxed);
        let kept = |ring: &StoryRing| {
            let oldest = ring.ended.front().filter(|_| ring.is_full).and_then(|story| story.ended_at());
            let since = humantime::format_rfc3339_millis(oldest.unwrap_or(self.since)).to_string();
            RingExtent { count: ring.ended.len(), max, since }
        };
        HistoryExtent {
            running: inner.running.len(),
            waited: kept(&inner.waited),
            at_once: kept(&inner.at_once),
        }
    }

    /// Returns the bytes of ended requests.
    pub fn bytes(&self) -> usize {
        let inner = self.inner.lock();
        inner.waited.bytes + inner.at_once.bytes
    }

    /// Returns the number of stories begun so far.
    pub fn begun(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    fn all(&self, wanted: impl Fn(&Story) -> bool) -> Vec<Arc<Story>> {
        let inner = self.inner.lock();
        let all = inner.running.values().chain(&inner.waited.ended).chain(&inner.at_once.ended);
        all.filter(|story| wanted(story)).cloned().collect()
    }
}

impl std::fmt::Debug for RequestHistory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("History").field("kept", &self.kept()).finish_non_exhaustive()
    }
}

// === impl StoryRing ===

impl StoryRing {
    /// Evicts the oldest requests beyond the bounds. The caller drops them after releasing the lock.
    fn shrink(&mut self, max: usize) -> Vec<Arc<Story>> {
        let mut dropped = Vec::new();
        while self.ended.len() > max || self.bytes > max.saturating_mul(RequestHistory::MEAN_STORY_BYTES) {
            let Some(oldest) = self.ended.pop_front() else { break };
            self.bytes -= oldest.bytes();
            self.is_full = true;
            dropped.push(oldest);
        }
        dropped
    }
}

// === impl HistoryExtent ===

impl HistoryExtent {
    /// Explains why a request may be missing.
    pub fn explain(&self) -> String {
        let Self { waited, at_once, .. } = self;
        if waited.max == 0 {
            return "The history is disabled: `history.requests` is 0.".into();
        }
        format!(
            "The history has the requests that wait now, the last {} that waited (now {}, since {}) and the last {} \
             that failed or were refused at once (now {}, since {}). It does not have requests that were answered at \
             once, matched no route, were served by another replica, or arrived before this process started.",
            waited.max, waited.count, waited.since, at_once.max, at_once.count, at_once.since
        )
    }
}

#[cfg(test)]
mod tests;
