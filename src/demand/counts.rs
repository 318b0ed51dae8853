//! Counts of a route that a scaler's value is computed from.

/// Demand of a route in one replica, or summed over several.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Requests held.
    pub held: u64,
    /// Held requests that ready endpoints have room for.
    pub held_with_room: u64,
    /// Requests in flight.
    pub in_flight: u64,
    /// True while the lease or the linger keeps demand true.
    pub is_kept_alive: bool,
    /// Activations requested so far. An increase means that a request found no ready endpoint.
    pub activations: u64,
    /// Requests admitted per second.
    pub request_rate: f64,
    /// Requests queued in the model servers, by their own metrics. All replicas scrape the same servers.
    pub server_queue: u64,
    /// True if an endpoint is ready. A replica without requests may not have noticed yet.
    pub ready: bool,
    /// Open streams of KEDA.
    pub streams: u64,
}

// === impl Counts ===

impl Counts {
    /// Returns the sum; of `server_queue` the larger one.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            held: self.held.saturating_add(other.held),
            held_with_room: self.held_with_room.saturating_add(other.held_with_room),
            in_flight: self.in_flight.saturating_add(other.in_flight),
            is_kept_alive: self.is_kept_alive || other.is_kept_alive,
            activations: self.activations.saturating_add(other.activations),
            request_rate: self.request_rate + other.request_rate,
            server_queue: self.server_queue.max(other.server_queue),
            ready: self.ready || other.ready,
            streams: self.streams.saturating_add(other.streams),
        }
    }

    /// Returns true if the target must not scale to zero.
    pub const fn is_active(&self) -> bool {
        self.held > 0 || self.in_flight > 0 || self.is_kept_alive || self.waiting_in_servers() > 0
    }

    /// Returns the requests queued in the servers; 0 without a ready endpoint, as the last scrape is stale then.
    pub const fn waiting_in_servers(&self) -> u64 {
        if self.ready { self.server_queue } else { 0 }
    }
}
