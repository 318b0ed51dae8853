//! Logs: text for people, JSON on request.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

/// What is logged by default. What kube says of each request that fails is said again, with the object that it was for,
/// by whoever made the request. So it is with what the exporter of traces says of each export that fails.
const DEFAULT: &str = "info,kube_client=off,kube_runtime=off,opentelemetry-otlp=off,opentelemetry_sdk=off";

/// Logs to standard error from now on. `RUST_LOG` sets what is logged; the default is `info`.
pub fn init_logs(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    let registry = tracing_subscriber::registry().with(filter);
    // A second call (tests) keeps the first.
    let _ = if json {
        registry.with(layer.json().flatten_event(true)).try_init()
    } else {
        registry.with(layer).try_init()
    };
}
