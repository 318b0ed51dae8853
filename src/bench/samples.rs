//! The numbers of a run by what they are of: each phase, its parts, the totals, and what clients saw.

use super::results::{Cycle, Run};
use crate::coldstart::{ColdStart, Part, Phase};

/// What a number is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Of {
    /// A phase of the record.
    Phase(Phase),
    /// A part of a phase.
    Part(Phase, Part),
    /// From the first request until the target may be sent to, by the record.
    Actuation,
    /// From then until the first token.
    FirstToken,
    /// Both together.
    EndToEnd,
    /// From a request sent until its first token, by the client's clock.
    ClientTtft,
    /// From a request sent until its answer had ended.
    ClientTotal,
}

/// The numbers of one kind, in milliseconds: those of each counted cycle together.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// What they are of.
    pub of: Of,
    /// A group for each counted cycle; empty where it had none. Records give one number, clients one a request.
    pub groups: Vec<Vec<f64>>,
}

// === impl Of ===

impl Of {
    /// Its name in tables and files.
    pub fn name(self) -> String {
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

    /// What it means, in a few words.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Phase(phase) => match phase {
                Phase::Signal => "request → who starts the target knows",
                Phase::Scale => "→ the workload is told to have replicas",
                Phase::Create => "→ the pod exists",
                Phase::Schedule => "→ the pod has a node",
                Phase::Pull => "→ its images are there",
                Phase::Start => "→ its process runs",
                Phase::Load => "→ it answers its readiness probe",
                Phase::Propagate => "→ requests may go to it",
                Phase::Dispatch => "→ the first held request is sent",
                Phase::FirstByte => "→ its answer begins",
                Phase::FirstToken => "→ its first token",
            },
            Self::Part(..) => "within the phase",
            Self::Actuation => "first request → ready",
            Self::FirstToken => "ready → first token",
            Self::EndToEnd => "first request → first token",
            Self::ClientTtft => "request sent → its first token, client's clock",
            Self::ClientTotal => "request sent → end of its answer, client's clock",
        }
    }

    fn of_record(self, record: &ColdStart) -> Option<f64> {
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

    fn of_cycle(self, cycle: &Cycle) -> Vec<f64> {
        let answered = cycle.requests.iter().filter(|request| request.error.is_none());
        match self {
            Self::ClientTtft => answered.filter_map(|request| request.ttft_ms).collect(),
            Self::ClientTotal => answered.map(|request| request.total_ms).collect(),
            _ => cycle.cold_start.iter().filter_map(|record| self.of_record(record)).collect(),
        }
    }
}

// === impl Sample ===

impl Sample {
    /// What the counted cycles of a run have, in the order of time; what none has is left out.
    pub fn all(run: &Run) -> Vec<Self> {
        let inside = |phase| Part::ALL.map(|part| Of::Part(phase, part));
        let records =
            Phase::ALL.into_iter().flat_map(|phase| [Of::Phase(phase)].into_iter().chain(inside(phase)));
        let totals = [Of::Actuation, Of::FirstToken, Of::EndToEnd, Of::ClientTtft, Of::ClientTotal];
        let all = records
            .chain(totals)
            .map(|of| Self { of, groups: run.counted().map(|cycle| of.of_cycle(cycle)).collect() });
        all.filter(|sample| sample.groups.iter().any(|group| !group.is_empty())).collect()
    }

    /// All numbers.
    pub fn values(&self) -> Vec<f64> {
        self.groups.concat()
    }

    /// One number for each cycle that has any: their median. Cycles are independent of each other, requests of one
    /// burst are not.
    pub fn by_cycle(&self) -> Vec<f64> {
        self.groups.iter().filter_map(|group| super::stats::median(group)).collect()
    }
}
