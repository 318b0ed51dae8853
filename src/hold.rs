//! Queue of held requests: FIFO and bounded. Dropping a ticket leaves the queue.

use std::{collections::BTreeMap, ops::Bound, sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::Instant};

use crate::{
    domain::Reason,
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

/// Held requests that wait for a permit `P`.
///
/// The order is that of admission. A request enqueued again after a failed dispatch takes its old position, ahead of
/// every request admitted after it.
pub struct HoldQueue<P> {
    inner: Mutex<HoldQueueState<P>>,
    /// Number of waiters, readable without the lock. An arrival is counted, then looks for a free slot; a release frees a
    /// slot, then reads the count. All sequentially consistent, so at least one side sees the other. Otherwise a request
    /// could wait beside a free slot. A waiter is counted until after it has got a permit, so a reader of this count and
    /// then of the slots misses none.
    len: AtomicUsize,
    /// Number of the next position; written under the lock.
    next: AtomicU64,
    /// Snapshot of the keys, for positions.
    snapshot: Mutex<KeySnapshot>,
}

struct HoldQueueState<P> {
    waiting: BTreeMap<QueueKey, Waiter<P>>,
    /// Number of requests enqueued again so far.
    returned: u64,
    bytes: usize,
}

/// Number of the position, then the number of the re-enqueueing; `FIRST_JOIN`, the maximum, for a request enqueued
/// once.
type QueueKey = (u64, u64);

const FIRST_JOIN: u64 = u64::MAX;

struct Waiter<P> {
    bytes: usize,
    since: Instant,
    /// Id of the endpoint that the request is bound to.
    pin: Option<u64>,
    released: oneshot::Sender<ReleaseOutcome<P>>,
}

#[derive(Default)]
struct KeySnapshot {
    taken: Option<Instant>,
    keys: Vec<QueueKey>,
}

/// Result of a wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReleaseOutcome<P> {
    /// The request may be dispatched.
    Dispatch(P),
    /// The wait has failed; with the time after which a retry may succeed, `None` if it would fail in the same way.
    Failed(Reason, Option<Duration>),
    /// The proxy shuts down.
    Draining,
}

/// A held request. Dropping it leaves the queue, and gives back a permit that was not taken.
pub struct Ticket<P> {
    queue: Arc<HoldQueue<P>>,
    key: QueueKey,
    ahead: usize,
    since: Instant,
    released: oneshot::Receiver<ReleaseOutcome<P>>,
}

/// Handle for reading the position of a ticket.
pub struct PositionHandle<P> {
    queue: Arc<HoldQueue<P>>,
    key: QueueKey,
}

/// Position of a request in the order of admission, for [`HoldQueue::rejoin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueuePosition(u64);

/// The bound that was hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// `hold.maxRequests`.
    Requests,
    /// `hold.maxBytes`.
    Bytes,
}

/// The bounds of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Maximum number of held requests.
    pub requests: usize,
    /// Maximum bytes of their bodies in total.
    pub bytes: usize,
}

// === impl HoldQueue ===

impl<P> Default for HoldQueue<P> {
    fn default() -> Self {
        let inner = HoldQueueState { waiting: BTreeMap::new(), returned: 0, bytes: 0 };
        Self {
            inner: Mutex::new(inner),
            len: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            snapshot: Mutex::default(),
        }
    }
}

impl<P> HoldQueue<P> {
    /// Maximum age of the snapshot that positions are read from: a walk of a long queue for every heartbeat would be too
    /// expensive.
    const MAX_SNAPSHOT_AGE: Duration = Duration::from_secs(1);

