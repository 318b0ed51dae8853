//! Retry policy of one request: counts failed dispatches and decides if another may follow.

use std::time::Duration;

use crate::{domain::Backoff, state::Endpoint, upstream::Reuse};

/// Counts the failed dispatches of a request.
///
/// - A dispatch that wrote nothing (connection refused, connect timeout, gateway without an endpoint) is free and retried
///   until the deadline. So is a stale pooled connection, which [`crate::upstream`] replaces itself.
/// - A reset after the request was written costs one of [`MAX_RESETS`], but only once for each process or pod, however
///   often the request is written to a dying one.
/// - A write to a pod that the cluster has removed costs no reset.
/// - If the endpoint has answered a probe or another request since it reset this one, the request is probably at fault:
///   the next reset costs again. Resets by a gateway or url always cost, as different servers may be behind them.
/// - [`MAX_WRITES`] bounds all writes.
#[derive(Debug, Default)]
pub(super) struct RetryBudget {
    /// Write at most once: repeating the request may have side effects.
    is_once: bool,
    /// Boxed because it is rare and held requests would reserve space.
    failures: Option<Box<Failures>>,
}

#[derive(Debug)]
struct Failures {
    dispatches: u32,
    writes: u8,
    resets: u8,
    /// Endpoint of the last reset, and its count of recoveries at that time.
    reset_by: Option<(u64, u32)>,
    /// The last endpoint answered others between two resets.
    is_at_fault: bool,
    last_error: String,
}

/// Processes or pods that may reset a request; the last one is final.
const MAX_RESETS: u8 = 2;

/// Writes of one request, over all endpoints.
const MAX_WRITES: u8 = 4;

/// Backoff between two writes.
const RETRY_BACKOFF: Backoff = Backoff::new(Endpoint::BACKOFF, Duration::from_secs(1));

// === impl RetryBudget ===

impl RetryBudget {
    /// Creates the budget of a request that has not been sent.
    pub(super) const fn new(is_once: bool) -> Self {
        Self { is_once, failures: None }
    }

    /// Returns the kind of connection that the next dispatch may use.
    pub(super) const fn connection_reuse(&self) -> Reuse {
        match &self.failures {
            _ if self.is_once => Reuse::Once,
            Some(_) => Reuse::Never,
            None => Reuse::Pooled,
        }
    }

    /// Records a dispatch that wrote nothing. A retry is always allowed.
    pub(super) fn record_unsent(&mut self, reason: &str) {
        self.record(reason);
    }

    /// Records a reset after the request was written. Returns `true` if a retry is allowed.
    pub(super) fn record_reset(&mut self, endpoint: &Endpoint, reason: &str) -> bool {
        let is_once = self.is_once;
        let failed = self.record(reason);
        failed.writes += 1;
        let answers = endpoint.answers();
        let before = failed.reset_by.replace((endpoint.id(), answers));
        failed.is_at_fault = before.is_some_and(|before| before.0 == endpoint.id() && before.1 != answers);
        let is_same_failure = before.is_some_and(|before| before == (endpoint.id(), answers));
        if !(is_same_failure && endpoint.is_single()) {
            failed.resets += 1;
        }
        !is_once && failed.resets < MAX_RESETS && failed.writes < MAX_WRITES
    }

    /// Records a write to an endpoint that has been removed, which says nothing about the request. Returns `true` if a
    /// retry is allowed.
    pub(super) fn record_gone(&mut self, reason: &str) -> bool {
        let is_once = self.is_once;
        let failed = self.record(reason);
        failed.writes += 1;
        !is_once && failed.writes < MAX_WRITES
    }

    /// Returns the backoff before the next write to the endpoint that reset the last one.
    pub(super) fn backoff(&self) -> Duration {
        let writes = self.failures.as_ref().map_or(1, |failed| failed.writes.max(1));
        RETRY_BACKOFF.after(writes.into())
    }

    /// Returns the number of writes and the reason for not retrying, as a suffix to the last error. `can_resend`: the body
    /// is still available.
    pub(super) fn summary(&self, can_resend: bool) -> String {
        let Some(failed) = &self.failures else { return String::new() };
        let why = match failed.writes {
            0 => return String::new(),
            _ if self.is_once => ", and its method is not safe to repeat",
            _ if !can_resend => ", and its streamed body is no longer available",
            _ if failed.is_at_fault => {
                ", and the server answered a probe or others in between, so the request is probably at fault"
            }
            _ => "",
        };
        format!("; the request was sent {}{why}", format_times(failed.writes.into()))
    }

