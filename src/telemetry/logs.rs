//! Logs: human-readable text, or JSON. Logging threads never block on the reader of standard error, and clients cannot
//! flood the log.

use std::{
    backtrace::Backtrace,
    io::{self, IsTerminal},
    panic,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

use super::{
    log_limit::LogLimit,
    log_queue::{LogGuard, LogQueue},
};

/// Default filter. Failed requests that kube logs, and failed exports that OpenTelemetry logs, are logged by the caller
/// with more context.
const DEFAULT_FILTER: &str =
    "info,kube_client=off,kube_runtime=off,opentelemetry-otlp=off,opentelemetry_sdk=off";

/// Interval between reports of missing lines.
const MISSING_LINES_INTERVAL: Duration = Duration::from_secs(1);

static LOGS: OnceLock<LogSetup> = OnceLock::new();

struct LogSetup {
    queue: Arc<LogQueue>,
    limit: LogLimit,
}

/// Logs to standard error through a bounded queue and its own thread. `RUST_LOG` overrides the default level `info`.
/// Panics are logged too, since the default hook would block on the reader.
///
/// # Errors
///
/// If the thread cannot be started.
pub fn init_logs(json: bool) -> io::Result<LogGuard> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let (queue, guard) = LogQueue::start(io::stderr())?;
    let logs = LOGS.get_or_init(|| LogSetup { queue: queue.clone(), limit: LogLimit::new() });
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(queue)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false);
    let registry = tracing_subscriber::registry().with(filter).with(&logs.limit);
    // A second call, in tests, has no effect.
    let is_first = if json {
        registry.with(layer.json().flatten_event(true)).try_init()
    } else {
        registry.with(layer).try_init()
    };
    if is_first.is_ok() {
        panic::set_hook(Box::new(|info| {
            let backtrace = Backtrace::capture();
            tracing::error!(%backtrace, "{info}");
        }));
    }
    Ok(guard)
}

/// Returns the number of log lines dropped since the start because standard error was read too slowly.
pub fn dropped_log_lines() -> u64 {
    LOGS.get().map_or(0, |logs| logs.queue.dropped())
}

/// Returns the number of log lines suppressed since the start by rate limits.
pub fn limited_log_lines() -> u64 {
    LOGS.get().map_or(0, |logs| logs.limit.suppressed_line_count())
}

/// Logs the number of missing lines, at most once a second for each reason. If the report of dropped lines is dropped
/// as well, repeats it. Never returns.
pub async fn report_missing_lines() {
    let mut ticks = interval(MISSING_LINES_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reported = 0;
    loop {
        ticks.tick().await;
        if let Some(left_out) = LOGS.get().and_then(|logs| logs.limit.take_suppressed()) {
            tracing::warn!(
                left_out = left_out.lines,
                mostly_of = left_out.mostly_of,
                "log lines were left out: too many of one kind or source"
            );
        }
        let dropped = dropped_log_lines();
        if dropped == reported {
            continue;
        }
        tracing::warn!(dropped, "log lines were dropped since the start: standard error is read too slowly");
        // Repeat the report if it was dropped as well.
        if dropped_log_lines() == dropped {
            reported = dropped;
        }
    }
}
