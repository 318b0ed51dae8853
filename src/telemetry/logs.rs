//! Logs: text for people, JSON on request. A thread that logs never waits for the reader of standard error, and nobody
//! outside can fill the log.

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

/// What is logged by default. What kube says of each request that fails is said again, with the object that it was for,
/// by whoever made the request. So it is with what the exporter of traces says of each export that fails.
const DEFAULT: &str = "info,kube_client=off,kube_runtime=off,opentelemetry-otlp=off,opentelemetry_sdk=off";

/// Time between two reports of lines that are missing.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

static LOGS: OnceLock<Logs> = OnceLock::new();

struct Logs {
    queue: Arc<LogQueue>,
    limit: LogLimit,
}

/// Logs to standard error from now on, through a queue and a thread of its own. `RUST_LOG` sets what is logged; the
/// default is `info`. Panics are logged as well, since the default hook would wait for the reader.
///
/// # Errors
/// When the thread cannot be started.
pub fn init_logs(json: bool) -> io::Result<LogGuard> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    let (queue, guard) = LogQueue::start(io::stderr())?;
    let logs = LOGS.get_or_init(|| Logs { queue: queue.clone(), limit: LogLimit::new() });
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(queue)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false);
    let registry = tracing_subscriber::registry().with(filter).with(&logs.limit);
    // A second call (tests) keeps the first.
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

/// Log lines that were dropped because the reader of standard error was too slow, since the start.
pub fn dropped_log_lines() -> u64 {
    LOGS.get().map_or(0, |logs| logs.queue.dropped())
}

/// Log lines that were left out because too many came of one kind or source, since the start.
pub fn limited_log_lines() -> u64 {
    LOGS.get().map_or(0, |logs| logs.limit.left_out())
}

/// Logs how many lines are missing, for each reason at most once a second; of dropped ones until such a line has found
/// room. Never returns.
pub async fn report_missing_lines() {
    let mut ticks = interval(REPORT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reported = 0;
    loop {
        ticks.tick().await;
        if let Some(left_out) = LOGS.get().and_then(|logs| logs.limit.take_left_out()) {
            tracing::warn!(
                left_out = left_out.lines,
                mostly_of = left_out.mostly_of,
                "log lines were left out: too many came of one kind or source"
            );
        }
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
