//! GPU seconds and money of cycles and runs.

use super::{
    results::{Cost, CostSummary, Cycle, Run},
    stats::median,
};
use crate::coldstart::{ColdStart, Part, Phase};

// === impl Cost ===

impl Cost {
    /// Computes the cost of a cycle, without its idle time. Returns `None` if the target did not become ready.
    /// `last_answer_ms` is the end of the last answer, relative to the first request.
    pub(super) fn of(record: &ColdStart, last_answer_ms: f64) -> Option<Self> {
        let ready = record.t_actuation_ms?;
        let cold_ms = ready - allocated_ms(record)?;
        Some(Self { cold_s: cold_ms / 1e3, serving_s: (last_answer_ms - ready).max(0.0) / 1e3, idle_s: None })
    }
}

/// Returns the time at which the GPU is allocated, relative to the first request. A node that was created for the pod is
/// paid from its creation.
fn allocated_ms(record: &ColdStart) -> Option<f64> {
    if let Some(schedule) = record.phase(Phase::Schedule) {
        let made = schedule.parts.iter().find(|part| part.name == Part::NodeCreate);
        return Some(
            made.map_or(schedule.start_ms + schedule.duration_ms, |made| made.start_ms + made.duration_ms),
        );
    }
    // The earliest known phase that runs on the node of the GPU.
    let on_node = [Phase::Pull, Phase::Start, Phase::Load];
    Some(on_node.into_iter().find_map(|phase| record.phase(phase))?.start_ms)
}

// === impl CostSummary ===

impl CostSummary {
    /// Computes the medians over the counted cycles. Returns `None` if no cycle has a cost.
    pub(super) fn of(run: &Run) -> Option<Self> {
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
    fn gpu_time_starts_at_the_allocation() {
        // Signal 1 s, schedule 2 s, load 40 s on the node; the last answer ends 5 s after ready.
        let mut pod =
            ColdStart::of_phases(&[(Phase::Signal, 1e3), (Phase::Schedule, 2e3), (Phase::Load, 40e3)]);
        let cost = Cost::of(&pod, 48e3).unwrap();
        assert_eq!((cost.cold_s, cost.serving_s), (40.0, 5.0));
        // The node is created 0.5 s into the 2 s of `schedule`: 40 s + 1.5 s.
        let made = PartSpan { name: Part::NodeCreate, start_ms: 1e3, duration_ms: 500.0 };
        pod.phases[1].parts.push(made);
        assert_eq!(Cost::of(&pod, 48e3).unwrap().cold_s, 41.5);
        // A process holds its GPU from `start` on.
        let process = ColdStart::of_phases(&[(Phase::Signal, 1e3), (Phase::Start, 2e3), (Phase::Load, 40e3)]);
        assert_eq!(Cost::of(&process, 43e3).unwrap().cold_s, 42.0);
        assert_eq!(Cost::of(&ColdStart::default(), 1.0), None);
    }
}
