//! The law of conservation, checked on the admin listener of a running proxy.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use crate::support::{Wire, wire::WireResponse};

/// Counts of a proxy, over all routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyCounts {
    pub admitted: u64,
    pub held: u64,
    pub in_flight: u64,
    pub held_bytes: u64,
    pub buffered_bytes: u64,
    /// Admitted requests by outcome.
    pub outcomes: BTreeMap<String, u64>,
    /// Requests that were not admitted, by reason.
    pub refused: BTreeMap<String, u64>,
}

/// Far above the duration of any test here, even on a busy machine; only a defect exceeds it.
const FAULT_TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends a GET to the admin listener.
pub async fn ask(admin: SocketAddr, path: &str) -> WireResponse {
    let request = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
    Wire::connect(admin).await.ask(request).await
}

/// Reads the current counts. They are not an atomic snapshot while requests are moving.
pub async fn counts(admin: SocketAddr) -> ProxyCounts {
    let mut counts = ProxyCounts::default();
    for line in ask(admin, "/metrics").await.text().lines() {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let name = series.split('{').next().unwrap_or_default();
        let number = || value.parse::<u64>().unwrap();
        let label = |key: &str| {
            let after = series.split_once(&format!("{key}=\"")).unwrap().1;
            after.split('"').next().unwrap().to_owned()
        };
        match name {
            "anteroom_admitted_requests_total" => counts.admitted += number(),
            "anteroom_held_requests" => counts.held += number(),
            "anteroom_in_flight_requests" => counts.in_flight += number(),
            "anteroom_held_bytes" => counts.held_bytes += number(),
            "anteroom_buffered_bytes" => counts.buffered_bytes += number(),
            "anteroom_requests_total" => *counts.outcomes.entry(label("outcome")).or_default() += number(),
            "anteroom_refused_requests_total" => {
                *counts.refused.entry(label("reason")).or_default() += number();
            }
            _ => {}
        }
    }
    counts
}

/// Waits until no request is left, then checks that admissions equal outcomes and no bytes are buffered.
pub async fn holds(admin: SocketAddr) -> ProxyCounts {
    let mut last = ProxyCounts::default();
    let settled = async {
        loop {
            last = counts(admin).await;
            if last.is_over() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let in_time = tokio::time::timeout(FAULT_TEST_TIMEOUT, settled).await;
    assert!(in_time.is_ok(), "something is left, or lost: {last:?}");
    last
}

// === impl ProxyCounts ===

impl ProxyCounts {
    /// Returns true if no request is held or in flight, no bytes are buffered, and every admission has an outcome.
    fn is_over(&self) -> bool {
        (self.held, self.in_flight, self.held_bytes, self.buffered_bytes) == (0, 0, 0, 0)
            && self.admitted == self.outcomes.values().sum::<u64>()
    }

    pub fn ended(&self, outcome: &str) -> u64 {
        self.outcomes.get(outcome).copied().unwrap_or_default()
    }

    /// Asserts exactly these outcomes.
    pub fn assert_outcomes(&self, outcomes: &[(&str, u64)]) {
        let expected = outcomes.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
        assert_eq!(self.outcomes, expected, "{self:?}");
    }
}
