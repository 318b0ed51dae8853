//! From seconds of a GPU to money.

use serde::{Deserialize, Serialize};

use super::{
    results::{Cycle, Run},
    stats::median,
};
use crate::coldstart::{ColdStart, Part, Phase};

/// What the GPUs of one cycle did, in seconds. The three follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Cost {
    /// Allocated, and not serving yet: from the node (or the process) until ready.
    pub cold_s: f64,
    /// From ready until the last answer had ended.
    pub serving_s: f64,
    /// Ready and without a request, until at zero again. Known once the next cycle has seen that.
    pub idle_s: Option<f64>,
}

/// The medians of a run, and what they cost.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct CostSummary {
    /// Median of [`Cost::cold_s`].
    pub cold_s: f64,
    /// Median of [`Cost::serving_s`].
    pub serving_s: f64,
    /// Median of [`Cost::idle_s`].
    pub idle_s: Option<f64>,
    /// What a cold start costs: `cold_s` at the price. Absent without one, as are those below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_start_money: Option<f64>,
    /// What the idle time after it costs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_money: Option<f64>,
    /// What a whole cycle costs: cold, serving and idle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cycle_money: Option<f64>,
}

// === impl Cost ===

impl Cost {
    /// Of a burst and its record; `None` if it did not get ready. `last_ms` is when the last answer had ended, from the
    /// first request.
    pub fn of(record: &ColdStart, last_ms: f64) -> Option<Self> {
        let ready = record.t_actuation_ms?;
        let cold_ms = ready - allocated_ms(record)?;
        Some(Self { cold_s: cold_ms / 1e3, serving_s: (last_ms - ready).max(0.0) / 1e3, idle_s: None })
    }
}

/// When the first GPU was ours, from the first request: a new node counts from when it was there, as it is paid from
/// then on.
fn allocated_ms(record: &ColdStart) -> Option<f64> {
    if let Some(schedule) = record.phase(Phase::Schedule) {
        let made = schedule.parts.iter().find(|part| part.name == Part::NodeCreate);
        return Some(
            made.map_or(schedule.start_ms + schedule.duration_ms, |made| made.start_ms + made.duration_ms),
        );
    }
    // Whatever is known first of what only happens on a GPU's node.
    let on_node = [Phase::Pull, Phase::Start, Phase::Load];
    Some(on_node.into_iter().find_map(|phase| record.phase(phase))?.start_ms)
}

// === impl CostSummary ===

impl CostSummary {
    /// Of the counted cycles; `None` if there is none.
    pub fn of(run: &Run) -> Option<Self> {
        let costs = || run.counted().filter_map(|cycle: &Cycle| cycle.cost);
        let middle = |values: Vec<f64>| median(&values);
        let cold_s = middle(costs().map(|cost| cost.cold_s).collect())?;
        let serving_s = middle(costs().map(|cost| cost.serving_s).collect())?;
        let idle_s = middle(costs().filter_map(|cost| cost.idle_s).collect());
        let price = run.settings.gpu_hour_price;
        let money = |seconds: f64| price.map(|price| price * seconds / 3600.0);
        Some(Self {
            cold_s,
            serving_s,
            idle_s,
            cold_start_money: money(cold_s),
            idle_money: idle_s.and_then(money),
            cycle_money: idle_s.and_then(|idle_s| money(cold_s + serving_s + idle_s)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coldstart::PartSpan;

    #[test]
    fn a_gpu_is_paid_from_when_it_is_there() {
        // 1 s until it was known, 2 s until the pod had a node, 40 s on it; the last answer 5 s after ready.
        let mut pod =
            ColdStart::of_phases(&[(Phase::Signal, 1e3), (Phase::Schedule, 2e3), (Phase::Load, 40e3)]);
        let cost = Cost::of(&pod, 48e3).unwrap();
        assert_eq!((cost.cold_s, cost.serving_s), (40.0, 5.0));
        // The node was made for it, and was there after half a second of those two.
        let made = PartSpan { name: Part::NodeCreate, start_ms: 1e3, duration_ms: 500.0 };
        pod.phases[1].parts.push(made);
        assert_eq!(Cost::of(&pod, 48e3).unwrap().cold_s, 41.5);
        // A process has its GPU from its start on.
        let process = ColdStart::of_phases(&[(Phase::Signal, 1e3), (Phase::Start, 2e3), (Phase::Load, 40e3)]);
        assert_eq!(Cost::of(&process, 43e3).unwrap().cold_s, 42.0);
        assert_eq!(Cost::of(&ColdStart::default(), 1.0), None);
    }
}
