//! How many clients are connected, in all and from one source; and which idle connection ends when there is no place
//! for another.

use std::{
    array,
    collections::{BinaryHeap, HashMap, hash_map::Entry},
    net::IpAddr,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::ConnectionState;
use crate::places::Source;

/// The connections of all threads.
pub struct Connections {
    open: AtomicUsize,
    /// Those of them whose place another one has taken, and that are about to end.
    leaving: AtomicUsize,
    /// All of them by their address in memory, in parts, so that threads seldom wait for each other.
    parts: [Mutex<HashMap<usize, Arc<ConnectionState>>>; PARTS],
    idle: Mutex<Idle>,
    /// Of the sources that were looked at, those with a connection. Empty while there is no limit to them.
    sources: Mutex<HashMap<Source, Vec<Arc<ConnectionState>>>>,
}

/// The connections that had been idle for longest at the last scan.
#[derive(Default)]
struct Idle {
    /// The oldest last.
    oldest: Vec<(u64, Arc<ConnectionState>)>,
    scanned: Option<Instant>,
}

/// One connection, until this is dropped.
pub struct Connected {
    connections: Arc<Connections>,
    state: Arc<ConnectionState>,
    source: Option<Source>,
}

const PARTS: usize = 16;

/// How many connections one scan finds: it reads a flag of each open connection, which takes a millisecond or two where
/// there are 65,536, and so costs each newcomer some 20 µs.
const SCAN_FINDS: usize = 64;

/// The shortest time between two scans that find nothing.
const SCAN_INTERVAL: Duration = Duration::from_millis(100);

// === impl Connections ===

impl Default for Connections {
    fn default() -> Self {
        Self {
            open: AtomicUsize::new(0),
            leaving: AtomicUsize::new(0),
            parts: array::from_fn(|_| Mutex::default()),
            idle: Mutex::default(),
            sources: Mutex::default(),
        }
    }
}

impl Connections {
    /// How many there are.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Whether another one has a place, or can take that of an idle one.
    pub fn has_room(&self, most: usize) -> bool {
        self.is_below(most) || (self.may_shed(most) && self.has_idle())
    }

    /// Another one. Where there is no place for it, in all or for its source, it takes that of the connection that has
    /// been idle for longest. `None` if all of its source are busy.
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
                let mut sources = self.sources.lock();
                let members = sources.entry(source).or_default();
                if members.len() >= limit.get() && !(self.may_shed(most) && self.shed_of(members)) {
                    return None;
                }
                members.push(state.clone());
                Some(source)
            }
        };
        if !self.is_below(most) && self.may_shed(most) {
            // If all have become busy since the listener looked, there is one too many for a moment.
            self.shed_oldest();
        }
        self.open.fetch_add(1, Ordering::Relaxed);
        self.part(state).lock().insert(key(state), state.clone());
        Some(Connected { connections: self.clone(), state: state.clone(), source })
    }

    fn is_below(&self, most: usize) -> bool {
        self.open().saturating_sub(self.leaving.load(Ordering::Relaxed)) < most
    }

    /// Those that leave still have their files and memory: so there are never many of them.
    fn may_shed(&self, most: usize) -> bool {
        self.leaving.load(Ordering::Relaxed) < most / 16 + 16
    }

    /// Ends the one of a source that has been idle for longest.
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

    /// Ends a connection if it is still idle, as found.
    fn shed(&self, since: u64, state: &ConnectionState) -> bool {
        // First, since it may have gone by then.
        self.leaving.fetch_add(1, Ordering::Relaxed);
        let is_shed = state.shed(since);
        if is_shed {
            tracing::debug!("an idle connection ends: another one takes its place");
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

    /// Looks for idle ones, unless some are known. One that is known may have become busy meanwhile.
    fn scan(&self, idle: &mut Idle) {
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
        for (number, part) in self.parts.iter().enumerate() {
            for (key, state) in part.lock().iter() {
                let Some(since) = state.long_idle_since(now) else { continue };
                oldest.push((since, number, *key));
                if oldest.len() > SCAN_FINDS {
                    oldest.pop();
                }
            }
        }
        let found = oldest.into_sorted_vec().into_iter().rev();
        idle.oldest = found
            .filter_map(|(since, part, key)| Some((since, self.parts[part].lock().get(&key)?.clone())))
            .collect();
        // What finds some may go on as soon as they are used up.
        idle.scanned = idle.oldest.is_empty().then_some(now);
    }

    fn part(&self, state: &Arc<ConnectionState>) -> &Mutex<HashMap<usize, Arc<ConnectionState>>> {
        // Allocations of this size differ from the seventh bit on.
        &self.parts[(key(state) >> 7) % PARTS]
    }
}

fn key(state: &Arc<ConnectionState>) -> usize {
    Arc::as_ptr(state).addr()
}

impl Drop for Connected {
    fn drop(&mut self) {
        let connections = &self.connections;
        connections.part(&self.state).lock().remove(&key(&self.state));
        connections.open.fetch_sub(1, Ordering::Relaxed);
        if self.state.has_gone() {
            connections.leaving.fetch_sub(1, Ordering::Relaxed);
        }
        let Some(source) = self.source else { return };
        if let Entry::Occupied(mut members) = connections.sources.lock().entry(source) {
            // One that was shed for another of its source is not there any more.
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
    fn a_source_has_its_own_limit_and_gets_places_back() {
        let connections = Arc::<Connections>::default();
        let two = NonZeroUsize::new(2);
        let enter = |address: &str| {
            let busy = Arc::<ConnectionState>::default();
            connections.enter(address.parse().unwrap(), usize::MAX, two, &busy)
        };
        let first = enter("192.0.2.1").unwrap();
        // As a socket for both families sees the same client.
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
        assert!(connections.sources.lock().is_empty(), "nothing is kept of who has gone");
    }

    #[test]
    fn without_a_limit_nothing_is_kept_of_sources() {
        let connections = Arc::<Connections>::default();
        let open: Vec<_> = (0..100).map(|_| enter(&connections, usize::MAX, &Arc::default())).collect();
        assert_eq!((connections.open(), connections.sources.lock().len()), (100, 0));
        drop(open);
        assert_eq!(connections.open(), 0);
        assert!(connections.parts.iter().all(|part| part.lock().is_empty()));
    }

    fn is_shed(state: &Arc<ConnectionState>) -> bool {
        state.is_closing()
    }

    fn enter(connections: &Arc<Connections>, most: usize, state: &Arc<ConnectionState>) -> Connected {
        connections.enter([192, 0, 2, 1].into(), most, None, state).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn full_house_sheds_only_the_oldest_idle() {
        const MOST: usize = 200;
        let connections = Arc::<Connections>::default();
        let start = Instant::now();
        let states: Vec<_> = (0..MOST).map(|_| Arc::<ConnectionState>::default()).collect();
        let mut open: Vec<_> = states.iter().map(|state| enter(&connections, MOST, state)).collect();
        assert!(!connections.has_room(MOST), "all are busy");
        // From 50 on they are idle, the last one for longest, and all for less than a second.
        for (number, state) in states.iter().enumerate().skip(50) {
            state.idles(start + Duration::from_millis((MOST - number) as u64));
        }
        tokio::time::advance(SCAN_INTERVAL).await;
        assert!(!connections.has_room(MOST), "a request of theirs may be on its way");
        // The first of them became idle at 150 ms.
        tokio::time::advance(MIN_IDLE + Duration::from_millis(150) - SCAN_INTERVAL).await;
        assert!(connections.has_room(MOST));
        // One that was found to be idle, and is busy now.
        let begun = states[MOST - 2].begin();
        for expected in [MOST - 1, MOST - 3, MOST - 4] {
            let state = Arc::default();
            open.push(enter(&connections, MOST, &state));
            let shed: Vec<_> = (0..MOST).filter(|number| is_shed(&states[*number])).collect();
            assert_eq!(shed[0], expected, "{shed:?}");
        }
        drop(begun);
        assert_eq!(connections.open(), MOST + 3, "three are about to end");
        let mut more = 3;
        while connections.has_room(MOST) {
            open.push(enter(&connections, MOST, &Arc::default()));
            more += 1;
        }
        assert_eq!(more, MOST / 16 + 16, "so many may be about to end at a time");
        // They end, and make room for no more than took their places.
        open.drain(50..MOST);
        assert_eq!((connections.open(), connections.leaving.load(Ordering::Relaxed)), (50 + more, 0));
        drop(open);
        assert_eq!(connections.open(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn source_sheds_its_own_oldest_idle() {
        let connections = Arc::<Connections>::default();
        let enter = |address: [u8; 4], state: &Arc<ConnectionState>| {
            connections.enter(address.into(), usize::MAX, NonZeroUsize::new(2), state)
        };
        let [one, two, three, other]: [Arc<ConnectionState>; 4] = Default::default();
        let _open = [enter([192, 0, 2, 1], &one), enter([192, 0, 2, 1], &two), enter([192, 0, 2, 2], &other)];
        other.idles(Instant::now());
        tokio::time::advance(Duration::from_secs(1)).await;
        two.idles(Instant::now());
        assert!(enter([192, 0, 2, 1], &Arc::default()).is_none(), "it has only just become idle");
        tokio::time::advance(MIN_IDLE).await;
        let _third = enter([192, 0, 2, 1], &three).unwrap();
        assert_eq!([&one, &two, &three, &other].map(is_shed), [false, true, false, false]);
        assert!(enter([192, 0, 2, 1], &Arc::default()).is_none(), "both are busy");
    }
}
