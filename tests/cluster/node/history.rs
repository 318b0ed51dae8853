//! What really happened to pods, and when: the truth that cold-start records are compared with.

use std::{
    fmt::{self, Display},
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;

/// What can happen to a pod on its node, and to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The node has learned of it.
    Bound,
    /// Its image is being pulled.
    Pulling,
    /// Its image is there.
    Pulled,
    /// A process of it has been started.
    Started,
    /// Its server has said that it listens; before the next probe of the node could know.
    Answers,
    /// The node has found it ready, and is about to say so.
    Ready,
    /// The node has found it not ready any more.
    Unready,
    /// A process of it has ended, with this code (128 and more: by a signal).
    Exited(i32),
    /// The node has learned that it is to end.
    Terminating,
    /// A process of it got SIGTERM.
    Signalled,
    /// A process of it got SIGKILL, since its grace was over.
    Killed,
    /// The object is gone.
    Gone,
    /// A node is about to be created: its object is after that...
    Registers,
    /// ... and before this.
    Registered,
    /// The node may be used, and is about to say so.
    NodeReady,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub(crate) struct Moment {
    pub(crate) at: SystemTime,
    pub(crate) namespace: String,
    /// The pod, or the node.
    pub(crate) pod: String,
    pub(crate) what: What,
}

/// Everything that happened on all nodes, in its order.
#[derive(Clone, Default)]
pub(crate) struct History(Arc<Mutex<Vec<Moment>>>);

// === impl History ===

impl History {
    /// It happens now, which is returned.
    pub(crate) fn note(&self, namespace: &str, pod: &str, what: What) -> SystemTime {
        let mut moments = self.0.lock();
        // Within the lock, so that they are in order.
        let at = SystemTime::now();
        moments.push(Moment { at, namespace: namespace.into(), pod: pod.into(), what });
        at
    }

    /// What happened in a namespace.
    pub(crate) fn of(&self, namespace: &str) -> Vec<Moment> {
        self.0.lock().iter().filter(|moment| moment.namespace == namespace).cloned().collect()
    }

    /// When it first happened to any pod of the namespace.
    pub(crate) fn first(&self, namespace: &str, what: What) -> Option<SystemTime> {
        self.of(namespace).into_iter().find(|moment| moment.what == what).map(|moment| moment.at)
    }
}

impl Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:?}", humantime::format_rfc3339_millis(self.at), self.pod, self.what)
    }
}
