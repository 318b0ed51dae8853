//! Anteroom's account of all requests, from its metrics.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;

use serde::Serialize;

use crate::admin;

/// Totals of all routes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct RouteTotals {
    pub(super) admitted: u64,
    pub(super) ended: BTreeMap<String, u64>,
    pub(super) refused: u64,
    pub(super) held: u64,
    pub(super) in_flight: u64,
    pub(super) buffered_bytes: u64,
}

// === impl RouteTotals ===

impl RouteTotals {
    pub(super) fn of(admin: SocketAddr) -> io::Result<Self> {
        match admin::get(admin, "/metrics")? {
            (200, text) => Ok(Self::read(&text)),
            (status, _) => Err(io::Error::other(format!("GET /metrics returned {status}"))),
        }
    }

    fn read(text: &str) -> Self {
        let mut account = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<u64>() else { continue };
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            match name {
                "anteroom_admitted_requests_total" => account.admitted += value,
                "anteroom_requests_total" => {
                    let outcome = labels.split_once("outcome=\"").and_then(|(_, rest)| rest.split_once('"'));
                    let outcome = outcome.map_or("", |(outcome, _)| outcome);
                    *account.ended.entry(outcome.to_owned()).or_default() += value;
                }
                "anteroom_refused_requests_total" => account.refused += value,
                "anteroom_held_requests" => account.held += value,
                "anteroom_in_flight_requests" => account.in_flight += value,
                "anteroom_buffered_bytes" => account.buffered_bytes += value,
                _ => {}
            }
        }
        account
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.held == 0 && self.in_flight == 0 && self.buffered_bytes == 0
    }

    pub(super) fn all_ended(&self) -> u64 {
        self.ended.values().sum()
    }

    /// Returns the number of discrepancies at rest: among requests sent, admitted, answered, rejected, and abandoned
    /// by their client.
    pub(super) fn count_discrepancies(&self, sent: u64, answered: u64, full: u64, left: u64) -> u64 {
        let of = |outcome: &str| self.ended.get(outcome).copied().unwrap_or_default();
        let (completed, gone) = (of("completed"), of("client_gone"));
        self.admitted.abs_diff(self.all_ended())
            + sent.abs_diff(self.admitted + self.refused)
            + full.abs_diff(self.refused)
            // A client may disconnect after the response has been sent.
            + answered.saturating_sub(completed)
            + gone.saturating_sub(left)
            + self.all_ended().abs_diff(completed + gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = "\
# TYPE anteroom_requests counter
anteroom_requests_total{route=\"soak\",outcome=\"completed\",code=\"200\",cold_start=\"false\"} 7
anteroom_requests_total{route=\"soak\",outcome=\"completed\",code=\"200\",cold_start=\"true\"} 2
anteroom_requests_total{route=\"soak\",outcome=\"client_gone\",code=\"other\",cold_start=\"true\"} 1
anteroom_refused_requests_total{route=\"soak\",reason=\"hold_queue_full\"} 3
anteroom_admitted_requests_total{route=\"soak\"} 10
anteroom_held_requests{route=\"soak\"} 0
anteroom_in_flight_requests{route=\"soak\"} 0
anteroom_cold_start_duration_seconds_sum{route=\"soak\"} 1.5
anteroom_buffered_bytes 0
# EOF
";

    #[test]
    fn account_balances_or_reports_the_difference() {
        let account = RouteTotals::read(METRICS);
        assert!(account.is_quiet());
        assert_eq!((account.admitted, account.all_ended(), account.refused), (10, 10, 3));
        assert_eq!(account.count_discrepancies(13, 9, 3, 1), 0);
        assert_eq!(account.count_discrepancies(13, 8, 3, 2), 0, "one left when the answer had been sent");
        assert_eq!(account.count_discrepancies(14, 9, 3, 1), 1, "one that was sent was never seen");
        assert_eq!(
            account.count_discrepancies(13, 10, 3, 0),
            2,
            "one got an answer and is said to have left"
        );
        let lost = RouteTotals { admitted: 11, ..account };
        assert_eq!(lost.count_discrepancies(14, 9, 3, 1), 1, "one that was admitted never ended");
        assert!(!RouteTotals { held: 1, ..lost }.is_quiet());
    }
}
