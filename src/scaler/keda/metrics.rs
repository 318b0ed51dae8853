//! Metrics of a route: names, targets and values.

use std::sync::Arc;

use super::{
    proto::{GetMetricSpecResponse, GetMetricsResponse, MetricSpec, MetricValue},
    trigger::Trigger,
};
use crate::{
    admission::Gate,
    demand::{Capacity, Counts, queue_depth, request_rate},
    domain::{Counting, Policy, RequestRate},
};

/// Metrics of a trigger.
pub(super) struct TriggerMetrics {
    policy: Arc<Policy>,
    metrics: Vec<(String, MetricKind)>,
}

#[derive(Clone, Copy)]
enum MetricKind {
    QueueDepth,
    RequestRate(RequestRate),
}

// === impl TriggerMetrics ===

impl TriggerMetrics {
    /// Derives the metrics from the current policy; without a route, from the default one of the trigger's kind. The first
    /// name never changes for a trigger, as the HPA refers to it.
    pub(super) fn of(trigger: &Trigger, gate: Option<&Gate>) -> Self {
        let expected = || Arc::new(Policy { scaling: trigger.expected_scaling(), ..Policy::default() });
        let policy = gate.map_or_else(expected, |gate| gate.policy().clone());
        let route = slug(trigger.name());
        let depth = match policy.scaling.counting {
            Counting::Queue => "queue-depth",
            Counting::Concurrency => "concurrency",
        };
        let mut metrics = vec![(format!("{route}-{depth}"), MetricKind::QueueDepth)];
        metrics.extend(
            policy
                .scaling
                .request_rate
                .map(|rate| (format!("{route}-request-rate"), MetricKind::RequestRate(rate))),
        );
        Self { policy, metrics }
    }

    pub(super) fn names(&self) -> Vec<&str> {
        self.metrics.iter().map(|(name, _)| name.as_str()).collect()
    }

    pub(super) fn specs(&self) -> GetMetricSpecResponse {
        let spec = |(name, kind): &(String, MetricKind)| {
            let target = match kind {
                MetricKind::QueueDepth => self.policy.scaling.target,
                MetricKind::RequestRate(rate) => rate.target,
            };
            MetricSpec {
                metric_name: name.clone(),
                target_size: i64::from(target),
                target_size_float: f64::from(target),
            }
        };
        GetMetricSpecResponse { metric_specs: self.metrics.iter().map(spec).collect() }
    }

    /// Returns the value of the metric `name`, or of all if it is empty.
    pub(super) fn values(&self, name: &str, counts: &Counts) -> Option<GetMetricsResponse> {
        let asked = self.metrics.iter().filter(|(known, _)| name.is_empty() || known == name);
        let values: Vec<_> = asked
            .map(|(name, kind)| {
                let value = match kind {
                    MetricKind::QueueDepth => queue_depth(counts, Capacity::from(&*self.policy)),
                    MetricKind::RequestRate(rate) => request_rate(counts, *rate, &self.policy.scaling),
                };
                MetricValue {
                    metric_name: name.clone(),
                    // Rounded up: KEDA reads this field when the float is not above zero.
                    #[expect(clippy::cast_possible_truncation, reason = "saturates")]
                    metric_value: value.ceil() as i64,
                    metric_value_float: value,
                }
            })
            .collect();
        (!values.is_empty()).then_some(GetMetricsResponse { metric_values: values })
    }
}

/// Returns zero for any metric of a route that does not exist yet.
pub(super) fn no_values(name: &str, metrics: &TriggerMetrics) -> GetMetricsResponse {
    let names = if name.is_empty() { metrics.names() } else { vec![name] };
    let zero = |name: &str| MetricValue { metric_name: name.to_owned(), ..MetricValue::default() };
    GetMetricsResponse { metric_values: names.into_iter().map(zero).collect() }
}

/// Converts a route's name to characters that the HPA accepts in a metric name.
fn slug(name: &str) -> String {
    let fits = |character: char| match character.to_ascii_lowercase() {
        fits @ ('a'..='z' | '0'..='9') => fits,
        _ => '-',
    };
    name.chars().map(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        coldstart::ColdStarts,
        domain::{Period, Scaling},
        scaler::keda::proto::ScaledObjectRef,
    };

    #[tokio::test]
    async fn names_targets_and_values_agree() {
        let scaling = Scaling {
            request_rate: Some(RequestRate { target: 20, window: Period::from_secs(60) }),
            ..Scaling::default()
        };
        let gate = Gate::new(
            "ml/Llama_3.1".into(),
            Policy { scaling, ..Policy::default() },
            ColdStarts::new(|_| {}),
        );
        let trigger = Trigger::of(&ScaledObjectRef {
            name: "vllm".into(),
            namespace: "ml".into(),
            scaler_metadata: [("route".into(), "Llama_3.1".into())].into(),
        });
        let metrics = TriggerMetrics::of(&trigger.unwrap(), Some(&gate));
        let (depth, rate) = ("llama-3-1-queue-depth", "llama-3-1-request-rate");
        assert_eq!(metrics.names(), [depth, rate]);
        let specs = metrics.specs().metric_specs;
        assert_eq!(
            specs
                .iter()
                .map(|spec| (&*spec.metric_name, spec.target_size, spec.target_size_float))
                .collect::<Vec<_>>(),
            [(depth, 5, 5.0), (rate, 20, 20.0)]
        );
        let values = |name, counts: &Counts| {
            let values = metrics.values(name, counts)?.metric_values;
            Some(
                values.iter().map(|value| (value.metric_value, value.metric_value_float)).collect::<Vec<_>>(),
            )
        };
        assert_eq!(values("", &Counts::default()), Some(vec![(0, 0.0), (0, 0.0)]));
        let counts = Counts { in_flight: 1, request_rate: 2.5, ready: true, ..Counts::default() };
        assert_eq!(
            values(depth, &counts),
            Some(vec![(1, 5.0 / 64.0)]),
            "1 × 5 ÷ 64, and the integer is rounded up"
        );
        assert_eq!(values(rate, &counts), Some(vec![(3, 2.5)]));
        assert_eq!(values("s0-llama-3-1-queue-depth", &counts), None);
    }

    #[test]
    fn unknown_route_has_default_metrics_of_zero() {
        for (key, name, target) in
            [("route", "new-queue-depth", 5), ("interceptorRoute", "new-concurrency", 100)]
        {
            let trigger = Trigger::of(&ScaledObjectRef {
                name: "vllm".into(),
                namespace: "ml".into(),
                scaler_metadata: [(key.into(), "new".into())].into(),
            });
            let metrics = TriggerMetrics::of(&trigger.unwrap(), None);
            let [spec] = metrics.specs().metric_specs.try_into().unwrap();
            assert_eq!((&*spec.metric_name, spec.target_size), (name, target));
            // A metric that the route had, or will have.
            for (asked, answered) in [("", name), (name, name), ("new-request-rate", "new-request-rate")] {
                let [value] = no_values(asked, &metrics).metric_values.try_into().unwrap();
                assert_eq!(
                    (&*value.metric_name, value.metric_value, value.metric_value_float),
                    (answered, 0, 0.0)
                );
            }
        }
    }
}
