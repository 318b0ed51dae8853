//! `/metrics`, as vLLM's Prometheus client writes it.
//!
//! By hand, not with the registry of the proxy: names with a colon, labels in this order and figures as floats
//! are what a scraper of vLLM meets.

use super::engine::{Finish, Reading};
use std::fmt::Write as _;

struct Exposition {
    text: String,
    /// The labels that all series have.
    labels: String,
}

pub(super) fn render(reading: &Reading, model: &str) -> String {
    let model = model.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let mut out = Exposition { text: String::new(), labels: format!("model_name=\"{model}\"") };
    out.gauge(
        "vllm:num_requests_running",
        "Number of requests in model execution batches.",
        reading.running as f64,
    );
    out.gauge(
        "vllm:num_requests_waiting",
        "Number of requests waiting to be processed.",
        reading.waiting as f64,
    );
    out.gauge(
        "vllm:kv_cache_usage_perc",
        "KV-cache usage. 1 means 100 percent usage.",
        reading.kv_cache_usage,
    );
    out.family("vllm:engine_sleep_state", "Engine sleep state; awake = 1 means engine is awake.", "gauge");
    for (level, state) in ["awake", "weights_offloaded", "discard_all"].into_iter().enumerate() {
        let labels = format!("{},sleep_state=\"{state}\"", out.labels);
        let value = f64::from(usize::from(reading.sleeps_at) == level);
        out.sample("vllm:engine_sleep_state", &format!("engine=\"0\",{labels}"), value);
    }
    // Nothing here is ever preempted; the series is there because a scraper asks for it.
    out.counter("vllm:num_preemptions_total", "Cumulative number of preemption from the engine.", 0.0);
    out.counter(
        "vllm:prompt_tokens_total",
        "Number of prefill tokens processed.",
        reading.prompt_tokens as f64,
    );
    out.counter(
        "vllm:generation_tokens_total",
        "Number of generation tokens processed.",
        reading.generation_tokens as f64,
    );
    out.family("vllm:request_success_total", "Count of successfully processed requests.", "counter");
    let ends = Finish::ALL.map(Finish::name).into_iter().zip(reading.finished);
    for (reason, count) in ends.chain([("error", 0), ("repetition", 0)]) {
        let labels = format!("engine=\"0\",finished_reason=\"{reason}\",{}", out.labels);
        out.sample("vllm:request_success_total", &labels, count as f64);
    }
    out.text
}

// === impl Exposition ===

impl Exposition {
    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, help, "gauge");
        self.single(name, value);
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, help, "counter");
        self.single(name, value);
    }

    fn single(&mut self, name: &str, value: f64) {
        let labels = format!("engine=\"0\",{}", self.labels);
        self.sample(name, &labels, value);
    }

    fn family(&mut self, name: &str, help: &str, kind: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: f64) {
        let _ = writeln!(self.text, "{name}{{{labels}}} {value:?}");
    }
}
