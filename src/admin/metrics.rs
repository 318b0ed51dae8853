//! Metrics in the OpenMetrics format. Everything is read at scrape time, except for cold starts, which are recorded as
//! they end.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::{MetricType, exemplar::HistogramWithExemplars, family::Family},
    registry::{Registry, Unit},
};

use super::{ClusterCounts, View};
use crate::{
    admission::Gate,
    coldstart::ColdStart,
    demand::{Capacity, queue_depth},
    domain::ObstacleKind,
    error::{Outcome, Refusal},
    telemetry::{
        BUCKETS, HistogramSnapshot, HoldEnd, RouteCounters, STATUS_CODES, StaticKind, TraceLabel,
        dropped_log_lines, exemplar, limited_log_lines,
    },
};

/// Metrics of completed cold starts.
#[derive(Clone, Debug)]
pub struct ColdStartMetrics {
    duration: Histograms,
    actuation: Histograms,
    phases: Histograms,
}

type Histograms = Family<
    Vec<(&'static str, String)>,
    HistogramWithExemplars<TraceLabel>,
    fn() -> HistogramWithExemplars<TraceLabel>,
>;

struct RouteMetrics(Arc<dyn View>);

type MetricLabels<'a> = Vec<(&'static str, &'a str)>;

/// Route label of requests without a route.
const UNROUTED: &str = "";

// === impl ColdStartMetrics ===

impl Default for ColdStartMetrics {
    fn default() -> Self {
        let histogram = || HistogramWithExemplars::new(BUCKETS.into_iter());
        Self {
            duration: Family::new_with_constructor(histogram),
            actuation: Family::new_with_constructor(histogram),
            phases: Family::new_with_constructor(histogram),
        }
    }
}

impl ColdStartMetrics {
    /// Records a completed cold start.
    pub fn record(&self, cold_start: &ColdStart) {
        let route = ("route", cold_start.route.to_string());
        let observe = |histograms: &Histograms, labels, ms: f64| {
            let trace = cold_start.trace_id.as_ref().filter(|_| cold_start.is_traced);
            let (label, at) = exemplar(trace.map(ToString::to_string));
            histograms.get_or_create(&labels).observe(ms / 1e3, label, at);
        };
        if let Some(outcome) = cold_start.outcome {
            let labels = vec![
                route.clone(),
                ("outcome", outcome.name().into()),
                ("kind", cold_start.kind.name().into()),
            ];
            observe(&self.duration, labels, cold_start.total_ms);
        }
        if let Some(ms) = cold_start.t_actuation_ms {
            let labels = vec![route.clone(), ("kind", cold_start.kind.name().into())];
            observe(&self.actuation, labels, ms);
        }
        for span in cold_start.finished_phases() {
            let labels = vec![route.clone(), ("phase", span.name.name().into())];
            observe(&self.phases, labels, span.duration_ms);
        }
    }
}

/// Creates the registry behind `/metrics`.
pub(super) fn registry(view: Arc<dyn View>, cold_starts: &ColdStartMetrics) -> Registry {
    let mut registry = Registry::with_prefix("anteroom");
    registry.register_collector(Box::new(RouteMetrics(view)));
    registry.register_with_unit(
        "cold_start_duration",
        "Duration of cold starts, from the first request to the first byte or the failure",
        Unit::Seconds,
        cold_starts.duration.clone(),
    );
    registry.register_with_unit(
        "cold_start_actuation",
        "Time from the first request of a cold start until the target was ready for dispatch",
        Unit::Seconds,
        cold_starts.actuation.clone(),
    );
    registry.register_with_unit(
        "cold_start_phase_duration",
        "Duration of the phases of cold starts",
        Unit::Seconds,
        cold_starts.phases.clone(),
    );
    registry
}

// === impl RouteMetrics ===

impl fmt::Debug for RouteMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Routes").finish_non_exhaustive()
    }
}

