//! Memory of request bodies.

use std::{
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use super::{
    arriving::{ArrivingBody, Newcomer, Owner},
    totals::Memory,
};

/// Bytes reserved for one request body, released on drop.
#[derive(Debug)]
pub struct Share {
    memory: Arc<Memory>,
    owner: Owner,
    bytes: ShareBytes,
}

/// Bytes of a share, by how they are counted.
#[derive(Debug)]
enum ShareBytes {
    Finished(usize),
    /// Parts of a streamed body, kept for a retry.
    Kept(usize),
    /// An unfinished body, which may be evicted.
    Arriving(Arc<ArrivingBody>),
}

// === impl Memory ===

impl Memory {
    /// Creates an empty share for a body that is read to its end before it is sent.
    pub(in crate::proxy) fn share(self: &Arc<Self>, owner: Owner) -> Share {
        Share { memory: self.clone(), owner, bytes: ShareBytes::Finished(0) }
    }

    /// Creates an empty share for the kept parts of a streamed body, until its reader [waits](Share::wait).
    pub(in crate::proxy) fn kept_share(self: &Arc<Self>, owner: Owner) -> Share {
        Share { memory: self.clone(), owner, bytes: ShareBytes::Kept(0) }
    }
}

// === impl Share ===

impl Share {
    /// Reserves more bytes. Returns `false`, and reserves none, if there is no room or the body has been evicted.
    pub(in crate::proxy) fn grow(&mut self, bytes: usize) -> bool {
        let memory = &self.memory;
        let is_taken = match &self.bytes {
            // Parts kept only for a retry evict nothing.
            ShareBytes::Kept(_) => memory.take_kept(bytes),
            body => {
                memory.take_or_evict(bytes, matches!(body, ShareBytes::Arriving(_)), Some(self.newcomer()))
            }
        };
        match &mut self.bytes {
            _ if !is_taken => false,
            ShareBytes::Finished(all) | ShareBytes::Kept(all) => {
                *all += bytes;
                true
            }
            ShareBytes::Arriving(arrival) => {
                let is_kept = arrival.add(bytes);
                if !is_kept {
                    memory.give_back(bytes, true);
                }
                is_kept
            }
        }
    }

    /// Returns the reserved bytes.
    pub(in crate::proxy) fn bytes(&self) -> usize {
        match &self.bytes {
            ShareBytes::Finished(bytes) | ShareBytes::Kept(bytes) => *bytes,
            ShareBytes::Arriving(arrival) => arrival.bytes(),
        }
    }

    /// Returns the bound of all request bodies, in bytes.
    pub(in crate::proxy) fn max(&self) -> usize {
        self.memory.max()
    }

    /// Makes the body evictable, as its reader waits for more of it. Returns `false` if there is no room for an
    /// unfinished body of this size.
    pub(in crate::proxy) fn wait(&mut self) -> bool {
        let bytes = match self.bytes {
            // Nothing to evict, or evictable already.
            ShareBytes::Finished(0) | ShareBytes::Arriving(_) => return true,
            ShareBytes::Finished(bytes) => {
                let memory = &self.memory;
                let missing = || memory.missing_unfinished(bytes);
                if !memory.find_room(bytes, Some(self.newcomer()), missing, || memory.take_unfinished(bytes))
                {
                    return false;
                }
                bytes
            }
            ShareBytes::Kept(bytes) => {
                self.memory.kept.fetch_sub(bytes, Ordering::Relaxed);
                bytes
            }
        };
        self.bytes = ShareBytes::Arriving(self.memory.arriving.lock().add(self.owner, bytes));
        true
    }

    /// Completes once the body is evicted.
    pub(in crate::proxy) fn poll_evicted(&self, cx: &Context<'_>) -> Poll<()> {
        let ShareBytes::Arriving(arrival) = &self.bytes else { return Poll::Pending };
        arrival.poll_evicted(cx)
    }

    /// Ends evictability, as the whole body has arrived. Returns `false` if the body has been evicted.
    pub(in crate::proxy) fn finish(&mut self) -> bool {
        let (bytes, is_whole) = match &self.bytes {
            ShareBytes::Finished(_) => return true,
            ShareBytes::Kept(bytes) => {
                self.memory.kept.fetch_sub(*bytes, Ordering::Relaxed);
                (*bytes, true)
            }
            ShareBytes::Arriving(arrival) => {
                self.memory.arriving.lock().remove(self.owner, arrival);
                (arrival.bytes(), !arrival.is_evicted())
            }
        };
        self.memory.unfinished.fetch_sub(bytes, Ordering::Relaxed);
        self.bytes = ShareBytes::Finished(bytes);
        is_whole
    }

    fn newcomer(&self) -> Newcomer<'_> {
        let arrival = match &self.bytes {
            ShareBytes::Arriving(arrival) => Some(arrival),
            ShareBytes::Finished(_) | ShareBytes::Kept(_) => None,
        };
        Newcomer { owner: self.owner, arrival }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.finish();
        self.memory.give_back(self.bytes(), false);
    }
}
