//! The metrics, in the OpenMetrics format. What exists is read when it is scraped; only cold starts are counted as
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
        BUCKETS, HoldEnd, RouteCounters, STATUS_CODES, StaticKind, Summed, TraceLabel, dropped_log_lines,
        exemplar, limited_log_lines,
    },
};

/// What is counted of cold starts when they end.
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

struct Routes(Arc<dyn View>);

type Labels<'a> = Vec<(&'static str, &'a str)>;

/// The route label of requests that belong to no route.
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
    /// Counts a cold start that has ended.
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
        for span in cold_start.over() {
            let labels = vec![route.clone(), ("phase", span.name.name().into())];
            observe(&self.phases, labels, span.duration_ms);
        }
    }
}

/// Everything that `/metrics` shows.
pub(super) fn registry(view: Arc<dyn View>, cold_starts: &ColdStartMetrics) -> Registry {
    let mut registry = Registry::with_prefix("anteroom");
    registry.register_collector(Box::new(Routes(view)));
    registry.register_with_unit(
        "cold_start_duration",
        "How long cold starts took, from the first request to the first byte or the failure",
        Unit::Seconds,
        cold_starts.duration.clone(),
    );
    registry.register_with_unit(
        "cold_start_actuation",
        "From the first request of a cold start until the target might be sent to",
        Unit::Seconds,
        cold_starts.actuation.clone(),
    );
    registry.register_with_unit(
        "cold_start_phase_duration",
        "How long the phases of cold starts took",
        Unit::Seconds,
        cold_starts.phases.clone(),
    );
    registry
}

// === impl Routes ===

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Routes").finish_non_exhaustive()
    }
}

impl Collector for Routes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let gates = &self.0.gates()[..];
        let all = || {
            let gates = gates.iter().map(|gate| (gate.key().as_str(), gate.counters()));
            gates.chain([(UNROUTED, self.0.unrouted())])
        };
        requests(&mut encoder, all())?;
        refused(&mut encoder, all())?;
        let mut admitted = counter(&mut encoder, "admitted_requests", "Requests that were admitted")?;
        for gate in gates {
            count(&mut admitted, &[("route", gate.key().as_str())], gate.counters().admitted())?;
        }
        intercepted(&mut encoder, gates)?;
        gauge(&mut encoder, gates, "held_requests", "Requests that wait for an endpoint", |gate| {
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
            "Requests that an endpoint is answering",
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
                let labels: Labels<'_> = vec![("state", state)];
                metric.encode_family(&labels)?.encode_gauge(&(number as u64))?;
            }
        }
        if let Some(spans) = self.0.spans() {
            let help = "Spans of traces, by whether the collector took them";
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
            "Bytes in memory that clients make this process keep",
            None,
            MetricType::Gauge,
        )?;
        for (kind, bytes) in kinds {
            memory.encode_family(&[("kind", kind)])?.encode_gauge(&(bytes as u64))?;
        }
        let help = "Log lines that were dropped because standard error was read too slowly";
        let mut dropped = counter(&mut encoder, "dropped_log_lines", help)?;
        count(&mut dropped, &[], dropped_log_lines())?;
        let help = "Log lines that were left out because too many came of one kind or source";
        let mut limited = counter(&mut encoder, "limited_log_lines", help)?;
        count(&mut limited, &[], limited_log_lines())
    }
}

fn requests<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    all: impl Iterator<Item = (&'a str, &'a RouteCounters)>,
) -> fmt::Result {
    let mut metric = counter(encoder, "requests", "Admitted requests by how they ended")?;
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
    let mut metric = counter(encoder, "refused_requests", "Requests that were not admitted, by the reason")?;
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

/// Shown once there is any: most routes never have one.
fn intercepted(encoder: &mut DescriptorEncoder<'_>, gates: &[Arc<Gate>]) -> fmt::Result {
    let help = "Requests that were answered with what stands in their InterceptorRoute, and not admitted";
    let mut metric = counter(encoder, "static_answers", help)?;
    for gate in gates {
        for kind in StaticKind::ALL {
            let answers = gate.counters().static_answers(kind);
            if answers > 0 {
                count(&mut metric, &[("route", gate.key().as_str()), ("kind", kind.name())], answers)?;
            }
        }
    }
    let help = "Requests that waited in vain and went to the fallback of their InterceptorRoute";
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
    let help = "How long the request that has waited longest has been held";
    let mut metric =
        encoder.encode_descriptor("oldest_held", help, Some(&Unit::Seconds), MetricType::Gauge)?;
    for gate in gates {
        let labels: Labels<'_> = vec![("route", gate.key().as_str())];
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
            let labels: Labels<'_> = vec![("route", gate.key().as_str()), ("state", state)];
            metric.encode_family(&labels)?.encode_gauge(&number)?;
        }
    }
    Ok(())
}