impl Collector for RouteMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let gates = &self.0.gates()[..];
        let all = || {
            let gates = gates.iter().map(|gate| (gate.key().as_str(), gate.counters()));
            gates.chain([(UNROUTED, self.0.unrouted())])
        };
        requests(&mut encoder, all())?;
        refused(&mut encoder, all())?;
        let mut admitted = counter(&mut encoder, "admitted_requests", "Admitted requests")?;
        for gate in gates {
            count(&mut admitted, &[("route", gate.key().as_str())], gate.counters().admitted())?;
        }
        intercepted(&mut encoder, gates)?;
        gauge(&mut encoder, gates, "held_requests", "Requests waiting for an endpoint", |gate| {
            gate.held() as u64
        })?;
        gauge(&mut encoder, gates, "held_bytes", "Bytes of the bodies of held requests", |gate| {
            gate.held_bytes() as u64
        })?;
        oldest_held(&mut encoder, gates)?;
        gauge(
            &mut encoder,
            gates,
            "in_flight_requests",
            "Requests in flight to an endpoint",
            Gate::in_flight,
        )?;
        endpoints(&mut encoder, gates)?;
        obstacles(&mut encoder, gates)?;
        if self.0.has_scaler() {
            scaler(&mut encoder, gates)?;
        }
        let peers = self.0.peers();
        if !peers.is_empty() {
            let help = "Other replicas by state";
            let mut metric = encoder.encode_descriptor("peers", help, None, MetricType::Gauge)?;
            for (state, number) in peers {
                let labels: MetricLabels<'_> = vec![("state", state)];
                metric.encode_family(&labels)?.encode_gauge(&(number as u64))?;
            }
        }
        if let Some(spans) = self.0.spans() {
            let help = "Spans of traces by outcome of the export";
            let mut metric = counter(&mut encoder, "spans", help)?;
            for (outcome, number) in spans {
                count(&mut metric, &[("outcome", outcome)], number)?;
            }
        }
        if let Some(counts) = self.0.cluster() {
            cluster(&mut encoder, &counts)?;
        }
        durations(&mut encoder, gates)?;
        let mut buffered = encoder.encode_descriptor(
            "buffered_bytes",
            "Bytes of all request bodies in memory",
            None,
            MetricType::Gauge,
        )?;
        let kinds = self.0.memory();
        let bodies = kinds.iter().filter(|(kind, _)| matches!(*kind, "body" | "unfinished_body"));
        let bodies: usize = bodies.map(|(_, bytes)| bytes).sum();
        buffered.encode_gauge(&(bodies as u64))?;
        let mut memory = encoder.encode_descriptor(
            "memory_bytes",
            "Bytes of memory used on behalf of clients",
            None,
            MetricType::Gauge,
        )?;
        for (kind, bytes) in kinds {
            memory.encode_family(&[("kind", kind)])?.encode_gauge(&(bytes as u64))?;
        }
        let help = "Log lines dropped because standard error was read too slowly";
        let mut dropped = counter(&mut encoder, "dropped_log_lines", help)?;
        count(&mut dropped, &[], dropped_log_lines())?;
        let help = "Log lines suppressed by the rate limits per kind and source";
        let mut limited = counter(&mut encoder, "limited_log_lines", help)?;
        count(&mut limited, &[], limited_log_lines())
    }
}

