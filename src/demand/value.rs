//! Values of the scaler's metrics: pure arithmetic over counts.

use super::Counts;
use crate::domain::{Counting, Policy, RequestRate, Scaling};

/// Capacity of one replica of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Value per replica, and the way requests are counted.
    pub scaling: Scaling,
    /// Requests in flight from one replica of this proxy.
    pub concurrency: u32,
}

// === impl Capacity ===

impl From<&Policy> for Capacity {
    fn from(policy: &Policy) -> Self {
        Self { scaling: policy.scaling, concurrency: policy.concurrency.max }
    }
}

/// Computes the queue depth: the requests that wait, plus those in flight scaled so that a full replica counts as one
/// `target`. Held requests that the ramp of a ready endpoint will admit count as in flight there.
///
/// Zero exactly when demand is false. Without a ready endpoint, at most `target` × `activation_replicas`.
pub fn queue_depth(counts: &Counts, Capacity { scaling, concurrency }: Capacity) -> f64 {
    let waiting = |held: u64| to_float(held.max(counts.waiting_in_servers()));
    let value = match scaling.counting {
        Counting::Queue => {
            let soon = counts.held_with_room.min(counts.held);
            let full = to_float(counts.in_flight.saturating_add(soon)) / f64::from(concurrency.max(1));
            waiting(counts.held - soon) + full * f64::from(scaling.target)
        }
        Counting::Concurrency => waiting(counts.held) + to_float(counts.in_flight),
    };
    let value = if counts.is_kept_alive { value.max(1.0) } else { value };
    clamp(value, scaling.target, &scaling, counts.ready)
}

/// Computes the request rate, clamped like the queue depth.
pub fn request_rate(counts: &Counts, rate: RequestRate, scaling: &Scaling) -> f64 {
    clamp(counts.request_rate, rate.target, scaling, counts.ready)
}