    /// Describes the failed dispatches so far. Returns `None` if there are none.
    pub(super) fn history(&self) -> Option<String> {
        let Failures { dispatches, last_error, .. } = &**self.failures.as_ref()?;
        Some(format!("It was dispatched {} before; the last error: {last_error}.", format_times(*dispatches)))
    }

    fn record(&mut self, reason: &str) -> &mut Failures {
        let failed = self.failures.get_or_insert_with(|| {
            Box::new(Failures {
                dispatches: 0,
                writes: 0,
                resets: 0,
                reset_by: None,
                is_at_fault: false,
                last_error: String::new(),
            })
        });
        failed.dispatches = failed.dispatches.saturating_add(1);
        failed.last_error.clear();
        failed.last_error.push_str(reason);
        failed
    }
}

fn format_times(number: u32) -> String {
    match number {
        1 => "once".into(),
        2 => "twice".into(),
        number => format!("{number} times"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::FrontKind;

    fn pod() -> std::sync::Arc<Endpoint> {
        Endpoint::new("10.0.0.1:8000", 1)
    }

    #[test]
    fn dying_pod_costs_one_reset() {
        let (dying, next) = (pod(), pod());
        let mut budget = RetryBudget::default();
        assert_eq!(budget.connection_reuse(), Reuse::Pooled);
        assert!(budget.record_reset(&dying, "x") && budget.record_reset(&dying, "x"));
        assert_eq!((budget.connection_reuse(), budget.backoff().as_millis()), (Reuse::Never, 100), "50, 100");
        assert!(!budget.record_reset(&next, "x"));
        assert_eq!(budget.summary(true), "; the request was sent 3 times");
    }

    #[test]
    fn request_is_written_at_most_four_times() {
        let dying = pod();
        let mut budget = RetryBudget::default();
        for _ in 0..3 {
            assert!(budget.record_reset(&dying, "x"));
        }
        assert!(!budget.record_reset(&dying, "x"));
    }

    #[test]
    fn recovered_pod_puts_the_request_at_fault() {
        let healthy = pod();
        let mut budget = RetryBudget::default();
        assert!(budget.record_reset(&healthy, "x"));
        healthy.record_recovery();
        assert!(!budget.record_reset(&healthy, "x"));
        assert!(budget.summary(true).ends_with("so the request is probably at fault"));
    }

    #[test]
    fn url_costs_a_reset_each_time() {
        let url = Endpoint::fronting(FrontKind::Url, "10.0.0.1:8000", 1);
        let mut budget = RetryBudget::default();
        assert!(budget.record_reset(&url, "x") && !budget.record_reset(&url, "x"));
    }

    #[test]
    fn unsent_dispatch_costs_nothing() {
        let (pod, mut budget) = (pod(), RetryBudget::default());
        assert_eq!(budget.history(), None);
        (0..100).for_each(|_| budget.record_unsent("nobody listens"));
        assert_eq!(
            budget.history().unwrap(),
            "It was dispatched 100 times before; the last error: nobody listens."
        );
        assert_eq!(budget.summary(true), "");
        assert!(budget.record_reset(&pod, "x"));
    }

    #[test]
    fn removed_pod_costs_a_write_and_no_reset() {
        let mut budget = RetryBudget::default();
        assert!(budget.record_gone("gone") && budget.record_gone("gone") && budget.record_reset(&pod(), "x"));
        assert!(!budget.record_gone("gone"), "the fourth write");
        assert!(!RetryBudget::new(true).record_gone("gone"), "it may have been done");
    }

    #[test]
    fn unsafe_request_is_written_once() {
        let mut budget = RetryBudget::new(true);
        assert_eq!(budget.connection_reuse(), Reuse::Once);
        budget.record_unsent("refused");
        assert!(!budget.record_reset(&pod(), "x"));
        assert_eq!(budget.summary(true), "; the request was sent once, and its method is not safe to repeat");
    }
}