fn requests<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    all: impl Iterator<Item = (&'a str, &'a RouteCounters)>,
) -> fmt::Result {
    let mut metric = counter(encoder, "requests", "Admitted requests by outcome")?;
    for (route, counters) in all {
        for outcome in Outcome::ALL {
            for (slot, code) in STATUS_CODES.iter().map(u16::to_string).chain(["other".into()]).enumerate() {
                for (cold, cold_start) in [(false, "false"), (true, "true")] {
                    let ended = counters.ended(outcome, slot, cold);
                    if ended > 0 {
                        let labels = [
                            ("route", route),
                            ("outcome", outcome.name()),
                            ("code", &code),
                            ("cold_start", cold_start),
                        ];
                        count(&mut metric, &labels, ended)?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn refused<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    all: impl Iterator<Item = (&'a str, &'a RouteCounters)>,
) -> fmt::Result {
    let mut metric = counter(encoder, "refused_requests", "Rejected requests by reason")?;
    for (route, counters) in all {
        for refusal in Refusal::ALL {
            let refused = counters.refused(refusal);
            if refused > 0 {
                let answer = refusal.answer();
                let labels = [("route", route), ("reason", answer.code), ("code", answer.status.as_str())];
                count(&mut metric, &labels, refused)?;
            }
        }
    }
    Ok(())
}

/// Encodes only counters above zero: most routes have no intercept.
fn intercepted(encoder: &mut DescriptorEncoder<'_>, gates: &[Arc<Gate>]) -> fmt::Result {
    let help = "Requests answered by their InterceptorRoute without admission";
    let mut metric = counter(encoder, "static_answers", help)?;
    for gate in gates {
        for kind in StaticKind::ALL {
            let answers = gate.counters().static_answers(kind);
            if answers > 0 {
                count(&mut metric, &[("route", gate.key().as_str()), ("kind", kind.name())], answers)?;
            }
        }
    }
    let help = "Requests sent to the fallback of their InterceptorRoute after a failed wait";
    let mut metric = counter(encoder, "fallback_requests", help)?;
    for gate in gates {
        let fallbacks = gate.counters().fallbacks();
        if fallbacks > 0 {
            count(&mut metric, &[("route", gate.key().as_str())], fallbacks)?;
        }
    }
    Ok(())
}

fn oldest_held(encoder: &mut DescriptorEncoder<'_>, gates: &[Arc<Gate>]) -> fmt::Result {
    let help = "Hold time of the oldest held request";
    let mut metric =
        encoder.encode_descriptor("oldest_held", help, Some(&Unit::Seconds), MetricType::Gauge)?;
    for gate in gates {
        let labels: MetricLabels<'_> = vec![("route", gate.key().as_str())];
        let waited = gate.oldest_held().unwrap_or_default();
        metric.encode_family(&labels)?.encode_gauge(&waited.as_secs_f64())?;
    }
    Ok(())
}

fn endpoints(encoder: &mut DescriptorEncoder<'_>, gates: &[Arc<Gate>]) -> fmt::Result {
    let mut metric = encoder.encode_descriptor("endpoints", "Endpoints by state", None, MetricType::Gauge)?;
    for gate in gates {
        let endpoints = gate.target().endpoints();
        let ready = endpoints.iter().filter(|endpoint| endpoint.is_ready()).count() as u64;
        for (state, number) in [("ready", ready), ("not_ready", endpoints.len() as u64 - ready)] {
            let labels: MetricLabels<'_> = vec![("route", gate.key().as_str()), ("state", state)];
            metric.encode_family(&labels)?.encode_gauge(&number)?;
        }
    }
    Ok(())
}

fn obstacles(encoder: &mut DescriptorEncoder<'_>, gates: &[Arc<Gate>]) -> fmt::Result {
    let help = "1 for the current obstacle to a start, else 0";
    let mut metric = encoder.encode_descriptor("obstacle", help, None, MetricType::Gauge)?;
    for gate in gates {
        let obstacle = gate.target().obstacle().map(|obstacle| obstacle.kind);
        for kind in ObstacleKind::ALL {
            let labels: MetricLabels<'_> = vec![("route", gate.key().as_str()), ("kind", kind.name())];
            metric.encode_family(&labels)?.encode_gauge(&u64::from(obstacle == Some(kind)))?;
        }
    }
    Ok(())
}

fn cluster(encoder: &mut DescriptorEncoder<'_>, counts: &ClusterCounts) -> fmt::Result {
    let help = "Routes of the cluster, by the reason of their condition Accepted";
    let mut metric = encoder.encode_descriptor("cluster_routes", help, None, MetricType::Gauge)?;
    for (kind, reason, number) in &counts.routes {
        let labels: MetricLabels<'_> = vec![("kind", kind), ("reason", reason)];
        metric.encode_family(&labels)?.encode_gauge(&(*number as u64))?;
    }
    let mut metric = counter(encoder, "status_writes", "Writes of the status of routes by outcome")?;
    for (outcome, number) in &counts.status_writes {
        count(&mut metric, &[("outcome", outcome)], *number)?;
    }
    let (open, losses, lost) = counts.watches;
    let mut metric = counter(encoder, "cluster_watch_losses", "Losses of watches of the API server")?;
    count(&mut metric, &[], losses)?;
    let help = "Watches of the API server by state; the state behind a lost one is stale";
    let mut metric = encoder.encode_descriptor("cluster_watches", help, None, MetricType::Gauge)?;
    for (state, number) in [("open", open), ("lost", lost)] {
        let labels: MetricLabels<'_> = vec![("state", state)];
        metric.encode_family(&labels)?.encode_gauge(&(number as u64))?;
    }
    Ok(())
}

fn scaler(encoder: &mut DescriptorEncoder<'_>, gates: &[Arc<Gate>]) -> fmt::Result {
    gauge(encoder, gates, "scaler_streams", "Open push streams from KEDA to this replica", |gate| {
        gate.demand().streams()
    })?;
    gauge(encoder, gates, "scaler_active", "1 while demand is reported to KEDA, else 0", |gate| {
        u64::from(gate.counts_everywhere().is_active())
    })?;
    let help = "Queue depth reported to KEDA, over all replicas";
    let mut metric = encoder.encode_descriptor("scaler_queue_depth", help, None, MetricType::Gauge)?;
    for gate in gates {
        let labels: MetricLabels<'_> = vec![("route", gate.key().as_str())];
        let depth = queue_depth(&gate.counts_everywhere(), Capacity::from(&**gate.policy()));
        metric.encode_family(&labels)?.encode_gauge(&depth)?;
    }
    let help = "Pushes of demand to KEDA";
    let mut metric = counter(encoder, "scaler_pushes", help)?;
    for gate in gates {
        count(&mut metric, &[("route", gate.key().as_str())], gate.demand().pushes())?;
    }
    Ok(())
}

fn durations(encoder: &mut DescriptorEncoder<'_>, gates: &[Arc<Gate>]) -> fmt::Result {
    let help = "Hold time of requests by outcome";
    let mut metric =
        encoder.encode_descriptor("hold_duration", help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for gate in gates {
        for end in HoldEnd::all() {
            let labels: MetricLabels<'_> = vec![("route", gate.key().as_str()), ("outcome", end.name())];
            if let Some(durations) = gate.counters().hold_durations(end) {
                durations.encode(metric.encode_family(&labels)?)?;
            }
        }
    }
    let help = "Time from the arrival of a request to the first byte of its response";
    let mut metric =
        encoder.encode_descriptor("time_to_first_byte", help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for gate in gates {
        let labels =
            |cold| -> MetricLabels<'_> { vec![("route", gate.key().as_str()), ("cold_start", cold)] };
        histogram(&mut metric, &labels("false"), &gate.counters().first_byte_durations())?;
        if let Some(durations) = gate.counters().cold_first_byte_durations() {
            durations.encode(metric.encode_family(&labels("true"))?)?;
        }
    }
    Ok(())
}

fn counter<'e>(
    encoder: &'e mut DescriptorEncoder<'_>,
    name: &'static str,
    help: &'static str,
) -> Result<MetricEncoder<'e>, fmt::Error> {
    encoder.encode_descriptor(name, help, None, MetricType::Counter)
}

fn count(metric: &mut MetricEncoder<'_>, labels: &[(&'static str, &str)], value: u64) -> fmt::Result {
    metric.encode_family(&labels.to_vec())?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    gates: &[Arc<Gate>],
    name: &'static str,
    help: &'static str,
    value: impl Fn(&Gate) -> u64,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for gate in gates {
        let labels: MetricLabels<'_> = vec![("route", gate.key().as_str())];
        metric.encode_family(&labels)?.encode_gauge(&value(gate))?;
    }
    Ok(())
}

fn histogram(
    metric: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    summed: &HistogramSnapshot,
) -> fmt::Result {
    if summed.count == 0 {
        return Ok(());
    }
    metric.encode_family(labels)?.encode_histogram::<NoLabelSet>(
        summed.sum,
        summed.count,
        &summed.buckets,
        None,
    )
}
