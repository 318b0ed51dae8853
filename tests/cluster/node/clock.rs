//! The clock of a node, which may be wrong: what the node stamps is by it, and what really happened is not.

use std::time::{Duration, SystemTime};

/// How far a node's clock is off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Clock {
    #[default]
    Right,
    Ahead(Duration),
    Behind(Duration),
}

// === impl Clock ===

impl Clock {
    pub(crate) fn now(self) -> SystemTime {
        self.reads(SystemTime::now())
    }

    /// What it shows at a moment.
    pub(crate) fn reads(self, at: SystemTime) -> SystemTime {
        match self {
            Self::Right => at,
            Self::Ahead(by) => at + by,
            Self::Behind(by) => at - by,
        }
    }
}
