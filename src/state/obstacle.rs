//! Obstacles to the start of a target.

use tokio::time::Instant;

use super::Cause;
use crate::domain::{ObstacleKind, Reason};

/// Reason why a target does not start, worded for waiting clients.
#[derive(Clone, Debug)]
pub struct Obstacle {
    /// Kind of the obstacle.
    pub kind: ObstacleKind,
    /// A sentence that names the object and, if there is one, the remedy.
    pub message: Reason,
    /// Time of its first observation.
    pub since: Instant,
}

// === impl Obstacle ===

impl Obstacle {
    /// Creates an obstacle that begins now.
    pub fn new(kind: ObstacleKind, message: impl Into<Reason>) -> Self {
        Self { kind, message: message.into(), since: Instant::now() }
    }

    /// Returns the cause of a start that fails because of this obstacle: lack of capacity may pass, everything else has
    /// to be fixed.
    pub const fn cause(&self) -> Cause {
        match self.kind {
            ObstacleKind::Unschedulable | ObstacleKind::Quota => Cause::Passing,
            _ => Cause::Lasting,
        }
    }

    /// Returns whether both have the same kind and message.
    pub fn is_same(&self, other: &Self) -> bool {
        self.kind == other.kind && self.message == other.message
    }
}
