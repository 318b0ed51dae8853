//! Clients that are behind with reading: the memory that is kept for them, and the time that they have.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    memory::{Memory, UnreadKind, UnreadShare},
    pace::{Allowed, Pace},
};

/// A client, or one of its streams, that may be behind with reading.
#[derive(Debug)]
pub(super) struct Stall {
    pace: Pace,
    /// Armed while the client is behind.
    timer: Option<Pin<Box<Sleep>>>,
    /// Memory that counts while the client is behind.
    share: Option<UnreadShare>,
}

/// Memory that is kept for a client which does not read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kept {
    /// Nothing beyond what its connection counts for.
    Nothing,
    /// An answer of ours, which counts by itself.
    Answer,
    /// So many bytes at most of what comes from a model server.
    Unread(UnreadKind, usize),
}

/// Time that an answer of ours may not be read while there is little memory left for those.
const UNREAD_ANSWER_TIME: Duration = Duration::from_secs(1);

/// Time between two looks at the memory, which sends no notification when it gets short.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

// === impl Stall ===

impl Stall {
    pub(super) const fn new(allowed: Allowed) -> Self {
        Self { pace: Pace::new(allowed), timer: None, share: None }
    }

    /// The client has taken so many bytes, or has all there is (`usize::MAX`).
    pub(super) fn moved(&mut self, bytes: usize) {
        self.pace.moved(bytes);
        self.share = None;
    }

    /// The client takes nothing at the moment. Is ready when it has done so for too long.
    pub(super) fn poll_over(&mut self, memory: &Arc<Memory>, kept: Kept, cx: &mut Context<'_>) -> Poll<()> {
        let due = self.pace.waits();
        if let Kept::Unread(kind, bytes) = kept
            && self.share.is_none()
        {
            self.share = Some(memory.count_unread(kind, bytes));
        }
        loop {
            let now = Instant::now();
            let is_short = match kept {
                Kept::Nothing => false,
                Kept::Answer => self.pace.waited() >= UNREAD_ANSWER_TIME && memory.is_short_of_answers(),
                Kept::Unread(..) => memory.max_unread_time().is_some_and(|max| self.pace.behind() >= max),
            };
            if due <= now || is_short {
                return Poll::Ready(());
            }
            let next = match kept {
                Kept::Nothing => due,
                Kept::Answer | Kept::Unread(..) => due.min(now + CHECK_INTERVAL),
            };
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(next)));
            if timer.deadline() > next || timer.is_elapsed() {
                timer.as_mut().reset(next);
            }
            // One that fires too early, or later again, only looks again.
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// The client has all there is, and no time runs.
    pub(super) fn rest(&mut self) {
        self.moved(usize::MAX);
        self.timer = None;
    }
}
