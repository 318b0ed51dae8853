//! Places of connections and streams: bounded in number, and shared fairly between sources, so that no source can shut
//! others out.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Origin of connections: all addresses that one client can have are one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source(IpAddr);

/// A bounded set of places. If all places are taken, or as many as one source may have, a newcomer evicts a member and
/// takes its place.
pub struct Places {
    max: usize,
    max_per_source: usize,
    taken: Mutex<PlacesState>,
}

/// A place, held until dropped or evicted.
pub struct Place {
    places: Arc<Places>,
    source: Source,
    number: u64,
    evicted: CancellationToken,
    uses: Arc<AtomicUsize>,
}

/// Marks a connection as in use, until dropped. Of a source's connections, those not in use are evicted first.
pub struct InUseGuard(Arc<AtomicUsize>);

#[derive(Default)]
struct PlacesState {
    next: u64,
    count: usize,
    /// Members by number, so that the oldest comes first. Holds no source without a member.
    by_source: HashMap<Source, BTreeMap<u64, SourceMember>>,
    /// Evicted streams that still exist, by number, so that the oldest comes first.
    leaving: BTreeMap<u64, Leaving>,
    max_leaving: usize,
}

struct SourceMember {
    evicted: CancellationToken,
    uses: Arc<AtomicUsize>,
    connection: Option<CancellationToken>,
}

/// An evicted stream that has not ended.
struct Leaving {
    since: Instant,
    connection: CancellationToken,
}

/// Time for an evicted stream to end before its connection is closed: a stream with a flow-control window of 0 is not
/// polled, and so does not notice its eviction.
const LEAVING_GRACE: Duration = Duration::from_secs(1);

/// Returns the number of evicted streams that may still exist beside this many places. Beyond it, connections are
/// closed without the grace.
pub const fn max_leaving_streams(places: usize) -> usize {
    if places > 8 { places / 8 } else { 1 }
}

// === impl Source ===

impl Source {
    /// Returns the source of an address. IPv6 addresses with the same 64-bit prefix are one source (RFC 4291, section
    /// 2.5.4).
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(address) => {
                Self(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into())
            }
            address => Self(address),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Default for Source {
    /// Returns the source of connections without an address, such as those in memory.
    fn default() -> Self {
        Self(Ipv4Addr::UNSPECIFIED.into())
    }
}

// === impl Places ===

impl Places {
    /// Creates `max` places, of which one source may have `max_per_source`.
    pub fn new(max: usize, max_per_source: usize) -> Arc<Self> {
        let taken = PlacesState { max_leaving: max_leaving_streams(max), ..PlacesState::default() };
        Arc::new(Self { max, max_per_source, taken: Mutex::new(taken) })
    }

    /// Takes a place. If none is left, evicts a member of the source with most places; if the newcomer's source is at
    /// its limit, a member of that one: the oldest not in use, or else the oldest. `evicted` is cancelled when this
    /// place is evicted in turn.
    pub fn enter(self: &Arc<Self>, source: Source, evicted: CancellationToken) -> Place {
        let mut taken = self.taken.lock();
        if taken.of(source) >= self.max_per_source {
            taken.evict(source);
        } else if taken.count >= self.max
            && let Some((largest, _)) = taken.largest()
        {
            taken.evict(largest);
        }
        self.add(&mut taken, source, evicted)
    }

    /// Takes a place. Returns `None` if the source is at its limit, or if all places are taken and no source has more
    /// of them than this one would then have: long-lived streams are not evicted for a newcomer of the same source.
    pub fn try_enter(self: &Arc<Self>, source: Source, evicted: CancellationToken) -> Option<Place> {
        let mut taken = self.taken.lock();
        let own = taken.of(source);
        if own >= self.max_per_source {
            return None;
        }
        if taken.count >= self.max {
            let (largest, _) = taken.largest().filter(|(_, most)| *most > own + 1)?;
            taken.evict(largest);
        }
        Some(self.add(&mut taken, source, evicted))
    }

