//! Choice of the endpoint for the next request. Pure: no clocks, no I/O.

/// Load of an endpoint.
pub trait Load {
    /// Returns the number of requests in flight; `None` if the endpoint has no room.
    fn in_flight_if_room(&self) -> Option<u32>;
}

/// Picks the less loaded of two endpoints with room: the first ones from two random indices, the halves of `random`.
///
/// Two random choices keep independent proxies from all choosing the same new endpoint (Mitzenmacher, "The Power of Two
/// Choices", 2001).
pub fn pick<E: Load>(endpoints: &[E], random: u64) -> Option<&E> {
    if let [only] = endpoints {
        return only.in_flight_if_room().map(|_| only);
    }
    let first = first_with_room(endpoints, random as u32 as usize)?;
    let second = first_with_room(endpoints, (random >> 32) as usize)?;
    Some(if first.1 <= second.1 { first.0 } else { second.0 })
}

fn first_with_room<E: Load>(endpoints: &[E], place: usize) -> Option<(&E, u32)> {
    let (before, from) = endpoints.split_at(place % endpoints.len().max(1));
    from.iter()
        .chain(before)
        .find_map(|endpoint| endpoint.in_flight_if_room().map(|in_flight| (endpoint, in_flight)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Fixed(u32, Option<u32>);

    impl Load for Fixed {
        fn in_flight_if_room(&self) -> Option<u32> {
            self.1
        }
    }

    proptest! {
        #[test]
        fn endpoint_with_room_is_found(loads: Vec<Option<u32>>, random: u64) {
            let endpoints: Vec<_> = loads.iter().zip(0..).map(|(load, id)| Fixed(id, *load)).collect();
            let picked = pick(&endpoints, random);
            prop_assert_eq!(picked.is_some(), loads.iter().any(Option::is_some));
            prop_assert!(picked.is_none_or(|endpoint| endpoints[endpoint.0 as usize].1 == endpoint.1));
            prop_assert!(picked.is_none_or(|endpoint| endpoint.1.is_some()));
        }

        #[test]
        fn less_loaded_of_two_is_picked(a in 0..100_u32, b in 0..100_u32) {
            let endpoints = [Fixed(0, Some(a)), Fixed(1, Some(b))];
            let picked = pick(&endpoints, 1 << 32).map(|endpoint| endpoint.1.unwrap_or(u32::MAX));
            prop_assert_eq!(picked, Some(a.min(b)));
        }
    }
}
