//! Whether there is something to write about an object, and when.
//!
//! Replicas see the same objects, verdicts and pods, so they would write the same. What only one of them knows (that
//! requests wait, that it is starting the target) must not be written over by those that know of nothing:
//! - what a replica has to say anew it writes at once, at most once a second, or every ten for mere numbers;
//! - what differs from what it has said before is somebody else's word. It stands for [`REPAIR`], and is then corrected;
//! - of two that disagree on how alive the target is, who knows of more life is believed, for [`TRUST`] after its last
//!   word: that replica may have died.

use std::time::Duration;

use tokio::time::Instant;

use crate::kube::{
    conflicts::{RouteKind, RouteObject},
    report::{InterceptorRouteStatus, LastColdStart, ModelRouteStatus, RouteReport, State, Verdict},
};

/// How long something new waits for the last write.
const NEWS: Duration = Duration::from_secs(1);
/// The same for what are only numbers.
const NUMBERS: Duration = Duration::from_secs(10);
/// How long another's word stands, plus as much as half of it, by chance.
const REPAIR: Duration = Duration::from_secs(30);
/// How long another's word is believed that knows of more life than we do.
const TRUST: Duration = Duration::from_secs(120);
/// How long a failed write waits; it doubles up to [`Self::LONGEST`].
const AGAIN: Duration = Duration::from_secs(2);
const LONGEST: Duration = Duration::from_secs(120);
/// How long an object is left to whoever else writes its conditions.
const LEFT: Duration = Duration::from_secs(600);

/// What is there now.
#[derive(Clone, Debug, Default)]
pub(super) struct Observed {
    pub(super) generation: Option<i64>,
    /// `None`: the object cannot be read.
    pub(super) status: Option<ModelRouteStatus>,
}

/// What to do.
#[derive(Debug, PartialEq)]
pub(super) enum Plan {
    Nothing,
    Later(Instant),
    Write(Box<ModelRouteStatus>),
}

/// What we have said of an object.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// Drawn once, in thousandths.
    chance: Option<u32>,
    /// Our last word, its times left open.
    word: Option<ModelRouteStatus>,
    written_at: Option<Instant>,
    /// Since when something else than our last word has stood there.
    differs_since: Option<Instant>,
    /// The last status that was there, and since when.
    seen: Option<(ModelRouteStatus, Instant)>,
    /// How alive we ever knew the target to be since somebody knew of more.
    knew: Option<State>,
    failures: u32,
    not_before: Option<Instant>,
}

// === impl Said ===

impl Said {
    pub(super) fn plan(
        &mut self,
        object: &RouteObject,
        verdict: &Verdict,
        report: &RouteReport,
        observed: &Observed,
        now: Instant,
    ) -> Plan {
        let status = self.status(object, verdict, report, observed, now);
        if observed.status.as_ref().is_some_and(|there| says(there, &status)) {
            self.word = Some(status);
            self.differs_since = None;
            return Plan::Nothing;
        }
        let mut when = match &self.word {
            // The object cannot be read, so what stands there is not known.
            Some(word) if *word == status && observed.status.is_none() => return Plan::Nothing,
            Some(word) if *word == status => {
                let since = *self.differs_since.get_or_insert(now);
                since + REPAIR + self.chance()
            }
            Some(word) => self.after(if only_numbers(word, &status) { NUMBERS } else { NEWS }, now),
            None => now,
        };
        when = when.max(self.not_before.unwrap_or(now));
        if when > now {
            return Plan::Later(when);
        }
        let mut status = status;
        let before = observed.status.as_ref().map(|there| there.conditions.as_slice()).unwrap_or_default();
        super::date(&mut status, before);
        Plan::Write(Box::new(status))
    }

    /// It is written.
    pub(super) fn written(&mut self, status: ModelRouteStatus, now: Instant) {
        (self.failures, self.not_before) = (0, None);
        self.last_word(status, now);
    }

    /// Somebody else has said it.
    pub(super) fn left_to_others(&mut self, status: ModelRouteStatus, now: Instant) {
        self.not_before = Some(now + LEFT);
        self.last_word(status, now);
    }

    /// It could not be written.
    pub(super) fn failed(&mut self, now: Instant) {
        let pause = AGAIN.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures += 1;
        self.not_before = Some(now + pause);
    }

    fn last_word(&mut self, mut status: ModelRouteStatus, now: Instant) {
        for condition in &mut status.conditions {
            condition.last_transition_time.clear();
        }
        self.word = Some(status);
        self.written_at = Some(now);
        self.differs_since = None;
    }

    /// Up to half of [`REPAIR`], another for each object and replica, so that two do not correct at once.
    fn chance(&mut self) -> Duration {
        REPAIR / 2 * *self.chance.get_or_insert_with(|| fastrand::u32(..1000)) / 1000
    }

    fn after(&self, pause: Duration, now: Instant) -> Instant {
        self.written_at.map_or(now, |written| written + pause)
    }

    /// What we have to say, with what others know better.
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
            if self.seen.as_ref().is_none_or(|(seen, _)| seen != there) {
                self.seen = Some((there.clone(), now));
            }
            report.last_cold_start = later(report.last_cold_start.take(), there.last_cold_start.clone());
            self.knew = self.knew.max(Some(report.state));
            let since = self.seen.as_ref().map_or(now, |(_, since)| *since);
            match there.state {
                // We knew of it ourselves, and now know better.
                Some(state) if state > report.state && self.knew >= Some(state) => {}
                Some(state) if state > report.state && now < since + TRUST => {
                    report.state = state;
                    report.held = there.held.unwrap_or_default().into();
                    if let Some(endpoints) = there.endpoints {
                        (report.ready, report.endpoints) = (endpoints.ready, endpoints.total);
                    }
                }
                _ => self.knew = Some(report.state),
            }
        }
        ModelRouteStatus::of(verdict, &report, observed.generation)
    }
}

/// Whether all that we have to say stands there already, whenever it was said.
fn says(there: &ModelRouteStatus, ours: &ModelRouteStatus) -> bool {
    let said =
        ours.conditions.iter().all(|ours| there.conditions.iter().any(|there| there.says_the_same(ours)));
    let others = |status: &ModelRouteStatus| ModelRouteStatus { conditions: Vec::new(), ..status.clone() };
    said && others(there) == others(ours)
}

/// Whether the two differ in numbers alone, and in the sentences that tell them.
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

fn later(one: Option<LastColdStart>, other: Option<LastColdStart>) -> Option<LastColdStart> {
    match (one, other) {
        // RFC 3339 with the same number of digits sorts as time does.
        (Some(one), Some(other)) => Some(if other.started_at > one.started_at { other } else { one }),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests;
