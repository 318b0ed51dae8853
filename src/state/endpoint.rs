//! One address of a model server.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    cut::{Cut, SeverableConnections},
    discovery::Protocol,
    front::{Front, FrontKind},
    ramp::{Level, Ramp},
    slots::Slots,
    trial::{Trial, TrialResult},
};
use crate::{domain::Backoff, pick::Load};

/// One address of a model server, ready or not.
pub struct Endpoint {
    pub(super) id: u64,
    /// `host:port`.
    address: Box<str>,
    protocol: Protocol,
    /// State of a gateway; `None` if the endpoint is a single server.
    front: Option<Box<Front>>,
    /// Open while the endpoint is ready. The owner (launcher, prober) is also notified when it is doubted or suspect.
    pub(super) slots: Slots,
    pub(super) ramp: Ramp,
    /// Limit of requests in flight per server.
    pub(super) max: AtomicU32,
    /// Number of servers at this address: 1, but any number for a gateway.
    pub(super) servers: AtomicU32,
    /// Consecutive failed dispatches.
    failures: AtomicU32,
    trial: Trial,
    pub(super) connections: SeverableConnections,
}

// === impl Endpoint ===

impl Endpoint {
    /// Backoff after the first failure.
    pub const BACKOFF: Duration = Duration::from_millis(50);
    const MAX_BACKOFF: Duration = Duration::from_secs(1);

    /// Creates an HTTP/1.1 endpoint that is not ready yet.
    pub fn new(address: impl Into<Box<str>>, max: u32) -> Arc<Self> {
        Self::speaking(Protocol::Http1, address, max)
    }

    /// Creates an endpoint that is or may be a gateway.
    pub fn fronting(kind: FrontKind, address: impl Into<Box<str>>, max: u32) -> Arc<Self> {
        Self::with_front(Protocol::Http1, Some(kind), address, max)
    }

    /// Creates an endpoint with the given protocol.
    pub fn speaking(protocol: Protocol, address: impl Into<Box<str>>, max: u32) -> Arc<Self> {
        Self::with_front(protocol, None, address, max)
    }