    /// Returns the number of held requests.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::SeqCst)
    }

    /// Returns true if no request is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the bytes of held bodies.
    pub fn bytes(&self) -> usize {
        self.inner.lock().bytes
    }

    /// Returns the time at which the first request in the queue was enqueued.
    pub fn oldest(&self) -> Option<Instant> {
        self.inner.lock().waiting.values().map(|waiter| waiter.since).next()
    }

    /// Appends a request to the queue.
    ///
    /// # Errors
    /// If a bound is hit.
    pub fn join(self: &Arc<Self>, bytes: usize, bounds: Bounds) -> Result<Ticket<P>, Full> {
        self.join_for(None, bytes, bounds)
    }

    /// Like [`Self::join`], for a request bound to endpoint `pin`.
    ///
    /// # Errors
    /// If a bound is hit.
    pub fn join_for(
        self: &Arc<Self>,
        pin: Option<u64>,
        bytes: usize,
        bounds: Bounds,
    ) -> Result<Ticket<P>, Full> {
        let mut inner = self.inner.lock();
        if inner.waiting.len() >= bounds.requests {
            return Err(Full::Requests);
        }
        if inner.bytes + bytes > bounds.bytes {
            return Err(Full::Bytes);
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let ahead = inner.waiting.len();
        Ok(self.enter(&mut inner, (number, FIRST_JOIN), ahead, bytes, pin))
    }

    /// Enqueues a request again at its old position. Ignores the bounds, as the request has been admitted.
    pub fn rejoin(self: &Arc<Self>, place: QueuePosition, bytes: usize) -> Ticket<P> {
        self.rejoin_for(None, place, bytes)
    }

    /// Like [`Self::rejoin`], for a request bound to endpoint `pin`.
    pub fn rejoin_for(self: &Arc<Self>, pin: Option<u64>, place: QueuePosition, bytes: usize) -> Ticket<P> {
        let mut inner = self.inner.lock();
        let returned = inner.returned;
        inner.returned += 1;
        // A short range: requests admitted earlier or enqueued again before this one.
        let key = (place.0, returned);
        let ahead = inner.waiting.range(..key).count();
        self.enter(&mut inner, key, ahead, bytes, pin)
    }

    /// Returns the position for a request that is dispatched without waiting: just ahead of the next one to join.
    pub fn place(&self) -> QueuePosition {
        QueuePosition(self.next.load(Ordering::Relaxed))
    }

    fn enter(
        self: &Arc<Self>,
        inner: &mut HoldQueueState<P>,
        key: QueueKey,
        ahead: usize,
        bytes: usize,
        pin: Option<u64>,
    ) -> Ticket<P> {
        let since = Instant::now();
        let (sender, released) = oneshot::channel();
        inner.bytes += bytes;
        inner.waiting.insert(key, Waiter { bytes, since, pin, released: sender });
        self.len.store(inner.waiting.len(), Ordering::SeqCst);
        Ticket { queue: self.clone(), key, ahead, since, released }
    }

    /// Releases waiters in FIFO order until `next` returns `None` or the queue is empty. Returns the number released.
    pub fn release(&self, mut next: impl FnMut() -> Option<P>) -> usize {
        self.release_for(|_| next())
    }

    /// Releases waiters in FIFO order, each with the permit that `next` returns. `next` takes the endpoint that the
    /// waiter is bound to. On `None`, a bound waiter is skipped, while an unbound one ends the release. Returns the
    /// number released. Costs one load while nothing waits.
    pub fn release_for(&self, mut next: impl FnMut(Option<u64>) -> Option<P>) -> usize {
        if self.is_empty() {
            return 0;
        }
        let mut count = 0;
        // The permit of a waiter dropped meanwhile. Kept until the lock is released, as dropping a permit may call this
        // again.
        let mut unclaimed = None;
        loop {
            let mut inner = self.inner.lock();
            let mut found = None;
            for (key, waiter) in &inner.waiting {
                let permit = match waiter.pin {
                    None => unclaimed.take().or_else(|| next(None)),
                    pin => next(pin),
                };
                found = permit.map(|permit| (*key, permit));
                if found.is_some() || waiter.pin.is_none() {
                    break;
                }
            }
            let Some((key, permit)) = found else { break };
            let Some(waiter) = inner.waiting.remove(&key) else { break };
            self.account_leave(&mut inner, waiter.bytes);
            drop(inner);
            match waiter.released.send(ReleaseOutcome::Dispatch(permit)) {
                Ok(()) => count += 1,
                // The permit of a bound waiter does not fit the next one.
                Err(ReleaseOutcome::Dispatch(permit)) if waiter.pin.is_none() => unclaimed = Some(permit),
                Err(_) => {}
            }
        }
        count
    }

    /// Ends all waits with the same result. Returns their number.
    pub fn release_all(&self, why: impl Fn() -> ReleaseOutcome<P>) -> usize {
        let waiting = {
            let mut inner = self.inner.lock();
            inner.bytes = 0;
            let waiting = std::mem::take(&mut inner.waiting);
            self.len.store(0, Ordering::SeqCst);
            waiting
        };
        waiting.into_values().filter_map(|waiter| waiter.released.send(why()).ok()).count()
    }

    /// Lists the keys in parts, so that the lock is not held for the whole walk. May miss a request that is enqueued
    /// again meanwhile.
    fn list(&self, keys: &mut Vec<QueueKey>) {
        const KEYS_PER_LOCK: usize = 1000;
        keys.clear();
        let mut after = Bound::Unbounded;
        loop {
            let listed = keys.len();
            keys.extend(
                self.inner
                    .lock()
                    .waiting
                    .range((after, Bound::Unbounded))
                    .take(KEYS_PER_LOCK)
                    .map(|(key, _)| *key),
            );
            match keys.last() {
                Some(last) if keys.len() == listed + KEYS_PER_LOCK => after = Bound::Excluded(*last),
                _ => break,
            }
        }
    }

    fn account_leave(&self, inner: &mut HoldQueueState<P>, bytes: usize) {
        inner.bytes -= bytes;
        self.len.store(inner.waiting.len(), Ordering::SeqCst);
    }
}