fn obstacles(encoder: &mut DescriptorEncoder<'_>, gates: &[Arc<Gate>]) -> fmt::Result {
    let help = "Whether this stands in the way of a start";
    let mut metric = encoder.encode_descriptor("obstacle", help, None, MetricType::Gauge)?;
    for gate in gates {
        let obstacle = gate.target().obstacle().map(|obstacle| obstacle.kind);
        for kind in ObstacleKind::ALL {
            let labels: Labels<'_> = vec![("route", gate.key().as_str()), ("kind", kind.name())];
            metric.encode_family(&labels)?.encode_gauge(&u64::from(obstacle == Some(kind)))?;
        }
    }
    Ok(())
}

fn cluster(encoder: &mut DescriptorEncoder<'_>, counts: &ClusterCounts) -> fmt::Result {
    let help = "Routes of the cluster, by the reason of their condition Accepted";
    let mut metric = encoder.encode_descriptor("cluster_routes", help, None, MetricType::Gauge)?;
    for (kind, reason, number) in &counts.routes {
        let labels: Labels<'_> = vec![("kind", kind), ("reason", reason)];
        metric.encode_family(&labels)?.encode_gauge(&(*number as u64))?;
    }
    let mut metric = counter(encoder, "status_writes", "What became of writing the status of routes")?;
    for (outcome, number) in &counts.status_writes {
        count(&mut metric, &[("outcome", outcome)], *number)?;
    }
    let (open, losses, lost) = counts.watches;
    let mut metric =
        counter(encoder, "cluster_watch_losses", "Watches of the API server that went silent or broke")?;
    count(&mut metric, &[], losses)?;
    let help = "Watches of the API server by state; what a lost one would tell is not known";
    let mut metric = encoder.encode_descriptor("cluster_watches", help, None, MetricType::Gauge)?;
    for (state, number) in [("open", open), ("lost", lost)] {
        let labels: Labels<'_> = vec![("state", state)];
        metric.encode_family(&labels)?.encode_gauge(&(number as u64))?;
    }
    Ok(())
}

fn scaler(encoder: &mut DescriptorEncoder<'_>, gates: &[Arc<Gate>]) -> fmt::Result {
    gauge(
        encoder,
        gates,
        "scaler_streams",
        "Streams for pushes that KEDA has open to this replica",
        |gate| gate.demand().streams(),
    )?;
    gauge(encoder, gates, "scaler_active", "Whether KEDA is told that there is demand", |gate| {
        u64::from(gate.counts_everywhere().is_active())
    })?;
    let help = "What KEDA is told of the queue, of all replicas";
    let mut metric = encoder.encode_descriptor("scaler_queue_depth", help, None, MetricType::Gauge)?;
    for gate in gates {
        let labels: Labels<'_> = vec![("route", gate.key().as_str())];
        let depth = queue_depth(&gate.counts_everywhere(), Capacity::from(&**gate.policy()));
        metric.encode_family(&labels)?.encode_gauge(&depth)?;
    }
    let help = "Times that KEDA was told at once that there is demand";
    let mut metric = counter(encoder, "scaler_pushes", help)?;
    for gate in gates {
        count(&mut metric, &[("route", gate.key().as_str())], gate.demand().pushes())?;
    }
    Ok(())
}

fn durations(encoder: &mut DescriptorEncoder<'_>, gates: &[Arc<Gate>]) -> fmt::Result {
    let help = "How long requests were held, by how holding ended";
    let mut metric =
        encoder.encode_descriptor("hold_duration", help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for gate in gates {
        for end in HoldEnd::all() {
            let labels: Labels<'_> = vec![("route", gate.key().as_str()), ("outcome", end.name())];
            if let Some(durations) = gate.counters().hold_durations(end) {
                durations.encode(metric.encode_family(&labels)?)?;
            }
        }
    }
    let help = "From a request's arrival to the first byte of its answer";
    let mut metric =
        encoder.encode_descriptor("time_to_first_byte", help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for gate in gates {
        let labels = |cold| -> Labels<'_> { vec![("route", gate.key().as_str()), ("cold_start", cold)] };
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
        let labels: Labels<'_> = vec![("route", gate.key().as_str())];
        metric.encode_family(&labels)?.encode_gauge(&value(gate))?;
    }
    Ok(())
}

fn histogram(metric: &mut MetricEncoder<'_>, labels: &impl EncodeLabelSet, summed: &Summed) -> fmt::Result {
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
