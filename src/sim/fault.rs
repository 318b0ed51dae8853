//! Which requests fail, and how: a pure function of the seed and the request's number.

use super::SimArgs;
use http::StatusCode;

/// What is done to one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fate {
    /// It is answered.
    Answer,
    /// Its connection is reset before the response starts.
    ResetBeforeHead,
    /// It is answered with this status.
    Error(StatusCode),
    /// Its connection is reset once this share of the body has been written (0 ≤ share < 1).
    ResetMidBody(f64),
}

/// A generator for one request. Requests share nothing, so their order of execution does not matter.
pub(super) fn rng(seed: u64, sequence: u64) -> fastrand::Rng {
    // The odd constant (2^64 divided by the golden ratio) keeps seed 1, request 2 from being seed 2, request 1.
    fastrand::Rng::with_seed(seed ^ sequence.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

pub(super) fn fate(args: &SimArgs, sequence: u64) -> Fate {
    let mut rng = rng(args.seed, sequence);
    // All are drawn in any case, so that changing one rate moves no other failure.
    let [head, error, body, share] = std::array::from_fn(|_| rng.f64());
    if head < args.reset_before_head {
        Fate::ResetBeforeHead
    } else if error < args.error_rate {
        Fate::Error(args.error_status)
    } else if body < args.reset_mid_stream {
        Fate::ResetMidBody(share)
    } else {
        Fate::Answer
    }
}