/// Limits the value until an endpoint is ready: before that, the backlog does not show how many replicas are needed.
fn clamp(value: f64, target: u32, scaling: &Scaling, ready: bool) -> f64 {
    if ready { value } else { value.min(f64::from(target) * f64::from(scaling.activation_replicas)) }
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 requests")]
fn to_float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const READY: Counts = Counts {
        held: 0,
        held_with_room: 0,
        in_flight: 0,
        is_kept_alive: true,
        activations: 0,
        request_rate: 0.0,
        server_queue: 0,
        ready: true,
        streams: 0,
    };

    fn capacity(target: u32, concurrency: u32, activation_replicas: u32) -> Capacity {
        Capacity { scaling: Scaling { target, activation_replicas, ..Scaling::default() }, concurrency }
    }

    /// Replicas that the HPA computes from the value.
    fn replicas(value: f64, target: u32) -> f64 {
        (value / f64::from(target)).ceil()
    }

    #[test]
    fn full_replica_and_target_waiting_need_two() {
        let capacity = capacity(5, 64, 1);
        for (held, in_flight, value, wanted) in [
            (0, 64, 5.0, 1.0), // 64 × 5 ÷ 64
            (5, 64, 10.0, 2.0),
            (0, 32, 2.5, 1.0),
            (0, 128, 10.0, 2.0),
            (6, 64, 11.0, 3.0),
            (0, 0, 1.0, 1.0), // kept alive
        ] {
            let depth = queue_depth(&Counts { held, in_flight, ..READY }, capacity);
            assert_eq!((depth, replicas(depth, 5)), (value, wanted), "{held} held, {in_flight} in flight");
        }
    }

    #[test]
    fn requests_held_by_ramp_need_no_replica() {
        let capacity = capacity(5, 64, 1);
        for (held, soon, in_flight, value, wanted) in [
            (44, 44, 4, 3.75, 1.0),   // (4 + 44) × 5 ÷ 64; not 44 + 4 × 5 ÷ 64, which is 9 replicas
            (100, 60, 4, 45.0, 9.0),  // 40 without room, and a full replica
            (44, 0, 4, 44.3125, 9.0), // the ramp is stuck
        ] {
            let depth = queue_depth(&Counts { held, held_with_room: soon, in_flight, ..READY }, capacity);
            assert_eq!((depth, replicas(depth, 5)), (value, wanted), "{held} held, {soon} soon");
        }
    }

    #[test]
    fn server_queue_counts_only_with_a_ready_endpoint() {
        let counts = Counts { held: 3, server_queue: 12, in_flight: 64, ..READY };
        assert_eq!(queue_depth(&counts, capacity(5, 64, 1)), 17.0, "12 + 64 × 5 ÷ 64");
        let counts = Counts { held: 20, ..counts };
        assert_eq!(queue_depth(&counts, capacity(5, 64, 1)), 25.0, "20 + 5");
        let gone = Counts { server_queue: 12, ..Counts::default() };
        assert_eq!((queue_depth(&gone, capacity(5, 64, 1)), gone.is_active()), (0.0, false));
    }

    #[test]
    fn backlog_at_zero_is_clamped_to_the_activation() {
        let cold = Counts { held: 100, request_rate: 50.0, ready: false, ..READY };
        assert_eq!(queue_depth(&cold, capacity(5, 64, 1)), 5.0, "not 100, which is 20 replicas");
        assert_eq!(queue_depth(&cold, capacity(5, 64, 2)), 10.0, "5 × 2");
        assert_eq!(queue_depth(&Counts { ready: true, ..cold }, capacity(5, 64, 1)), 100.0);
        let rate = RequestRate { target: 4, window: crate::domain::Period::from_secs(60) };
        let scaling = capacity(5, 64, 2).scaling;
        assert_eq!(request_rate(&cold, rate, &scaling), 8.0, "4 × 2");
        assert_eq!(request_rate(&Counts { ready: true, ..cold }, rate, &scaling), 50.0);
    }

    #[test]
    fn concurrency_counts_each_request_once() {
        let mut capacity = capacity(100, 1, 1);
        capacity.scaling.counting = Counting::Concurrency;
        let counts = Counts { held: 7, in_flight: 35, ..READY };
        assert_eq!(queue_depth(&counts, capacity), 42.0, "7 + 35");
        assert_eq!(
            queue_depth(&Counts { held_with_room: 7, ..counts }, capacity),
            42.0,
            "room is irrelevant"
        );
    }

    prop_compose! {
        fn counts()(
            held in 0..10_000_u64,
            room in 0..10_000_u64,
            in_flight in 0..10_000_u64,
            kept_alive: bool,
            server_queue in 0..100_u64,
            ready: bool,
        ) -> Counts {
            Counts { held, held_with_room: room.min(held), in_flight, is_kept_alive: kept_alive, server_queue, ready, ..Counts::default() }
        }
    }

    prop_compose! {
        fn capacities()(
            target in 1..1000_u32,
            concurrency in 1..1000_u32,
            activation_replicas in 1..10_u32,
            all: bool,
        ) -> Capacity {
            let mut capacity = capacity(target, concurrency, activation_replicas);
            capacity.scaling.counting = if all { Counting::Concurrency } else { Counting::Queue };
            capacity
        }
    }

    proptest! {
        #[test]
        fn queue_depth_is_zero_iff_demand_is_false(counts in counts(), capacity in capacities()) {
            prop_assert_eq!(queue_depth(&counts, capacity) > 0.0, counts.is_active());
        }

        #[test]
        fn queue_depth_at_zero_never_exceeds_activation(
            counts in counts(),
            capacity in capacities(),
        ) {
            let cold = Counts { ready: false, ..counts };
            let wanted = replicas(queue_depth(&cold, capacity), capacity.scaling.target);
            prop_assert!(wanted <= f64::from(capacity.scaling.activation_replicas));
            prop_assert_eq!(wanted >= 1.0, cold.is_active());
        }

        #[test]
        fn queue_depth_is_monotonic(
            one in counts(),
            other in counts(),
            capacity in capacities(),
        ) {
            let both = one.plus(other);
            prop_assert_eq!(both, other.plus(one));
            // Holds even if only `other` has a ready endpoint, which lifts the clamp.
            let (more, less) = (queue_depth(&both, capacity), queue_depth(&one, capacity));
            prop_assert!(more >= less);
        }
    }
}
