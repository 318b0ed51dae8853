//! Clock of a node, which may be wrong: the node's timestamps use it, the history does not.

use std::time::{Duration, SystemTime};

/// Offset of a node's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum NodeClock {
    #[default]
    Right,
    Ahead(Duration),
    Behind(Duration),
}

// === impl NodeClock ===

impl NodeClock {
    pub(crate) fn now(self) -> SystemTime {
        self.reads(SystemTime::now())
    }

    /// Returns the clock's reading at a moment.
    pub(crate) fn reads(self, at: SystemTime) -> SystemTime {
        match self {
            Self::Right => at,
            Self::Ahead(by) => at + by,
            Self::Behind(by) => at - by,
        }
    }
}
