//! Clients that are behind with reading: the memory held for them, and their time limit.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    memory::{Memory, UnreadKind, UnreadShare},
    pace::{Pace, PaceLimit},
};

/// Watch over a client, or one of its streams, that may be behind with reading.
#[derive(Debug)]
pub(super) struct Stall {
    pace: Pace,
    /// Armed while the client is behind.
    timer: Option<Pin<Box<Sleep>>>,
    /// Memory counted while the client is behind.
    share: Option<UnreadShare>,
}

/// Memory held for a client that does not read.
#[derive(Clone, Copy, Debug)]
pub(super) enum HeldMemory {
    /// Nothing beyond the cost of its connection.
    Nothing,
    /// A response of the proxy, which is counted separately.
    Answer,
    /// Data from a model server, of at most this many bytes.
    Unread(UnreadKind, usize),
}

/// Time a response of the proxy may stay unread while the memory for such responses is short.
const UNREAD_ANSWER_TIME: Duration = Duration::from_secs(1);

/// Interval of checks whether memory is short, of which there is no notification.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

// === impl Stall ===

impl Stall {
    pub(super) const fn new(allowed: PaceLimit) -> Self {
        Self { pace: Pace::new(allowed), timer: None, share: None }
    }

    /// Records that the client has taken `bytes`, or all there is (`usize::MAX`).
    pub(super) fn credit_read(&mut self, bytes: usize) {
        self.pace.credit_bytes(bytes);
        self.share = None;
    }

    /// Polls the limit of a client that takes nothing at the moment. Completes when it has been exceeded.
    pub(super) fn poll_over(
        &mut self,
        memory: &Arc<Memory>,
        kept: HeldMemory,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let due = self.pace.start_waiting();
        if let HeldMemory::Unread(kind, bytes) = kept
            && self.share.is_none()
        {
            self.share = Some(memory.count_unread(kind, bytes));
        }
        loop {
            let now = Instant::now();
            let is_short = match kept {
                HeldMemory::Nothing => false,
                HeldMemory::Answer => {
                    self.pace.waited() >= UNREAD_ANSWER_TIME && memory.is_short_of_answers()
                }
                HeldMemory::Unread(..) => {
                    memory.max_unread_time().is_some_and(|max| self.pace.behind() >= max)
                }
            };
            if due <= now || is_short {
                return Poll::Ready(());
            }
            let next = match kept {
                HeldMemory::Nothing => due,
                HeldMemory::Answer | HeldMemory::Unread(..) => due.min(now + CHECK_INTERVAL),
            };
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(next)));
            if timer.deadline() > next || timer.is_elapsed() {
                timer.as_mut().reset(next);
            }
            // A timer that fires early, or again later, only repeats the check.
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// Stops the clock, as the client has taken all there is.
    pub(super) fn stop_clock(&mut self) {
        self.credit_read(usize::MAX);
        self.timer = None;
    }
}