    fn with_front(
        protocol: Protocol,
        front: Option<FrontKind>,
        address: impl Into<Box<str>>,
        max: u32,
    ) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            address: address.into(),
            protocol,
            front: front.map(|kind| Box::new(Front::new(kind))),
            slots: Slots::default(),
            ramp: Ramp::new(max),
            max: AtomicU32::new(max),
            servers: AtomicU32::new(1),
            failures: AtomicU32::new(0),
            trial: Trial::default(),
            connections: SeverableConnections::default(),
        })
    }

    /// Creates an endpoint that is always ready and has no owner, such as a fallback Service.
    pub fn unwatched(address: impl Into<Box<str>>) -> Arc<Self> {
        let endpoint = Self::new(address, u32::MAX);
        endpoint.slots.open();
        endpoint
    }

    /// Returns an identifier unique in this process.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// Returns `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns whether the endpoint accepts requests.
    pub fn is_ready(&self) -> bool {
        self.slots.is_open()
    }

    /// Returns the protocol of the endpoint.
    pub const fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Returns the state of a gateway; `None` if the endpoint is a single server.
    pub fn front(&self) -> Option<&Front> {
        self.front.as_deref()
    }

    /// Returns whether every request reaches the same process or pod.
    pub const fn is_single(&self) -> bool {
        self.front.is_none()
    }

    /// Returns the number of requests in flight.
    pub fn in_flight(&self) -> u32 {
        self.slots.in_flight()
    }

    /// Returns the current limit of requests in flight.
    pub fn limit(&self) -> u32 {
        self.ramp.limit()
    }

    /// Returns the number of servers at this address: 1, but any number for a gateway.
    pub fn servers(&self) -> u32 {
        self.servers.load(Ordering::Relaxed)
    }

    /// Returns the limit of requests in flight at the end of the ramp.
    pub(super) fn max_in_flight(&self) -> u32 {
        self.max.load(Ordering::Relaxed).saturating_mul(self.servers.load(Ordering::Relaxed))
    }

    /// Reserves a slot, which must be freed with [`Self::release`]. Returns `false` if there is none.
    pub fn acquire(&self) -> bool {
        self.slots.acquire(|| self.limit())
    }

    /// Frees a slot reserved by [`Self::acquire`].
    pub fn release(&self) {
        self.slots.release();
    }

    /// Returns whether the limit has reached its maximum.
    pub fn is_wide(&self) -> bool {
        self.limit() >= self.max_in_flight()
    }

    /// Returns the number of further requests that the endpoint is about to accept, if a ramp in progress continues.
    pub fn room_soon(&self) -> u32 {
        if self.is_ready() && (self.is_wide() || self.ramp.progresses()) {
            self.max_in_flight().saturating_sub(self.in_flight())
        } else {
            0
        }
    }

    /// Returns the remaining time in which the limit does not grow, after failures at a higher one.
    pub fn ramp_pause(&self) -> Duration {
        self.ramp.pause()
    }

    /// Returns the ramp level of a request that has just acquired its slot.
    pub fn level(&self) -> Level {
        self.ramp.level(self.in_flight())
    }

    /// Records the first byte of a response to a request dispatched at `level`: clears failures and raises the limit to
    /// twice the number of responses. Returns whether the limit grew.
    pub fn succeeded(&self, level: Level) -> bool {
        if self.failures.load(Ordering::Relaxed) > 0 || self.is_doubted() {
            self.failures.store(0, Ordering::Relaxed);
            self.record_recovery();
        }
        self.ramp.answered(level, self.max_in_flight())
    }

    /// Records the failure of a request dispatched at `level`, which may have exceeded the server's capacity. Up to
    /// `start` requests are assumed to be within it.
    pub fn failed_at(&self, level: Level, start: u32) {
        self.ramp.failed(level, start);
    }

    /// Records a failure before the response. The endpoint gets no requests until it responds to its owner's probe, and
    /// then one at first.
    pub fn suspect(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.ramp.restart();
        self.retire();
        self.slots.notify();
    }

    /// Returns the backoff before the owner probes again: zero, or 50 ms doubling to 1 s with each failure.
    pub fn backoff(&self) -> Duration {
        Backoff::new(Self::BACKOFF, Self::MAX_BACKOFF).after(self.failures.load(Ordering::Relaxed))
    }

    /// Stops accepting requests; [`Self::attention`] wakes when the last one in flight has ended.
    pub fn retire(&self) {
        self.slots.close();
        self.trial.settle();
    }

    /// Waits until the owner should check the endpoint: it is doubted or suspect, or its last request ended while it
    /// was not ready.
    pub async fn attention(&self) {
        self.slots.attention().await;
    }

    /// Registers a new connection to the endpoint.
    pub fn connection(&self) -> Arc<Cut> {
        self.connections.add()
    }

    /// Terminates the connections without a response in progress; with `all`, after a grace period, every one. The
    /// endpoint must be retired, and can be reused once it is ready again.
    pub fn sever(&self, all: bool) {
        self.connections.sever(all);
    }

    /// Waits until the connections of the endpoint are severed. Cancel-safe.
    pub async fn severed(&self) {
        self.connections.severed().await;
    }

    /// Returns whether data arrived since the last call.
    pub fn take_data_arrived(&self) -> bool {
        self.connections.take_arrived_flag()
    }

    /// Opens a doubt after the endpoint broke off a request that had been written. Wakes the owner for the first of
    /// several.
    pub fn doubt(&self) {
        if self.trial.open() {
            self.slots.notify();
        }
    }

    /// Returns whether a doubt is open.
    pub fn is_doubted(&self) -> bool {
        self.trial.is_open()
    }

    /// Records that the endpoint responded after a failure. Settles an open doubt.
    pub fn record_recovery(&self) {
        self.trial.answered();
    }

    /// Returns the number of responses after failures. If it changes, the endpoint was alive in between.
    pub fn answers(&self) -> u32 {
        self.trial.answers()
    }

    /// Waits until the number of responses differs from `answers` or the endpoint accepts no requests. Cancel-safe.
    pub async fn verdict(&self, answers: u32) -> TrialResult {
        self.trial.verdict(answers, || self.is_ready()).await
    }
}

impl Load for Arc<Endpoint> {
    /// A doubted endpoint only gets requests for which nothing else has room: see `Gate::acquire`.
    fn in_flight_if_room(&self) -> Option<u32> {
        let in_flight = self.in_flight();
        (in_flight < self.limit() && self.is_ready() && !self.is_doubted()).then_some(in_flight)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("address", &self.address)
            .field("ready", &self.is_ready())
            .field("in_flight", &self.in_flight())
            .field("limit", &self.limit())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_from_50_ms_to_1_s() {
        let endpoint = Endpoint::new("127.0.0.1:1", 64);
        let backoffs = [50, 100, 200, 400, 800, 1000, 1000];
        for expected in backoffs {
            endpoint.suspect();
            assert_eq!(endpoint.backoff().as_millis(), expected);
        }
    }
}
