//! Account of all requests of a run.

use crate::{admission::Gate, error::Outcome};

/// Account of a run: every admitted request has one outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Admitted requests.
    pub admitted: u64,
    /// Requests by outcome.
    pub outcomes: Vec<(&'static str, u64)>,
    /// Requests still held.
    pub held: u64,
    /// Requests still in flight.
    pub in_flight: u64,
}

// === impl Account ===

impl Account {
    pub(super) fn empty() -> Self {
        Self {
            admitted: 0,
            outcomes: Outcome::ALL.map(|outcome| (outcome.name(), 0)).into(),
            held: 0,
            in_flight: 0,
        }
    }

    /// Returns whether every admitted request is accounted for.
    pub fn balances(&self) -> bool {
        self.admitted
            == self.outcomes.iter().map(|(_, count)| count).sum::<u64>() + self.held + self.in_flight
    }

    /// Returns the number of requests with this outcome.
    pub fn ended_as(&self, outcome: Outcome) -> u64 {
        self.outcomes[outcome as usize].1
    }

    pub(super) fn add(&mut self, gate: &Gate) {
        let counters = gate.counters();
        self.admitted += counters.admitted();
        for (outcome, (_, count)) in Outcome::ALL.into_iter().zip(&mut self.outcomes) {
            *count += counters.ended_as(outcome);
        }
        self.held += gate.held() as u64;
        self.in_flight += gate.in_flight();
    }
}
