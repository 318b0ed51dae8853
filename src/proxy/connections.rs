//! Limits on client connections, in total and per source. At a limit, the connection idle for longest is closed for a
//! new one.

use std::{
    collections::BinaryHeap,
    net::IpAddr,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use dashmap::{DashMap, Entry};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::connection_state::ConnectionState;
use crate::places::Source;

/// Client connections of all threads.
#[derive(Default)]
pub struct Connections {
    open: AtomicUsize,
    /// Of these, connections that were shed for others and are about to close.
    leaving: AtomicUsize,
    /// Open connections by memory address.
    states: DashMap<usize, Arc<ConnectionState>>,
    idle: Mutex<LongestIdle>,
    /// Connections per source. Empty unless `limits.maxConnectionsPerSource` is set.
    sources: DashMap<Source, Vec<Arc<ConnectionState>>>,
}

/// Longest-idle connections found by the last scan.
#[derive(Default)]
struct LongestIdle {
    /// Oldest last.
    oldest: Vec<(u64, Arc<ConnectionState>)>,
    scanned: Option<Instant>,
}

/// Registration of a connection, released on drop.
pub struct Connected {
    connections: Arc<Connections>,
    state: Arc<ConnectionState>,
    source: Option<Source>,
}

/// Connections found by one scan. A scan reads a flag of each open connection, which takes 1 to 2 ms for 65,536, and so
/// costs each new connection about 20 µs.
const SCAN_FINDS: usize = 64;

/// Minimum time between scans while none finds an idle connection.
const SCAN_INTERVAL: Duration = Duration::from_millis(100);

// === impl Connections ===

impl Connections {
    /// Returns the number of open connections.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Returns `true` if a new connection fits, possibly by shedding an idle one.
    pub fn has_room(&self, most: usize) -> bool {
        self.is_below(most) || (self.may_shed(most) && self.has_idle())
    }

    /// Registers a connection. At a limit, sheds the connection idle for longest. Returns `None` if its source is at its
    /// limit and all connections of the source are busy.
    pub fn enter(
        self: &Arc<Self>,
        address: IpAddr,
        most: usize,
        most_per_source: Option<NonZeroUsize>,
        state: &Arc<ConnectionState>,
    ) -> Option<Connected> {
        let source = match most_per_source {
            None => None,
            Some(limit) => {
                let source = Source::of(address);
                let mut members = self.sources.entry(source).or_default();
                if members.len() >= limit.get() && !(self.may_shed(most) && self.shed_of(&mut members)) {
                    return None;
                }
                members.push(state.clone());
                Some(source)
            }
        };
        if !self.is_below(most) && self.may_shed(most) {
            // If all have become busy since `has_room`, the limit is exceeded by one for a moment.
            self.shed_oldest();
        }
        self.open.fetch_add(1, Ordering::Relaxed);
        self.states.insert(key(state), state.clone());
        Some(Connected { connections: self.clone(), state: state.clone(), source })
    }

    fn is_below(&self, most: usize) -> bool {
        self.open().saturating_sub(self.leaving.load(Ordering::Relaxed)) < most
    }

    /// Returns `false` while too many shed connections have yet to close: each holds a descriptor and memory.
    fn may_shed(&self, most: usize) -> bool {
        self.leaving.load(Ordering::Relaxed) < most / 16 + 16
    }

    /// Sheds the connection of a source that has been idle for longest.
    fn shed_of(&self, members: &mut Vec<Arc<ConnectionState>>) -> bool {
        let now = Instant::now();
        let idle = members
            .iter()
            .enumerate()
            .filter_map(|(place, state)| Some((state.long_idle_since(now)?, place)));
        let Some((since, place)) = idle.min() else { return false };
        let state = members.swap_remove(place);
        self.shed(since, &state);
        true
    }

    fn shed_oldest(&self) {
        let mut idle = self.idle.lock();
        loop {
            self.scan(&mut idle);
            let Some((since, state)) = idle.oldest.pop() else { return };
            if self.shed(since, &state) {
                return;
            }
        }
    }

    /// Sheds a connection if it has been idle since `since`.
    fn shed(&self, since: u64, state: &ConnectionState) -> bool {
        // Before shedding: the connection may be dropped, and decrement this, right after.
        self.leaving.fetch_add(1, Ordering::Relaxed);
        let is_shed = state.shed(since);
        if is_shed {
            tracing::debug!("closing an idle connection to make room for a new one");
        } else {
            self.leaving.fetch_sub(1, Ordering::Relaxed);
        }
        is_shed
    }

    fn has_idle(&self) -> bool {
        let mut idle = self.idle.lock();
        self.scan(&mut idle);
        !idle.oldest.is_empty()
    }

    /// Scans for idle connections unless some are known. Drops known ones that have become busy.
    fn scan(&self, idle: &mut LongestIdle) {
        while let Some((since, state)) = idle.oldest.last() {
            if state.idle_since() == Some(*since) {
                return;
            }
            idle.oldest.pop();
        }
        let now = Instant::now();
        if idle.scanned.is_some_and(|scanned| now - scanned < SCAN_INTERVAL) {
            return;
        }
        let mut oldest = BinaryHeap::with_capacity(SCAN_FINDS + 1);
        for state in &self.states {
            let Some(since) = state.long_idle_since(now) else { continue };
            oldest.push((since, *state.key()));
            if oldest.len() > SCAN_FINDS {
                oldest.pop();
            }
        }
        let found = oldest.into_sorted_vec().into_iter().rev();
        idle.oldest =
            found.filter_map(|(since, key)| Some((since, self.states.get(&key)?.clone()))).collect();
        // A successful scan may be repeated as soon as its results are used up.
        idle.scanned = idle.oldest.is_empty().then_some(now);
    }
}

fn key(state: &Arc<ConnectionState>) -> usize {
    Arc::as_ptr(state).addr()
}

impl Drop for Connected {
    fn drop(&mut self) {
        let connections = &self.connections;
        connections.states.remove(&key(&self.state));
        connections.open.fetch_sub(1, Ordering::Relaxed);
        if self.state.mark_ended() {
            connections.leaving.fetch_sub(1, Ordering::Relaxed);
        }
        let Some(source) = self.source else { return };
        if let Entry::Occupied(mut members) = connections.sources.entry(source) {
            // Absent if it was shed for another connection of its source.
            if let Some(place) = members.get().iter().position(|member| Arc::ptr_eq(member, &self.state)) {
                members.get_mut().swap_remove(place);
            }
            if members.get().is_empty() {
                members.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::connection_state::MIN_IDLE, *};

    #[test]
    fn source_limit_counts_only_open_connections() {
        let connections = Arc::<Connections>::default();
        let two = NonZeroUsize::new(2);
        let enter = |address: &str| {
            let busy = Arc::<ConnectionState>::default();
            connections.enter(address.parse().unwrap(), usize::MAX, two, &busy)
        };
        let first = enter("192.0.2.1").unwrap();
        // The same client on a dual-stack socket.
        let second = enter("::ffff:192.0.2.1").unwrap();
        assert!(enter("192.0.2.1").is_none());
        let other = enter("192.0.2.2").unwrap();
        assert_eq!(connections.open(), 3);
        drop(first);
        let third = enter("192.0.2.1").unwrap();
        let v6 = [enter("2001:db8::1").unwrap(), enter("2001:db8::ffff:1").unwrap()];
        assert!(enter("2001:db8::2").is_none(), "64 bits are one source");
        assert!(enter("2001:db8:0:1::2").is_some());
        drop((second, third, other, v6));
        assert_eq!(connections.open(), 0);
        assert!(connections.sources.is_empty(), "closed connections leave no state");
    }

    #[test]
    fn sources_are_untracked_without_a_limit() {
        let connections = Arc::<Connections>::default();
        let open: Vec<_> = (0..100).map(|_| enter(&connections, usize::MAX, &Arc::default())).collect();
        assert_eq!((connections.open(), connections.sources.len()), (100, 0));
        drop(open);
        assert_eq!(connections.open(), 0);
        assert!(connections.states.is_empty());
    }

    fn is_shed(state: &Arc<ConnectionState>) -> bool {
        state.is_closing()
    }

    fn enter(connections: &Arc<Connections>, most: usize, state: &Arc<ConnectionState>) -> Connected {
        connections.enter([192, 0, 2, 1].into(), most, None, state).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn full_proxy_sheds_longest_idle_connection() {
        const MAX_OPEN: usize = 200;
        let connections = Arc::<Connections>::default();
        let start = Instant::now();
        let states: Vec<_> = (0..MAX_OPEN).map(|_| Arc::<ConnectionState>::default()).collect();
        let mut open: Vec<_> = states.iter().map(|state| enter(&connections, MAX_OPEN, state)).collect();
        assert!(!connections.has_room(MAX_OPEN), "all are busy");
        // From 50 on they are idle, the last one for longest, and all for less than a second.
        for (number, state) in states.iter().enumerate().skip(50) {
            state.mark_idle_since(start + Duration::from_millis((MAX_OPEN - number) as u64));
        }
        tokio::time::advance(SCAN_INTERVAL).await;
        assert!(!connections.has_room(MAX_OPEN), "a request of theirs may be on its way");
        // The first of them became idle at 150 ms.
        tokio::time::advance(MIN_IDLE + Duration::from_millis(150) - SCAN_INTERVAL).await;
        assert!(connections.has_room(MAX_OPEN));
        // Found idle by the scan, but busy now.
        let begun = states[MAX_OPEN - 2].begin();
        for expected in [MAX_OPEN - 1, MAX_OPEN - 3, MAX_OPEN - 4] {
            let state = Arc::default();
            open.push(enter(&connections, MAX_OPEN, &state));
            let shed: Vec<_> = (0..MAX_OPEN).filter(|number| is_shed(&states[*number])).collect();
            assert_eq!(shed[0], expected, "{shed:?}");
        }
        drop(begun);
        assert_eq!(connections.open(), MAX_OPEN + 3, "three are about to end");
        let mut more = 3;
        while connections.has_room(MAX_OPEN) {
            open.push(enter(&connections, MAX_OPEN, &Arc::default()));
            more += 1;
        }
        assert_eq!(more, MAX_OPEN / 16 + 16, "so many may be about to end at a time");
        // Once closed, they no longer count as leaving.
        open.drain(50..MAX_OPEN);
        assert_eq!((connections.open(), connections.leaving.load(Ordering::Relaxed)), (50 + more, 0));
        drop(open);
        assert_eq!(connections.open(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn full_source_sheds_its_longest_idle() {
        let connections = Arc::<Connections>::default();
        let enter = |address: [u8; 4], state: &Arc<ConnectionState>| {
            connections.enter(address.into(), usize::MAX, NonZeroUsize::new(2), state)
        };
        let [one, two, three, other]: [Arc<ConnectionState>; 4] = Default::default();
        let _open = [enter([192, 0, 2, 1], &one), enter([192, 0, 2, 1], &two), enter([192, 0, 2, 2], &other)];
        other.mark_idle_since(Instant::now());
        tokio::time::advance(Duration::from_secs(1)).await;
        two.mark_idle_since(Instant::now());
        assert!(enter([192, 0, 2, 1], &Arc::default()).is_none(), "it has only just become idle");
        tokio::time::advance(MIN_IDLE).await;
        let _third = enter([192, 0, 2, 1], &three).unwrap();
        assert_eq!([&one, &two, &three, &other].map(is_shed), [false, true, false, false]);
        assert!(enter([192, 0, 2, 1], &Arc::default()).is_none(), "both are busy");
    }
}
