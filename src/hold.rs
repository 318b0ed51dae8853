//! The queue of held requests: first in, first out, bounded, and left by dropping the ticket.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::oneshot, time::Instant};

use crate::domain::Reason;

/// Held requests, waiting for a `P` (a permit).
///
/// The order is that of admission. A request that comes back after a failed dispatch takes its old place, so it is
/// ahead of everything admitted after it.
pub struct HoldQueue<P> {
    inner: Mutex<Inner<P>>,
    /// The number of waiters, readable without the lock: sequentially consistent, so that of a release that sees
    /// nobody waiting and an arrival that sees no room, at least one sees the other.
    len: AtomicUsize,
    /// The number that the next one to join gets; written under the lock.
    next: AtomicU64,
    /// The keys at one moment, for positions.
    order: Mutex<Order>,
}

struct Inner<P> {
    waiting: BTreeMap<Key, Waiter<P>>,
    returned: u64,
    bytes: usize,
}

/// The number of the place, then who came back to it; `JOINED` for who did not, and so comes last.
type Key = (u64, u64);

const JOINED: u64 = u64::MAX;

struct Waiter<P> {
    bytes: usize,
    since: Instant,
    /// The endpoint that it must go to.
    pin: Option<u64>,
    released: oneshot::Sender<Released<P>>,
}

#[derive(Default)]
struct Order {
    taken: Option<Instant>,
    keys: Vec<Key>,
}

/// How waiting ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Released<P> {
    /// It may be dispatched.
    Dispatch(P),
    /// What it waits for will not come; the time is until the next try, `None` if that would fail in the same way.
    Failed(Reason, Option<Duration>),
    /// We are about to stop.
    Draining,
}

/// A place in the queue. Dropping it leaves the queue, and returns what it was given but did not take.
pub struct Ticket<P> {
    queue: Arc<HoldQueue<P>>,
    key: Key,
    ahead: usize,
    since: Instant,
    released: oneshot::Receiver<Released<P>>,
}

/// Where a ticket stands, for who tells its owner.
pub struct Spot<P> {
    queue: Arc<HoldQueue<P>>,
    key: Key,
}

/// The place of a request in the order of admission, to come back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place(u64);

/// Which bound was hit.
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
    /// How many requests may wait.
    pub requests: usize,
    /// How many bytes of bodies may wait.
    pub bytes: usize,
}

// === impl HoldQueue ===

impl<P> Default for HoldQueue<P> {
    fn default() -> Self {
        let inner = Inner { waiting: BTreeMap::new(), returned: 0, bytes: 0 };
        Self {
            inner: Mutex::new(inner),
            len: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            order: Mutex::default(),
        }
    }
}

impl<P> HoldQueue<P> {
    /// How old a list of places may be when a position is read from it: walking a long queue for every heartbeat
    /// would cost more than the holding.
    const ORDER_AGE: Duration = Duration::from_secs(1);

    /// How many requests wait.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::SeqCst)
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes of bodies wait.
    pub fn bytes(&self) -> usize {
        self.inner.lock().bytes
    }

    /// Since when the first one waits.
    pub fn oldest(&self) -> Option<Instant> {
        self.inner.lock().waiting.values().map(|waiter| waiter.since).next()
    }

    /// Joins the queue at its end.
    ///
    /// # Errors
    /// When it is full.
    pub fn join(self: &Arc<Self>, bytes: usize, bounds: Bounds) -> Result<Ticket<P>, Full> {
        self.join_for(None, bytes, bounds)
    }

