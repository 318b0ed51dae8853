//! Output of containers, kept like the kubelet does: lines with the time of each.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::SystemTime,
};

use kube::ResourceExt as _;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::container::Task;

/// Maximum number of lines kept for one run of a container; more than the simulator prints.
const MAX_RUN_LOG_LINES: usize = 10_000;

/// Namespace, pod, container.
pub(super) type ContainerKey = (String, String, String);

/// Output of all containers of a node.
#[derive(Default)]
pub(super) struct NodeLogs(Mutex<HashMap<ContainerKey, ContainerLogs>>);

/// Logs of a container.
#[derive(Clone, Default)]
pub(super) struct ContainerLogs {
    /// Last reason for waiting.
    pub(super) waits: String,
    /// Log of the last run; `previous` is the one before.
    pub(super) last: Option<Arc<RunLog>>,
    pub(super) previous: Option<Arc<RunLog>>,
}

/// Output of one run of a container.
pub(super) struct RunLog {
    lines: Mutex<VecDeque<ContainerLogLine>>,
    progress: watch::Sender<LogProgress>,
}

#[derive(Clone)]
pub(super) struct ContainerLogLine {
    /// Time by the node's clock.
    pub(super) at: SystemTime,
    pub(super) text: String,
}

/// Progress of a log.
#[derive(Clone, Copy, Default)]
pub(super) struct LogProgress {
    /// Number of lines so far.
    pub(super) lines: usize,
    /// The log is complete.
    pub(super) ended: bool,
}

// === impl NodeLogs ===

impl NodeLogs {
    /// Records the reason why a container waits.
    pub(super) fn waits(&self, key: ContainerKey, reason: &str) {
        reason.clone_into(&mut self.0.lock().entry(key).or_default().waits);
    }

    /// Starts the log of a new run.
    pub(super) fn begin(&self, key: ContainerKey) -> Arc<RunLog> {
        let log = Arc::new(RunLog { lines: Mutex::default(), progress: watch::Sender::default() });
        let mut logs = self.0.lock();
        let kept = logs.entry(key).or_default();
        kept.previous = kept.last.replace(log.clone());
        log
    }

    pub(super) fn find(&self, key: &ContainerKey) -> Option<ContainerLogs> {
        self.0.lock().get(key).cloned()
    }

    /// Deletes the logs of a pod.
    pub(super) fn forget(&self, namespace: &str, pod: &str) {
        self.0.lock().retain(|(of, name, _), _| (of.as_str(), name.as_str()) != (namespace, pod));
    }
}

// === impl RunLog ===

impl RunLog {
    pub(super) fn push(&self, at: SystemTime, text: &str) {
        let mut lines = self.lines.lock();
        if lines.len() == MAX_RUN_LOG_LINES {
            lines.pop_front();
        }
        lines.push_back(ContainerLogLine { at, text: text.to_owned() });
        self.progress.send_modify(|progress| progress.lines += 1);
    }

    pub(super) fn end(&self) {
        self.progress.send_modify(|progress| progress.ended = true);
    }

    pub(super) fn progress(&self) -> watch::Receiver<LogProgress> {
        self.progress.subscribe()
    }

    /// Returns the lines from number `first` on, counted from the first line ever, and the number of lines so far.
    pub(super) fn from(&self, first: usize) -> (Vec<ContainerLogLine>, usize) {
        let lines = self.lines.lock();
        let count = self.progress.borrow().lines;
        let gone = count - lines.len();
        (lines.iter().skip(first.saturating_sub(gone)).cloned().collect(), count)
    }
}

// === impl Task ===

impl Task {
    pub(super) fn key(&self) -> ContainerKey {
        (self.pod.namespace().unwrap_or_default(), self.pod.name_any(), self.container.name.clone())
    }
}
