//! What is counted for a scaler, here or in all replicas.

/// The demand of a route, in one replica or in several together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Requests held.
    pub held: u64,
    /// Of those, requests that ready endpoints will soon take.
    pub soon: u64,
    /// Requests in flight.
    pub in_flight: u64,
    /// Whether a lease or the linger keeps demand true.
    pub lasting: bool,
    /// Activations that were asked for up to now: when it rises, a target is wanted that is not there.
    pub activations: u64,
    /// Requests admitted per second.
    pub request_rate: f64,
    /// Requests that wait in the model servers, by their own metrics. Every replica that looks sees the same ones.
    pub server_queue: u64,
    /// Whether an endpoint takes requests. A replica that had no request for a while may not know.
    pub ready: bool,
    /// Streams that a scaler has open.
    pub streams: u64,
}

// === impl Counts ===

impl Counts {
    /// Of both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            held: self.held.saturating_add(other.held),
            soon: self.soon.saturating_add(other.soon),
            in_flight: self.in_flight.saturating_add(other.in_flight),
            lasting: self.lasting || other.lasting,
            activations: self.activations.saturating_add(other.activations),
            request_rate: self.request_rate + other.request_rate,
            server_queue: self.server_queue.max(other.server_queue),
            ready: self.ready || other.ready,
            streams: self.streams.saturating_add(other.streams),
        }
    }

    /// Whether demand is true.
    pub const fn is_active(&self) -> bool {
        self.held > 0 || self.in_flight > 0 || self.lasting || self.waiting_in_servers() > 0
    }

    /// What waits in servers. Without a ready one that is a memory, and must wake nothing.
    pub const fn waiting_in_servers(&self) -> u64 {
        if self.ready { self.server_queue } else { 0 }
    }
}