    /// Evicts a member of the source with most places, as [`Self::enter`] does.
    pub fn evict(&self) {
        let mut taken = self.taken.lock();
        if let Some((largest, _)) = taken.largest() {
            taken.evict(largest);
        }
    }

    fn add(self: &Arc<Self>, taken: &mut PlacesState, source: Source, evicted: CancellationToken) -> Place {
        let number = taken.next;
        let uses = Arc::<AtomicUsize>::default();
        taken.next += 1;
        taken.count += 1;
        let member = SourceMember { evicted: evicted.clone(), uses: uses.clone(), connection: None };
        taken.by_source.entry(source).or_default().insert(number, member);
        Place { places: self.clone(), source, number, evicted, uses }
    }
}

// === impl PlacesState ===

impl PlacesState {
    fn of(&self, source: Source) -> usize {
        self.by_source.get(&source).map_or(0, BTreeMap::len)
    }

    /// Returns the source with most places, and their number; of several, the one with the oldest unused member. Scans
    /// all sources.
    fn largest(&self) -> Option<(Source, usize)> {
        let rank = |members: &BTreeMap<u64, SourceMember>| {
            let unused = members.iter().find(|(_, member)| !member.is_in_use()).map(|(number, _)| *number);
            (members.len(), unused.is_some(), Reverse(unused))
        };
        let largest = self.by_source.iter().max_by_key(|(_, members)| rank(members))?;
        Some((*largest.0, largest.1.len()))
    }

    fn evict(&mut self, source: Source) {
        let Some(members) = self.by_source.get(&source) else { return };
        let unused = members.iter().find(|(_, member)| !member.is_in_use());
        let Some((&number, member)) = unused.or_else(|| members.first_key_value()) else { return };
        member.evicted.cancel();
        if let Some(connection) = member.connection.clone() {
            self.leaving.insert(number, Leaving { since: Instant::now(), connection });
        }
        self.remove(source, number);
        self.close_stuck_connections();
    }

    /// Closes the connections of evicted streams that do not end.
    fn close_stuck_connections(&mut self) {
        let max = self.max_leaving;
        while let Some((_, oldest)) = self.leaving.first_key_value()
            && (self.leaving.len() > max || oldest.since.elapsed() >= LEAVING_GRACE)
        {
            oldest.connection.cancel();
            self.leaving.pop_first();
        }
    }

    fn remove(&mut self, source: Source, number: u64) {
        let Some(members) = self.by_source.get_mut(&source) else { return };
        // Absent if evicted.
        self.count -= usize::from(members.remove(&number).is_some());
        if members.is_empty() {
            self.by_source.remove(&source);
        }
    }
}

// === impl SourceMember ===

impl SourceMember {
    fn is_in_use(&self) -> bool {
        self.uses.load(Ordering::Relaxed) > 0
    }
}

// === impl Place ===

impl Place {
    /// Returns the token that eviction cancels.
    pub const fn evicted(&self) -> &CancellationToken {
        &self.evicted
    }

    /// Returns the counter of uses, for [`InUseGuard::new`].
    pub const fn uses(&self) -> &Arc<AtomicUsize> {
        &self.uses
    }

    /// Makes this the place of a stream. If the stream is evicted and does not end, `connection` is cancelled, which
    /// closes it.
    pub fn on_connection(&self, connection: &CancellationToken) {
        let mut taken = self.places.taken.lock();
        let member = taken.by_source.get_mut(&self.source).and_then(|members| members.get_mut(&self.number));
        if let Some(member) = member {
            member.connection = Some(connection.clone());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        taken.remove(self.source, self.number);
        taken.leaving.remove(&self.number);
    }
}

// === impl InUseGuard ===

impl InUseGuard {
    /// Counts one more use.
    pub fn new(uses: Arc<AtomicUsize>) -> Self {
        uses.fetch_add(1, Ordering::Relaxed);
        Self(uses)
    }
}

impl Drop for InUseGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(number: u8) -> Source {
        Source::of([192, 0, 2, number].into())
    }

    fn enter(places: &Arc<Places>, number: u8) -> Place {
        places.enter(source(number), CancellationToken::new())
    }

