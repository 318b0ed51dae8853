//! Settings of a replay.

/// Settings to replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReplaySettings {
    /// Minimum number of replicas.
    pub floor: u32,
    /// Maximum number of replicas; at least 1 and at least `floor`.
    pub max_replicas: u32,
    /// Time without demand after which all replicas stop, if `floor` is 0.
    pub idle: u64,
    /// Scale to zero happens only at multiples of this (KEDA's polls); 1 for immediately.
    pub poll: u64,
    /// `concurrency.max`: requests in flight per replica.
    pub concurrency: u32,
    /// `hold.maxRequests`.
    pub hold_requests: usize,
    /// `hold.timeout`.
    pub hold: u64,
    /// `scaling.target`.
    pub target: u32,
}