// === impl Ticket ===

impl<P> Ticket<P> {
    /// Waits for the release. Cancel-safe: a permit that was not taken is given back when the ticket is dropped.
    pub async fn released(&mut self) -> ReleaseOutcome<P> {
        // Cannot fail: the ticket keeps the queue alive, and the queue keeps the sender until it is used.
        (&mut self.released).await.unwrap_or(ReleaseOutcome::Draining)
    }

    /// Returns a handle for reading the position.
    pub fn position_handle(&self) -> PositionHandle<P> {
        PositionHandle { queue: self.queue.clone(), key: self.key }
    }

    /// Returns the number of requests ahead at the start of the wait.
    pub const fn ahead(&self) -> usize {
        self.ahead
    }

    /// Returns the start of the wait.
    pub const fn since(&self) -> Instant {
        self.since
    }

    /// Returns the position, for [`HoldQueue::rejoin`].
    pub const fn place(&self) -> QueuePosition {
        QueuePosition(self.key.0)
    }
}

impl<P> Drop for Ticket<P> {
    fn drop(&mut self) {
        // A released ticket has left the queue already.
        if self.released.is_terminated() {
            return;
        }
        // Keys are never reused, so a waiter with this key is ours.
        let mut inner = self.queue.inner.lock();
        if let Some(waiter) = inner.waiting.remove(&self.key) {
            self.queue.account_leave(&mut inner, waiter.bytes);
        }
    }
}

// === impl PositionHandle ===

