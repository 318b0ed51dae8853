//! Learning the ids of responses that model servers store.

use std::sync::Arc;

use http::{StatusCode, request};

use super::{ResponseAffinity, background::Background};
use crate::{
    admission::Gate,
    openai,
    proxy::{Shared, lease::Lease},
    state::Endpoint,
};

/// Looks for the id in the answer to a request that makes a response.
pub(in crate::proxy) struct ResponseIdWatch {
    seen: Vec<u8>,
    shared: Arc<Shared>,
    gate: Arc<Gate>,
    endpoint: Arc<Endpoint>,
    background: Option<Background>,
}

/// How much of an answer is looked at for the id of the response.
const MAX_WATCHED_BYTES: usize = 16 << 10;

// === impl ResponseIdWatch ===

impl ResponseIdWatch {
    /// Looks for the id in an answer, if the request makes a response.
    pub(in crate::proxy) fn watch(
        kept: &ResponseAffinity,
        status: StatusCode,
        head: &request::Parts,
        shared: &Arc<Shared>,
        lease: &Lease,
    ) -> Option<Box<Self>> {
        if !kept.makes || !status.is_success() {
            return None;
        }
        let (gate, endpoint) = (lease.permit.gate().clone(), lease.permit.endpoint().clone());
        let background = kept.background.then(|| Background::new(head, lease));
        Some(Box::new(Self { seen: Vec::new(), shared: shared.clone(), gate, endpoint, background }))
    }

    /// The next part of the answer. True once there is nothing more to look for.
    pub(in crate::proxy) fn sees(&mut self, part: &[u8]) -> bool {
        let room = MAX_WATCHED_BYTES - self.seen.len();
        self.seen.extend_from_slice(&part[..part.len().min(room)]);
        let Some(id) = openai::response_id(&self.seen) else { return self.seen.len() == MAX_WATCHED_BYTES };
        self.shared.responses.remember(id, &self.gate, &self.endpoint);
        if let Some(background) = self.background.take() {
            background.follow(id);
        }
        true
    }
}
