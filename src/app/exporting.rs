//! The export of traces: begun with the rest, and given a little time when all else has stopped.

use std::time::Duration;

use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::telemetry::traces::Export;

/// The running export.
pub(super) struct Exporting {
    task: JoinHandle<()>,
    stopping: CancellationToken,
}

/// How long the last spans may take: the grace period of a pod has ten seconds beyond draining.
const LAST_SPANS: Duration = Duration::from_secs(5);

// === impl Exporting ===

impl Exporting {
    /// Exports from now on.
    pub(super) fn start(export: Export) -> Self {
        let stopping = CancellationToken::new();
        Self { task: tokio::spawn(export.run(stopping.clone())), stopping }
    }

    /// Exports what is left, if that can be done soon.
    pub(super) async fn stop(mut self) {
        self.stopping.cancel();
        if timeout(LAST_SPANS, &mut self.task).await.is_err() {
            let after_s = LAST_SPANS.as_secs();
            tracing::warn!(after_s, "the last traces could not be exported in time, and are lost");
            self.task.abort();
        }
    }
}
