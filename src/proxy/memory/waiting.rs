//! Memory held only because a client has yet to send more: of incomplete heads, and of requests without their bodies.
//! When it is needed elsewhere, the entries that have waited longest are evicted.

use std::{
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use super::totals::{Memory, WaitingEntry};

/// Memory of a connection or request that waits for its client, released on drop.
#[derive(Debug)]
pub struct WaitingShare {
    memory: Arc<Memory>,
    number: u64,
}

// === impl Memory ===

impl Memory {
    /// Takes memory for an entry that starts to wait. Returns `None` if there is no room even after evictions.
    fn wait(self: &Arc<Self>, bytes: usize, cx: &Context<'_>) -> Option<WaitingShare> {
        if !self.take_or_evict(bytes, true, None) {
            return None;
        }
        let mut waiting = self.waiting.lock();
        waiting.newest += 1;
        let number = waiting.newest;
        waiting.all.insert(number, WaitingEntry { bytes, task: cx.waker().clone() });
        self.heads.fetch_add(bytes, Ordering::Relaxed);
        drop(waiting);
        Some(WaitingShare { memory: self.clone(), number })
    }

    /// Keeps `share` at `bytes` while a connection or request waits; 0 takes nothing. Completes if there is no room, or
    /// once the share is evicted.
    pub(in crate::proxy) fn poll_waiting(
        self: &Arc<Self>,
        share: &mut Option<WaitingShare>,
        bytes: usize,
        cx: &Context<'_>,
    ) -> Poll<()> {
        match share {
            _ if bytes == 0 => return Poll::Pending,
            Some(share) => return share.poll_evicted(bytes, cx),
            None => *share = self.wait(bytes, cx),
        }
        if share.is_some() { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Evicts the entries that have waited longest, until `bytes` are free. Returns `false`, and evicts none, if all of
    /// them together have less.
    pub(super) fn evict_waiting(&self, bytes: usize) -> bool {
        // Usually there are none; saves taking the lock.
        if self.heads.load(Ordering::Relaxed) < bytes {
            return false;
        }
        let mut waiting = self.waiting.lock();
        let (mut freed, mut evicted) = (0, 0_usize);
        while freed < bytes
            && let Some((_, oldest)) = waiting.all.pop_first()
        {
            self.give_back_waiting(oldest.bytes);
            oldest.task.wake();
            freed += oldest.bytes;
            evicted += 1;
        }
        drop(waiting);
        if evicted > 0 {
            tracing::debug!(
                evicted,
                "evicted heads and requests that await their bodies to free memory for others"
            );
        }
        freed >= bytes
    }

    fn give_back_waiting(&self, bytes: usize) {
        self.heads.fetch_sub(bytes, Ordering::Relaxed);
        self.give_back(bytes, true);
    }
}

// === impl WaitingShare ===

impl WaitingShare {
    /// Grows the share to `bytes` in total, and wakes the task on eviction. Completes if the share has been evicted or
    /// there is no room.
    fn poll_evicted(&self, bytes: usize, cx: &Context<'_>) -> Poll<()> {
        let memory = &self.memory;
        let mut more = 0;
        loop {
            let mut waiting = memory.waiting.lock();
            let Some(entry) = waiting.all.get_mut(&self.number) else {
                memory.give_back(more, true);
                return Poll::Ready(());
            };
            entry.bytes += more;
            memory.heads.fetch_add(more, Ordering::Relaxed);
            entry.task.clone_from(cx.waker());
            more = bytes.saturating_sub(entry.bytes);
            drop(waiting);
            if more == 0 {
                return Poll::Pending;
            }
            if !memory.take_or_evict(more, true, None) {
                return Poll::Ready(());
            }
        }
    }
}

impl Drop for WaitingShare {
    fn drop(&mut self) {
        let entry = self.memory.waiting.lock().all.remove(&self.number);
        if let Some(entry) = entry {
            self.memory.give_back_waiting(entry.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;
    use crate::proxy::memory::Owner;

    const KIB: usize = 1024;

    /// Incomplete heads and unfinished bodies may take 300 of 400 KiB.
    #[test]
    fn oldest_head_is_evicted_for_heads_and_bodies() {
        let memory = Memory::new(400 * KIB);
        let cx = Context::from_waker(Waker::noop());
        let wait = |bytes: usize| memory.wait(bytes * KIB, &cx);
        let is_evicted = |share: &WaitingShare| share.poll_evicted(0, &cx).is_ready();
        let oldest = wait(60).unwrap();
        let [second, third, fourth] = [100, 100, 40].map(|bytes| wait(bytes).unwrap());
        assert_eq!((memory.heads.load(Ordering::Relaxed), memory.bodies()), (300 * KIB, 0));
        let newest = wait(10).unwrap();
        assert!(is_evicted(&oldest) && !is_evicted(&second));
        drop(oldest);
        // A head that grows evicts older ones.
        assert!(third.poll_evicted(200 * KIB, &cx).is_pending());
        assert!(is_evicted(&second) && !is_evicted(&third) && !is_evicted(&fourth));
        let mut body = memory.share(Owner::default());
        assert!(body.grow(320 * KIB));
        assert!(is_evicted(&third) && !is_evicted(&fourth), "200 KiB of it for 170 that are missing");
        assert!(!body.grow(320 * KIB), "evicting all would not be enough");
        assert!(!is_evicted(&fourth) && !is_evicted(&newest));
        drop((second, third, fourth, newest, body));
        assert!(memory.kinds().iter().all(|(_, bytes)| *bytes == 0), "{:?}", memory.kinds());
    }

    #[test]
    fn head_that_finds_no_room_evicts_no_other() {
        let memory = Memory::new(400 * KIB);
        let cx = Context::from_waker(Waker::noop());
        let mut body = memory.share(Owner::default());
        assert!(body.grow(250 * KIB) && body.wait());
        let first = memory.wait(40 * KIB, &cx).unwrap();
        assert!(memory.wait(60 * KIB, &cx).is_none());
        assert!(first.poll_evicted(0, &cx).is_pending());
        // The head that grows is itself the oldest, and is evicted.
        assert!(first.poll_evicted(70 * KIB, &cx).is_ready());
    }
}
