//! Injected failures, as a pure function of seed and request number.

use super::SimArgs;
use http::StatusCode;

/// Treatment of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum InjectedFault {
    /// Answers normally.
    None,
    /// Resets the connection before the response.
    ResetBeforeHead,
    /// Returns this status.
    Error(StatusCode),
    /// Resets the connection after this share of the body (0 ≤ share < 1).
    ResetMidBody(f64),
}

/// Creates the random number generator of a request, independent of all other requests.
pub(super) fn rng(seed: u64, sequence: u64) -> fastrand::Rng {
    // The constant (2^64 ÷ golden ratio) prevents equal generators for seed 1, request 2 and seed 2, request 1.
    fastrand::Rng::with_seed(seed ^ sequence.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

pub(super) fn for_request(args: &SimArgs, sequence: u64) -> InjectedFault {
    let mut rng = rng(args.seed, sequence);
    // Always draws all values, so that changing one rate does not affect other failures.
    let [head, error, body, share] = std::array::from_fn(|_| rng.f64());
    if head < args.reset_before_head {
        InjectedFault::ResetBeforeHead
    } else if error < args.error_rate {
        InjectedFault::Error(args.error_status)
    } else if body < args.reset_mid_stream {
        InjectedFault::ResetMidBody(share)
    } else {
        InjectedFault::None
    }
}