    /// Joins the queue at its end, for this endpoint if there is one.
    ///
    /// # Errors
    /// When it is full.
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
        Ok(self.enter(&mut inner, (number, JOINED), ahead, bytes, pin))
    }

    /// Takes an old place again. There is no bound: it had been admitted.
    pub fn rejoin(self: &Arc<Self>, place: Place, bytes: usize) -> Ticket<P> {
        self.rejoin_for(None, place, bytes)
    }

    /// Takes an old place again, for this endpoint if there is one.
    pub fn rejoin_for(self: &Arc<Self>, pin: Option<u64>, place: Place, bytes: usize) -> Ticket<P> {
        let mut inner = self.inner.lock();
        let returned = inner.returned;
        inner.returned += 1;
        // Those who came back, too, or were admitted earlier: few.
        let key = (place.0, returned);
        let ahead = inner.waiting.range(..key).count();
        self.enter(&mut inner, key, ahead, bytes, pin)
    }

    /// The place of a request that is dispatched without waiting, in case it comes back: just ahead of the next one
    /// to join.
    pub fn place(&self) -> Place {
        Place(self.next.load(Ordering::Relaxed))
    }

    fn enter(
        self: &Arc<Self>,
        inner: &mut Inner<P>,
        key: Key,
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

    /// Hands what `next` gives to the waiters in their order, until it gives nothing or nobody waits. Says how many
    /// got something.
    pub fn release(&self, mut next: impl FnMut() -> Option<P>) -> usize {
        self.release_for(|_| next())
    }

    /// Hands what `next` gives for them to the waiters in their order, until it gives nothing for one that may go to any
    /// endpoint. One for whose endpoint it gives nothing is passed over. Says how many got something.
    pub fn release_for(&self, mut next: impl FnMut(Option<u64>) -> Option<P>) -> usize {
        let mut count = 0;
        // What a waiter that has just gone did not take. It is dropped without the lock, since dropping a permit may
        // come back here.
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
            self.left(&mut inner, waiter.bytes);
            drop(inner);
            match waiter.released.send(Released::Dispatch(permit)) {
                Ok(()) => count += 1,
                // What is for one endpoint may not be what the next waiter wants.
                Err(Released::Dispatch(permit)) if waiter.pin.is_none() => unclaimed = Some(permit),
                Err(_) => {}
            }
        }
        count
    }

    /// Ends all waiting for one reason. Says how many waited.
    pub fn release_all(&self, why: impl Fn() -> Released<P>) -> usize {
        let waiting = {
            let mut inner = self.inner.lock();
            inner.bytes = 0;
            let waiting = std::mem::take(&mut inner.waiting);
            self.len.store(0, Ordering::SeqCst);
            waiting
        };
        waiting.into_values().filter_map(|waiter| waiter.released.send(why()).ok()).count()
    }

    /// Lists who waits. In parts, so that nobody who comes, goes or is let go waits for the whole walk; who comes back
    /// meanwhile may be missed.
    fn list(&self, keys: &mut Vec<Key>) {
        const PART: usize = 1000;
        keys.clear();
        let mut after = Bound::Unbounded;
        loop {
            let listed = keys.len();
            keys.extend(
                self.inner.lock().waiting.range((after, Bound::Unbounded)).take(PART).map(|(key, _)| *key),
            );
            match keys.last() {
                Some(last) if keys.len() == listed + PART => after = Bound::Excluded(*last),
                _ => break,
            }
        }
    }

    fn left(&self, inner: &mut Inner<P>, bytes: usize) {
        inner.bytes -= bytes;
        self.len.store(inner.waiting.len(), Ordering::SeqCst);
    }
}

// === impl Ticket ===

impl<P> Ticket<P> {
    /// Waits for the release. Cancel-safe: what was given and not taken goes back when the ticket is dropped.
    pub async fn released(&mut self) -> Released<P> {
        // The sender lives in the queue until it is used, and we hold the queue.
        (&mut self.released).await.unwrap_or(Released::Draining)
    }

    /// Where it stands.
    pub fn spot(&self) -> Spot<P> {
        Spot { queue: self.queue.clone(), key: self.key }
    }

    /// How many waited before it when it began to.
    pub const fn ahead(&self) -> usize {
        self.ahead
    }

    /// Since when it waits.
    pub const fn since(&self) -> Instant {
        self.since
    }

    /// Its place, to come back to.
    pub const fn place(&self) -> Place {
        Place(self.key.0)
    }
}

impl<P> Drop for Ticket<P> {
    fn drop(&mut self) {
        // Whoever was released is not in the queue any more.
        if self.released.is_terminated() {
            return;
        }
        // Keys are never used twice, so a waiter that is found is ours.
        let mut inner = self.queue.inner.lock();
        if let Some(waiter) = inner.waiting.remove(&self.key) {
            self.queue.left(&mut inner, waiter.bytes);
        }
    }
}

