//! What containers print, as kubelet keeps it for whoever asks: line by line, with the time at which it came.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::SystemTime,
};

use kube::ResourceExt as _;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::container::Task;

/// Lines that are kept of one life of a container: more than any stand-in prints.
const KEPT: usize = 10_000;

/// Namespace, pod, container.
pub(super) type Key = (String, String, String);

/// The output of all containers of a node.
#[derive(Default)]
pub(super) struct Logs(Mutex<HashMap<Key, Kept>>);

/// What is kept of a container.
#[derive(Clone, Default)]
pub(super) struct Kept {
    /// What it waits for, or waited for last.
    pub(super) waits: String,
    /// Its lives: the last, and the one before.
    pub(super) last: Option<Arc<Log>>,
    pub(super) previous: Option<Arc<Log>>,
}

/// The output of one life of a container.
pub(super) struct Log {
    lines: Mutex<VecDeque<Line>>,
    progress: watch::Sender<Progress>,
}

#[derive(Clone)]
pub(super) struct Line {
    /// By the clock of the node.
    pub(super) at: SystemTime,
    pub(super) text: String,
}

/// How far a log has come.
#[derive(Clone, Copy, Default)]
pub(super) struct Progress {
    /// How many lines there have been.
    pub(super) lines: usize,
    /// There will be no more.
    pub(super) ended: bool,
}

// === impl Logs ===

impl Logs {
    /// The container waits for this.
    pub(super) fn waits(&self, key: Key, reason: &str) {
        reason.clone_into(&mut self.0.lock().entry(key).or_default().waits);
    }

    /// A life of it begins.
    pub(super) fn begin(&self, key: Key) -> Arc<Log> {
        let log = Arc::new(Log { lines: Mutex::default(), progress: watch::Sender::default() });
        let mut logs = self.0.lock();
        let kept = logs.entry(key).or_default();
        kept.previous = kept.last.replace(log.clone());
        log
    }

    pub(super) fn find(&self, key: &Key) -> Option<Kept> {
        self.0.lock().get(key).cloned()
    }

    /// The pod has gone, and its logs with it.
    pub(super) fn forget(&self, namespace: &str, pod: &str) {
        self.0.lock().retain(|(of, name, _), _| (of.as_str(), name.as_str()) != (namespace, pod));
    }
}

// === impl Log ===

impl Log {
    pub(super) fn push(&self, at: SystemTime, text: &str) {
        let mut lines = self.lines.lock();
        if lines.len() == KEPT {
            lines.pop_front();
        }
        lines.push_back(Line { at, text: text.to_owned() });
        self.progress.send_modify(|progress| progress.lines += 1);
    }

    pub(super) fn end(&self) {
        self.progress.send_modify(|progress| progress.ended = true);
    }

    pub(super) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// The lines from this one on, counted from the first that there ever was; and how many there have been.
    pub(super) fn from(&self, first: usize) -> (Vec<Line>, usize) {
        let lines = self.lines.lock();
        let count = self.progress.borrow().lines;
        let gone = count - lines.len();
        (lines.iter().skip(first.saturating_sub(gone)).cloned().collect(), count)
    }
}

// === impl Task ===

impl Task {
    pub(super) fn key(&self) -> Key {
        (self.pod.namespace().unwrap_or_default(), self.pod.name_any(), self.container.name.clone())
    }
}
