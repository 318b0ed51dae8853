//! Logs: text for people, JSON on request. A thread that logs never waits for the reader of standard error.

use std::{
    io::{self, IsTerminal},
    sync::OnceLock,
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

/// What is logged by default. What kube says of each request that fails is said again, with the object that it was for,
/// by whoever made the request. So it is with what the exporter of traces says of each export that fails.
const DEFAULT: &str = "info,kube_client=off,kube_runtime=off,opentelemetry-otlp=off,opentelemetry_sdk=off";

/// Lines that wait for the reader of standard error; further ones are dropped and counted.
const MAX_QUEUED_LINES: usize = 1024;

/// Time between two reports of dropped lines.
const DROP_REPORT_INTERVAL: Duration = Duration::from_secs(1);

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Logs to standard error from now on, through a queue and a thread of its own. `RUST_LOG` sets what is logged; the
/// default is `info`. Dropping the guard writes what is queued, for at most about a second.
#[must_use = "dropping the guard ends logging"]
pub fn init_logs(json: bool) -> WorkerGuard {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    let queue = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(MAX_QUEUED_LINES)
        .thread_name("anteroom-log");
    let (writer, guard) = queue.finish(io::stderr());
    let _ = DROPPED.set(writer.error_counter());
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false);
    let registry = tracing_subscriber::registry().with(filter);
    // A second call (tests) keeps the first.
    let _ = if json {
        registry.with(layer.json().flatten_event(true)).try_init()
    } else {
        registry.with(layer).try_init()
    };
    guard
}

/// Log lines that were dropped because the reader of standard error was too slow, since the start.
pub fn dropped_log_lines() -> u64 {
    DROPPED.get().map_or(0, |dropped| dropped.dropped_lines() as u64)
}

/// Logs how many lines were dropped, at most once a second, until one such line has found room. Never returns.
pub async fn report_dropped_lines() {
    let mut ticks = interval(DROP_REPORT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reported = 0;
    loop {
        ticks.tick().await;
        let dropped = dropped_log_lines();
        if dropped == reported {
            continue;
        }
        tracing::warn!(
            dropped,
            "log lines were dropped since the start: whatever reads standard error is too slow"
        );
        // Dropped too, the report is repeated.
        if dropped_log_lines() == dropped {
            reported = dropped;
        }
    }
}
