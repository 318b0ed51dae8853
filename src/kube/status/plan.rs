//! Decides whether and when to write the status of an object.
//!
//! Replicas observe the same objects, verdicts and pods and would mostly write the same status. State known to one
//! replica only (held requests, a start in progress) must not be overwritten by the others:
//! - A change of our own status is written at once, at most once per [`MIN_WRITE_INTERVAL`], or per
//!   [`NUMBERS_INTERVAL`] if only numbers differ.
//! - A status that differs from our last write was written by another replica. It is left in place for
//!   [`REPAIR_DELAY`], and corrected after that.
//! - If replicas disagree about the state of the target, the livelier state is kept for [`PEER_STATE_TTL`] after its
//!   last write. After that, the replica that wrote it has probably died.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    domain::Backoff,
    kube::{
        conflicts::{RouteKind, RouteObject},
        report::{
            Condition, InterceptorRouteStatus, LastColdStart, ModelRouteStatus, RouteReport, RouteState,
            Verdict,
        },
    },
};

/// Minimum interval between writes of an object.
const MIN_WRITE_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum interval between writes that change only numbers.
const NUMBERS_INTERVAL: Duration = Duration::from_secs(10);
/// Time for which a status written by another replica is left in place, plus a random time of up to half of it.
const REPAIR_DELAY: Duration = Duration::from_secs(30);
/// Time for which a livelier state reported by another replica is kept.
const PEER_STATE_TTL: Duration = Duration::from_secs(120);
/// Backoff after a failed write.
const WRITE_BACKOFF: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(120));
/// Time for which an object is left to another field manager after a conflict.
const CONFLICT_PAUSE: Duration = Duration::from_secs(600);

/// Observed generation and status of an object.
#[derive(Clone, Debug, Default)]
pub(super) struct Observed {
    pub(super) generation: Option<i64>,
    /// `None` if the object cannot be parsed.
    pub(super) status: Option<ModelRouteStatus>,
}

/// Next action for an object.
#[derive(Debug, PartialEq)]
pub(super) enum Plan {
    Nothing,
    Later(Instant),
    Write(Box<ModelRouteStatus>),
}

/// Write history of an object.
#[derive(Debug, Default)]
pub(super) struct StatusHistory {
    /// Random jitter in thousandths, drawn once.
    jitter: Option<u32>,
    /// Last status written, without times.
    last_written: Option<ModelRouteStatus>,
    written_at: Option<Instant>,
    /// Time since which the observed status has differed from the last write.
    differs_since: Option<Instant>,
    /// Last observed status, and the time of its first observation.
    last_observed: Option<(ModelRouteStatus, Instant)>,
    /// Liveliest state reported by this replica since the object's status last had no livelier one.
    liveliest_known: Option<RouteState>,
    failures: u32,
    not_before: Option<Instant>,
}

// === impl StatusHistory ===

impl StatusHistory {
    pub(super) fn plan(
        &mut self,
        object: &RouteObject,
        verdict: &Verdict,
        report: &RouteReport,
        observed: &Observed,
        now: Instant,
    ) -> Plan {
        let status = self.status(object, verdict, report, observed, now);
        if observed.status.as_ref().is_some_and(|there| covers(there, &status)) {
            self.last_written = Some(status);
            self.differs_since = None;
            return Plan::Nothing;
        }
        let mut when = match &self.last_written {
            // The object cannot be parsed, so its current status is unknown.
            Some(last_written) if *last_written == status && observed.status.is_none() => {
                return Plan::Nothing;
            }
            Some(last_written) if *last_written == status => {
                let since = *self.differs_since.get_or_insert(now);
                since + REPAIR_DELAY + self.jitter()
            }
            Some(last_written) => self.after(
                if only_numbers(last_written, &status) { NUMBERS_INTERVAL } else { MIN_WRITE_INTERVAL },
                now,
            ),
            None => now,
        };
        when = when.max(self.not_before.unwrap_or(now));
        if when > now {
            return Plan::Later(when);
        }
        let mut status = status;
        let before = observed.status.as_ref().map(|there| there.conditions.as_slice()).unwrap_or_default();
        Condition::set_transition_times(&mut status.conditions, before, &now_rfc3339());
        Plan::Write(Box::new(status))
    }

