//! Actual events of pods, with their times: the ground truth for cold-start records.

use std::{
    fmt::{self, Display},
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;

/// Event of a pod on its node, or of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeEventKind {
    /// The node received the pod.
    Bound,
    /// The pull of the image began.
    Pulling,
    /// The image is present.
    Pulled,
    /// A process of the pod was started.
    Started,
    /// The server logged that it is listening, which is before the node's next probe can find out.
    Answers,
    /// The node found the pod ready, and is about to report it.
    Ready,
    /// The node found the pod no longer ready.
    Unready,
    /// A process of the pod exited with this code (128 and more: by a signal).
    Exited(i32),
    /// The node received the pod's deletion.
    Terminating,
    /// A process of the pod got SIGTERM.
    Signalled,
    /// A process of the pod got SIGKILL at the end of its grace period.
    Killed,
    /// The pod object is deleted.
    Gone,
    /// A node object is about to be created: its creation is after this event.
    Registers,
    /// A node object has been created: its creation is before this event.
    Registered,
    /// The node is usable, and is about to report it.
    NodeReady,
}

/// Event with its time.
#[derive(Clone, Debug)]
pub(crate) struct NodeEvent {
    pub(crate) at: SystemTime,
    pub(crate) namespace: String,
    /// Name of the pod or node.
    pub(crate) pod: String,
    pub(crate) what: NodeEventKind,
}

/// All events of all nodes, in order.
#[derive(Clone, Default)]
pub(crate) struct NodeHistory(Arc<Mutex<Vec<NodeEvent>>>);

// === impl NodeHistory ===

impl NodeHistory {
    /// Records an event that happens now. Returns its time.
    pub(crate) fn note(&self, namespace: &str, pod: &str, what: NodeEventKind) -> SystemTime {
        let mut moments = self.0.lock();
        // Within the lock, so that times are in order.
        let at = SystemTime::now();
        moments.push(NodeEvent { at, namespace: namespace.into(), pod: pod.into(), what });
        at
    }

    /// Returns the events of a namespace.
    pub(crate) fn of(&self, namespace: &str) -> Vec<NodeEvent> {
        self.0.lock().iter().filter(|moment| moment.namespace == namespace).cloned().collect()
    }

    /// Returns the time of the first such event of any pod of the namespace.
    pub(crate) fn first(&self, namespace: &str, what: NodeEventKind) -> Option<SystemTime> {
        self.of(namespace).into_iter().find(|moment| moment.what == what).map(|moment| moment.at)
    }
}

impl Display for NodeEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:?}", humantime::format_rfc3339_millis(self.at), self.pod, self.what)
    }
}
