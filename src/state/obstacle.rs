//! What stands in the way of a target.

use tokio::time::Instant;

use super::Cause;
use crate::domain::{ObstacleKind, Reason};

/// Why a target does not come up, in words for whoever waits for it.
#[derive(Clone, Debug)]
pub struct Obstacle {
    /// What it is.
    pub kind: ObstacleKind,
    /// A sentence that names the object and, where there is one, the way out.
    pub message: Reason,
    /// Since when it has been there.
    pub since: Instant,
}

// === impl Obstacle ===

impl Obstacle {
    /// One that is there from now on.
    pub fn new(kind: ObstacleKind, message: impl Into<Reason>) -> Self {
        Self { kind, message: message.into(), since: Instant::now() }
    }

    /// What it makes of a start that fails by it: capacity comes and goes, the rest somebody has to mend.
    pub const fn cause(&self) -> Cause {
        match self.kind {
            ObstacleKind::Unschedulable | ObstacleKind::Quota => Cause::Passing,
            _ => Cause::Lasting,
        }
    }

    /// Whether the other one says the same.
    pub fn is_same(&self, other: &Self) -> bool {
        self.kind == other.kind && self.message == other.message
    }
}