    /// Records a successful write.
    pub(super) fn written(&mut self, status: ModelRouteStatus, now: Instant) {
        (self.failures, self.not_before) = (0, None);
        self.record(status, now);
    }

    /// Records a conflict with another field manager.
    pub(super) fn conflicted(&mut self, status: ModelRouteStatus, now: Instant) {
        self.not_before = Some(now + CONFLICT_PAUSE);
        self.record(status, now);
    }

    /// Records a failed write.
    pub(super) fn failed(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(now + WRITE_BACKOFF.after(self.failures));
    }

    fn record(&mut self, mut status: ModelRouteStatus, now: Instant) {
        for condition in &mut status.conditions {
            condition.last_transition_time.clear();
        }
        self.last_written = Some(status);
        self.written_at = Some(now);
        self.differs_since = None;
    }

    /// Returns up to half of [`REPAIR_DELAY`], random per object and replica, so that two replicas do not correct at
    /// once.
    fn jitter(&mut self) -> Duration {
        REPAIR_DELAY / 2 * *self.jitter.get_or_insert_with(|| fastrand::u32(..1000)) / 1000
    }

    fn after(&self, pause: Duration, now: Instant) -> Instant {
        self.written_at.map_or(now, |written| written + pause)
    }

    /// Computes the status to write. Keeps a livelier state that another replica has reported recently.
    fn status(
        &mut self,
        object: &RouteObject,
        verdict: &Verdict,
        report: &RouteReport,
        observed: &Observed,
        now: Instant,
    ) -> ModelRouteStatus {
        if object.kind == RouteKind::InterceptorRoute {
            let status = InterceptorRouteStatus::of(verdict, observed.generation);
            return ModelRouteStatus { conditions: status.conditions, ..ModelRouteStatus::default() };
        }
        let mut report = report.clone();
        if let Some(there) = &observed.status {
            if self.last_observed.as_ref().is_none_or(|(last, _)| last != there) {
                self.last_observed = Some((there.clone(), now));
            }
            report.last_cold_start = later(report.last_cold_start.take(), there.last_cold_start.clone());
            self.liveliest_known = self.liveliest_known.max(Some(report.state));
            let since = self.last_observed.as_ref().map_or(now, |(_, since)| *since);
            match there.state {
                // This replica itself reported that state or a livelier one before, so its newer report is right.
                Some(state) if state > report.state && self.liveliest_known >= Some(state) => {}
                Some(state) if state > report.state && now < since + PEER_STATE_TTL => {
                    report.state = state;
                    report.held = there.held.unwrap_or_default().into();
                    if let Some(endpoints) = there.endpoints {
                        (report.ready, report.endpoints) = (endpoints.ready, endpoints.total);
                    }
                }
                _ => self.liveliest_known = Some(report.state),
            }
        }
        ModelRouteStatus::of(verdict, &report, observed.generation)
    }
}

/// Returns whether `there` contains everything in `ours`, ignoring times.
fn covers(there: &ModelRouteStatus, ours: &ModelRouteStatus) -> bool {
    let said = ours
        .conditions
        .iter()
        .all(|ours| there.conditions.iter().any(|there| there.equals_ignoring_time(ours)));
    let others = |status: &ModelRouteStatus| ModelRouteStatus { conditions: Vec::new(), ..status.clone() };
    said && others(there) == others(ours)
}

/// Returns whether two statuses differ only in numbers and the messages that contain them.
fn only_numbers(one: &ModelRouteStatus, other: &ModelRouteStatus) -> bool {
    let plain = |status: &ModelRouteStatus| {
        let mut status = status.clone();
        (status.held, status.endpoints) = (None, None);
        for condition in status.conditions.iter_mut().filter(|condition| condition.kind == "Ready") {
            condition.message.clear();
        }
        status
    };
    plain(one) == plain(other)
}

/// Returns the current time as in Kubernetes objects.
fn now_rfc3339() -> String {
    humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()
}

fn later(one: Option<LastColdStart>, other: Option<LastColdStart>) -> Option<LastColdStart> {
    match (one, other) {
        // RFC 3339 with the same number of digits sorts as time does.
        (Some(one), Some(other)) => Some(if other.started_at > one.started_at { other } else { one }),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests;