// === impl Spot ===

impl<P> Spot<P> {
    /// How many wait before it, at most a second ago.
    pub fn ahead(&self) -> usize {
        let now = Instant::now();
        let mut order = self.queue.order.lock();
        if order.taken.is_none_or(|taken| now - taken > HoldQueue::<P>::ORDER_AGE) {
            self.queue.list(&mut order.keys);
            order.taken = Some(now);
        }
        order.keys.partition_point(|key| *key < self.key)
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
    async fn the_order_is_that_of_admission_also_for_who_comes_back() {
        let queue = queue();
        let direct = queue.place();
        let (mut a, mut b) = (queue.join(1, BOUNDS).unwrap(), queue.join(1, BOUNDS).unwrap());
        let mut c = queue.rejoin(direct, 1);
        assert_eq!((a.ahead(), b.ahead(), c.ahead()), (0, 1, 0));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!((c.spot().ahead(), a.spot().ahead(), b.spot().ahead()), (0, 1, 2));
        let mut permits = 0..;
        assert_eq!(queue.release(|| permits.next().filter(|permit| *permit < 3)), 3);
        for (ticket, permit) in [(&mut c, 0), (&mut a, 1), (&mut b, 2)] {
            assert_eq!(ticket.released().await, Released::Dispatch(permit));
        }
        let again = queue.rejoin(a.place(), 1);
        drop(a);
        assert_eq!(queue.len(), 1, "an old ticket does not take the new one out");
        drop(again);
        assert!(queue.is_empty());
    }

    #[tokio::test]
    async fn places_are_right_in_a_long_queue_that_is_looked_at_in_parts() {
        let queue = queue();
        let bounds = Bounds { requests: usize::MAX, bytes: usize::MAX };
        let mut held: Vec<_> = (0..3001).map(|_| queue.join(1, bounds).unwrap()).collect();
        drop(held.remove(999));
        assert!(held.iter().enumerate().all(|(place, ticket)| ticket.spot().ahead() == place));
    }

    #[tokio::test]
    async fn both_bounds_hold_and_a_dropped_ticket_makes_room() {
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
    async fn what_a_waiter_did_not_take_goes_to_the_next() {
        let queue = queue();
        let (a, mut b) = (queue.join(1, BOUNDS).unwrap(), queue.join(1, BOUNDS).unwrap());
        drop(a);
        assert_eq!(queue.release(|| Some(7)), 1);
        assert_eq!(b.released().await, Released::Dispatch(7));
    }

    #[tokio::test]
    async fn waiter_for_a_full_endpoint_is_passed_over() {
        let queue = queue();
        let join = |pin| queue.join_for(pin, 1, BOUNDS).unwrap();
        let (mut pinned, mut any, mut other) = (join(Some(1)), join(None), join(Some(2)));
        // Endpoint 2 has one place.
        let mut left = 1;
        let mut next = |pin: Option<u64>| {
            let has_room = pin != Some(1) && left > 0;
            left -= u32::from(has_room);
            has_room.then_some(2)
        };
        assert_eq!(queue.release_for(&mut next), 1);
        assert_eq!(any.released().await, Released::Dispatch(2), "the first that may go there");
        assert_eq!(queue.release_for(|pin| pin.map(|pin| pin as u32)), 2);
        assert_eq!(pinned.released().await, Released::Dispatch(1));
        assert_eq!(other.released().await, Released::Dispatch(2));
    }

    proptest! {
        /// Joins, hang-ups, returns and releases in any order: the counts are those of the tickets that wait, and
        /// releases come in the order of places.
        #[test]
        fn the_counts_are_those_of_the_tickets(steps in prop::collection::vec((0..4_u8, 0..50_usize), 0..200)) {
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
                            prop_assert_eq!(ticket.released.try_recv().ok(), Some(Released::Dispatch(0)));
                        }
                    }
                }
                prop_assert_eq!(queue.len(), waiting.len());
                prop_assert_eq!(queue.bytes(), waiting.iter().map(|(_, bytes)| bytes).sum::<usize>());
            }
        }
    }
}