impl<P> PositionHandle<P> {
    /// Returns the number of requests ahead, from a snapshot at most one second old.
    pub fn ahead(&self) -> usize {
        let now = Instant::now();
        let mut snapshot = self.queue.snapshot.lock();
        if snapshot.taken.is_none_or(|taken| now - taken > HoldQueue::<P>::MAX_SNAPSHOT_AGE) {
            self.queue.list(&mut snapshot.keys);
            snapshot.taken = Some(now);
        }
        snapshot.keys.partition_point(|key| *key < self.key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds { requests: 3, bytes: 100 };

    fn queue() -> Arc<HoldQueue<u32>> {
        Arc::default()
    }

    #[tokio::test(start_paused = true)]
    async fn rejoined_request_keeps_its_admission_order() {
        let queue = queue();
        let direct = queue.place();
        let (mut a, mut b) = (queue.join(1, BOUNDS).unwrap(), queue.join(1, BOUNDS).unwrap());
        let mut c = queue.rejoin(direct, 1);
        assert_eq!((a.ahead(), b.ahead(), c.ahead()), (0, 1, 0));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(
            (c.position_handle().ahead(), a.position_handle().ahead(), b.position_handle().ahead()),
            (0, 1, 2)
        );
        let mut permits = 0..;
        assert_eq!(queue.release(|| permits.next().filter(|permit| *permit < 3)), 3);
        for (ticket, permit) in [(&mut c, 0), (&mut a, 1), (&mut b, 2)] {
            assert_eq!(ticket.released().await, ReleaseOutcome::Dispatch(permit));
        }
        let again = queue.rejoin(a.place(), 1);
        drop(a);
        assert_eq!(queue.len(), 1, "an old ticket does not remove the new one");
        drop(again);
        assert!(queue.is_empty());
    }

    #[tokio::test]
    async fn positions_are_right_in_a_long_queue() {
        let queue = queue();
        let bounds = Bounds { requests: usize::MAX, bytes: usize::MAX };
        let mut held: Vec<_> = (0..3001).map(|_| queue.join(1, bounds).unwrap()).collect();
        drop(held.remove(999));
        assert!(held.iter().enumerate().all(|(place, ticket)| ticket.position_handle().ahead() == place));
    }

    #[tokio::test]
    async fn full_queue_rejects_until_a_ticket_is_dropped() {
        let queue = queue();
        let a = queue.join(60, BOUNDS).unwrap();
        assert_eq!(queue.join(41, BOUNDS).err(), Some(Full::Bytes));
        let _b = queue.join(20, BOUNDS).unwrap();
        let _c = queue.join(20, BOUNDS).unwrap();
        assert_eq!(queue.join(0, BOUNDS).err(), Some(Full::Requests));
        drop(a);
        assert_eq!((queue.len(), queue.bytes()), (2, 40));
        queue.join(60, BOUNDS).unwrap();
    }

    #[tokio::test]
    async fn unclaimed_permit_goes_to_the_next_waiter() {
        let queue = queue();
        let (a, mut b) = (queue.join(1, BOUNDS).unwrap(), queue.join(1, BOUNDS).unwrap());
        drop(a);
        assert_eq!(queue.release(|| Some(7)), 1);
        assert_eq!(b.released().await, ReleaseOutcome::Dispatch(7));
    }

    #[tokio::test]
    async fn waiter_for_full_endpoint_is_skipped() {
        let queue = queue();
        let join = |pin| queue.join_for(pin, 1, BOUNDS).unwrap();
        let (mut pinned, mut any, mut other) = (join(Some(1)), join(None), join(Some(2)));
        // Endpoint 2 has room for one request.
        let mut left = 1;
        let mut next = |pin: Option<u64>| {
            let has_room = pin != Some(1) && left > 0;
            left -= u32::from(has_room);
            has_room.then_some(2)
        };
        assert_eq!(queue.release_for(&mut next), 1);
        assert_eq!(any.released().await, ReleaseOutcome::Dispatch(2), "the first waiter that fits");
        assert_eq!(queue.release_for(|pin| pin.map(|pin| pin as u32)), 2);
        assert_eq!(pinned.released().await, ReleaseOutcome::Dispatch(1));
        assert_eq!(other.released().await, ReleaseOutcome::Dispatch(2));
    }

    proptest! {
        /// Runs joins, drops, re-enqueueings and releases in random order.
        #[test]
        fn counts_match_tickets_and_releases_are_in_order(steps in prop::collection::vec((0..4_u8, 0..50_usize), 0..200)) {
            let queue: Arc<HoldQueue<u64>> = Arc::default();
            let bounds = Bounds { requests: 20, bytes: 400 };
            let mut waiting: Vec<(Ticket<u64>, usize)> = Vec::new();
            for (step, number) in steps {
                match step {
                    0 => {
                        let bytes: usize = waiting.iter().map(|(_, bytes)| bytes).sum();
                        let full = waiting.len() >= bounds.requests || bytes + number > bounds.bytes;
                        match queue.join(number, bounds) {
                            Ok(ticket) => {
                                prop_assert!(!full);
                                waiting.push((ticket, number));
                            }
                            Err(_) => prop_assert!(full),
                        }
                    }
                    1 if !waiting.is_empty() => drop(waiting.remove(number % waiting.len())),
                    2 if !waiting.is_empty() => {
                        let (ticket, bytes) = waiting.remove(number % waiting.len());
                        let place = ticket.place();
                        drop(ticket);
                        waiting.push((queue.rejoin(place, bytes), bytes));
                    }
                    _ => {
                        let mut left = number % 3;
                        let expected = left.min(waiting.len());
                        waiting.sort_by_key(|(ticket, _)| ticket.key);
                        let released = queue.release(|| {
                            left = left.checked_sub(1)?;
                            Some(0)
                        });
                        prop_assert_eq!(released, expected);
                        for (mut ticket, _) in waiting.drain(..expected) {
                            prop_assert_eq!(ticket.released.try_recv().ok(), Some(ReleaseOutcome::Dispatch(0)));
                        }
                    }
                }
                prop_assert_eq!(queue.len(), waiting.len());
                prop_assert_eq!(queue.bytes(), waiting.iter().map(|(_, bytes)| bytes).sum::<usize>());
            }
        }
    }
}
