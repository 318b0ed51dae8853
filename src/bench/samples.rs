//! The measured values of a run, by metric.

use super::results::{Cycle, Run};
use crate::coldstart::{ColdStart, Part, Phase};

/// A measured quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Metric {
    /// Duration of a phase of the record.
    Phase(Phase),
    /// Duration of a part of a phase.
    Part(Phase, Part),
    /// First request until ready, by the record.
    Actuation,
    /// Ready until first token, by the record.
    FirstToken,
    /// First request until first token, by the record.
    EndToEnd,
    /// Request sent until its first token, by the client's clock.
    ClientTtft,
    /// Request sent until the end of its answer, by the client's clock.
    ClientTotal,
}

/// The values of one metric, in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) metric: Metric,
    /// One group per counted cycle, possibly empty. Records contribute one value, clients one per request.
    pub(super) groups: Vec<Vec<f64>>,
}

// === impl Metric ===

impl Metric {
    /// Returns the name in tables and files.
    pub(super) fn name(self) -> String {
        match self {
            Self::Phase(phase) => phase.name().to_owned(),
            Self::Part(phase, part) => format!("{}.{}", phase.name(), part.name()),
            Self::Actuation => "t_actuation".to_owned(),
            Self::FirstToken => "t_first_token".to_owned(),
            Self::EndToEnd => "t_e2e".to_owned(),
            Self::ClientTtft => "ttft".to_owned(),
            Self::ClientTotal => "total".to_owned(),
        }
    }

    /// Returns a short explanation for tables.
    pub(super) const fn meaning(self) -> &'static str {
        match self {
            Self::Phase(phase) => match phase {
                Phase::Signal => "first request → scaler or launcher notified",
                Phase::Scale => "→ replicas requested",
                Phase::Create => "→ pod created",
                Phase::Schedule => "→ pod assigned to a node",
                Phase::Pull => "→ images pulled",
                Phase::Start => "→ process running",
                Phase::Load => "→ readiness probe succeeds",
                Phase::Propagate => "→ endpoint known to the proxy",
                Phase::Dispatch => "→ first held request sent",
                Phase::FirstByte => "→ first byte of its answer",
                Phase::FirstToken => "→ first token of its answer",
            },
            Self::Part(..) => "within the phase",
            Self::Actuation => "first request → ready",
            Self::FirstToken => "ready → first token",
            Self::EndToEnd => "first request → first token",
            Self::ClientTtft => "request sent → first token, client's clock",
            Self::ClientTotal => "request sent → end of the answer, client's clock",
        }
    }

    fn value_in(self, record: &ColdStart) -> Option<f64> {
        match self {
            Self::Phase(phase) => Some(record.phase(phase)?.duration_ms),
            Self::Part(phase, part) => {
                let parts = record.phase(phase)?.parts.iter().filter(|span| span.name == part);
                parts.map(|span| span.duration_ms).reduce(|sum, more| sum + more)
            }
            Self::Actuation => record.t_actuation_ms,
            Self::FirstToken => record.t_first_token_ms,
            Self::EndToEnd => record.t_e2e_ms,
            Self::ClientTtft | Self::ClientTotal => None,
        }
    }

    fn values_in(self, cycle: &Cycle) -> Vec<f64> {
        let answered = cycle.requests.iter().filter(|request| request.error.is_none());
        match self {
            Self::ClientTtft => answered.filter_map(|request| request.ttft_ms).collect(),
            Self::ClientTotal => answered.map(|request| request.total_ms).collect(),
            _ => cycle.cold_start.iter().filter_map(|record| self.value_in(record)).collect(),
        }
    }
}

// === impl Sample ===

impl Sample {
    /// Collects the counted cycles of a run, in order of time. Metrics without any value are omitted.
    pub(super) fn all(run: &Run) -> Vec<Self> {
        let parts = |phase| Part::ALL.map(|part| Metric::Part(phase, part));
        let records =
            Phase::ALL.into_iter().flat_map(|phase| [Metric::Phase(phase)].into_iter().chain(parts(phase)));
        let totals = [
            Metric::Actuation,
            Metric::FirstToken,
            Metric::EndToEnd,
            Metric::ClientTtft,
            Metric::ClientTotal,
        ];
        let all = records.chain(totals).map(|metric| Self {
            metric,
            groups: run.counted().map(|cycle| metric.values_in(cycle)).collect(),
        });
        all.filter(|sample| sample.groups.iter().any(|group| !group.is_empty())).collect()
    }

    /// Returns the values of all cycles.
    pub(super) fn values(&self) -> Vec<f64> {
        self.groups.concat()
    }

    /// Returns the median of each cycle that has values. Cycles are independent observations; requests of one burst are
    /// not.
    pub(super) fn by_cycle(&self) -> Vec<f64> {
        self.groups.iter().filter_map(|group| super::stats::median(group)).collect()
    }
}
