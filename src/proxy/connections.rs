//! How many clients are connected, in all and from one source.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::{IpAddr, Ipv6Addr},
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;

/// The connections of all threads.
#[derive(Debug, Default)]
pub struct Connections {
    open: AtomicUsize,
    /// Of the sources that were looked at, those with a connection. Empty while there is no limit to them.
    sources: Mutex<HashMap<Source, usize>>,
}

/// One connection, until this is dropped.
#[derive(Debug)]
pub struct Connected {
    connections: Arc<Connections>,
    source: Option<Source>,
}

/// Where connections come from: what one client can have many addresses in is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source(IpAddr);

// === impl Connections ===

impl Connections {
    /// How many there are.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Another one. `None` if there are `most` from its source already.
    pub fn enter(self: &Arc<Self>, address: IpAddr, most: Option<NonZeroUsize>) -> Option<Connected> {
        let source = match most {
            None => None,
            Some(most) => {
                let source = Source::of(address);
                let mut sources = self.sources.lock();
                let count = sources.entry(source).or_default();
                if *count >= most.get() {
                    return None;
                }
                *count += 1;
                Some(source)
            }
        };
        self.open.fetch_add(1, Ordering::Relaxed);
        Some(Connected { connections: self.clone(), source })
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.connections.open.fetch_sub(1, Ordering::Relaxed);
        let Some(source) = self.source else { return };
        if let Entry::Occupied(mut count) = self.connections.sources.lock().entry(source) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

// === impl Source ===

impl Source {
    /// Whoever has an IPv6 address has the 64 bits behind its prefix as well (RFC 4291, section 2.5.4).
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(address) => {
                Self(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into())
            }
            address => Self(address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_has_its_own_limit_and_gets_places_back() {
        let connections = Arc::<Connections>::default();
        let two = NonZeroUsize::new(2);
        let enter = |address: &str| connections.enter(address.parse().unwrap(), two);
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
        let open: Vec<_> =
            (0..100).map(|_| connections.enter([192, 0, 2, 1].into(), None).unwrap()).collect();
        assert_eq!((connections.open(), connections.sources.lock().len()), (100, 0));
        drop(open);
        assert_eq!(connections.open(), 0);
    }
}