    fn evicted(places: &[Place]) -> Vec<usize> {
        let evicted = places.iter().enumerate().filter(|(_, place)| place.evicted().is_cancelled());
        evicted.map(|(number, _)| number).collect()
    }

    #[test]
    fn source_above_its_limit_evicts_its_own_places() {
        let places = Places::new(8, 2);
        let other = enter(&places, 1);
        let open: Vec<_> = (0..5).map(|_| enter(&places, 2)).collect();
        assert_eq!(evicted(&open), [0, 1, 2], "the oldest");
        assert!(!other.evicted().is_cancelled());
        drop((open, other));
        let taken = places.taken.lock();
        assert_eq!((taken.count, taken.by_source.len()), (0, 0), "nothing is kept of who has gone");
    }

    #[test]
    fn newcomer_evicts_from_the_largest_source() {
        let places = Places::new(6, 4);
        let keda = enter(&places, 1);
        let open: Vec<_> = (0..4).map(|_| enter(&places, 2)).collect();
        let third = enter(&places, 3);
        let _fourth = enter(&places, 4);
        assert_eq!(evicted(&open), [0]);
        assert!(!keda.evicted().is_cancelled() && !third.evicted().is_cancelled());
    }

    #[test]
    fn places_in_use_are_evicted_last() {
        let places = Places::new(3, 3);
        let open: Vec<_> = (0..3).map(|number| enter(&places, number)).collect();
        let used = InUseGuard::new(open[0].uses().clone());
        let _one = enter(&places, 9);
        assert_eq!(evicted(&open), [1], "the oldest that is not in use");
        drop(used);
        let _two = enter(&places, 10);
        assert_eq!(evicted(&open), [0, 1]);
    }

    #[test]
    fn full_streams_are_evicted_for_smaller_sources_only() {
        let places = Places::new(4, 4);
        let try_enter = |number| places.try_enter(source(number), CancellationToken::new());
        let mut open: Vec<_> = (0..4).map(|_| try_enter(1).unwrap()).collect();
        assert!(try_enter(1).is_none(), "its own stay");
        let two: Vec<_> = (0..2).map(|_| try_enter(2).unwrap()).collect();
        assert_eq!(evicted(&open), [0, 1]);
        assert!(try_enter(2).is_none(), "both have as many");
        open.truncate(0);
        assert!(try_enter(2).is_some());
        assert!(evicted(&two).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn stuck_evicted_stream_closes_its_connection() {
        let places = Places::new(2, 2);
        let connections = [(); 3].map(|()| CancellationToken::new());
        let open = connections.each_ref().map(|connection| {
            let place = enter(&places, 1);
            place.on_connection(connection);
            place
        });
        let closed = || connections.each_ref().map(CancellationToken::is_cancelled);
        assert_eq!((evicted(&open), closed()), (vec![0], [false; 3]));
        tokio::time::advance(LEAVING_GRACE).await;
        let fourth = enter(&places, 1);
        assert_eq!((evicted(&open), closed()), (vec![0, 1], [true, false, false]));
        // The second stream ends in time.
        drop(open);
        tokio::time::advance(LEAVING_GRACE).await;
        let _more = [(); 3].map(|()| enter(&places, 1));
        assert_eq!(closed(), [true, false, false]);
        drop(fourth);
        assert!(places.taken.lock().leaving.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn stuck_evicted_streams_are_bounded() {
        let places = Places::new(16, 16);
        let connection = CancellationToken::new();
        let enter = || {
            let place = enter(&places, 1);
            place.on_connection(&connection);
            place
        };
        let _open: Vec<_> = (0..18).map(|_| enter()).collect();
        assert!(!connection.is_cancelled(), "16 / 8 = 2 may be leaving");
        let _one_more = enter();
        assert!(connection.is_cancelled(), "within the grace");
        assert_eq!(places.taken.lock().leaving.len(), 2);
    }

    #[test]
    fn addresses_of_one_client_are_one_source() {
        let of = |address: &str| Source::of(address.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), source(1), "as a socket for both families sees it");
    }
}
