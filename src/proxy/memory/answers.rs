//! Memory of the proxy's own responses until they have been sent.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use thiserror::Error;

use super::totals::{Memory, take};
use crate::config::budget::{ANSWER_COST_BYTES, max_answer_bytes};

/// A response of the proxy, counted until its bytes are sent.
struct CountedBytes {
    bytes: Bytes,
    memory: Arc<Memory>,
    cost: usize,
}

/// Error for a response that exceeds the memory of unread responses.
#[derive(Debug, Error)]
#[error("no memory is left for answers that are not read")]
pub struct AnswersFull;

// === impl Memory ===

impl Memory {
    /// Counts a response of the proxy until its bytes are sent. Bytes with other owners add nothing to its fixed cost.
    ///
    /// # Errors
    /// There is no room. Does not apply to the only response of its connection (`is_only`), as connections bound those.
    pub(in crate::proxy) fn answer(
        self: &Arc<Self>,
        bytes: Bytes,
        is_only: bool,
    ) -> Result<Bytes, AnswersFull> {
        let cost = ANSWER_COST_BYTES + if bytes.is_unique() { bytes.len() } else { 0 };
        let max = if is_only { usize::MAX } else { self.max_answers() };
        if !take(&self.answers, cost, max) {
            return Err(AnswersFull);
        }
        Ok(Bytes::from_owner(CountedBytes { bytes, memory: self.clone(), cost }))
    }

    /// Returns `true` if unread responses take more than half of their bound, so that they must end sooner.
    pub(in crate::proxy) fn is_short_of_answers(&self) -> bool {
        self.answers.load(Ordering::Relaxed) > self.max_answers() / 2
    }

    fn max_answers(&self) -> usize {
        max_answer_bytes(self.max())
    }
}

// === impl CountedBytes ===

impl AsRef<[u8]> for CountedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for CountedBytes {
    fn drop(&mut self) {
        self.memory.answers.fetch_sub(self.cost, Ordering::Relaxed);
    }
}
