//! Lifecycle of the trace export.

use std::time::Duration;

use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::telemetry::traces::Export;

/// The running export.
pub(super) struct Exporting {
    task: JoinHandle<()>,
    stopping: CancellationToken,
}

/// Time limit for exporting the last spans. It fits into the ten seconds by which a pod's grace period exceeds
/// draining.
const TRACE_FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

// === impl Exporting ===

impl Exporting {
    /// Starts the export.
    pub(super) fn start(export: Export) -> Self {
        let stopping = CancellationToken::new();
        Self { task: tokio::spawn(export.run(stopping.clone())), stopping }
    }

    /// Exports the remaining spans within [`TRACE_FLUSH_TIMEOUT`].
    pub(super) async fn stop(mut self) {
        self.stopping.cancel();
        if timeout(TRACE_FLUSH_TIMEOUT, &mut self.task).await.is_err() {
            let after_s = TRACE_FLUSH_TIMEOUT.as_secs();
            tracing::warn!(after_s, "trace export timed out; the last spans are lost");
            self.task.abort();
        }
    }
}
