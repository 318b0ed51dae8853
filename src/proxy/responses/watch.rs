//! Recording the endpoints of new stored responses.

use std::sync::Arc;

use http::{StatusCode, request};

use super::{affinity::ResponseAffinity, background::BackgroundResponse};
use crate::{
    admission::Gate,
    openai,
    proxy::{lease::Lease, shared::Shared},
    state::Endpoint,
};

/// Extracts the id from a response body, and records its endpoint.
pub(in crate::proxy) struct ResponseIdWatch {
    seen: Vec<u8>,
    shared: Arc<Shared>,
    gate: Arc<Gate>,
    endpoint: Arc<Endpoint>,
    background: Option<BackgroundResponse>,
}

/// Length of the part of a body that is searched for the id.
const MAX_WATCHED_BYTES: usize = 16 << 10;

// === impl ResponseIdWatch ===

impl ResponseIdWatch {
    /// Returns a watch if the request creates a response and has succeeded.
    pub(in crate::proxy) fn watch(
        affinity: &ResponseAffinity,
        status: StatusCode,
        head: &request::Parts,
        shared: &Arc<Shared>,
        lease: &Lease,
    ) -> Option<Box<Self>> {
        if !affinity.creates || !status.is_success() {
            return None;
        }
        let (gate, endpoint) = (lease.permit.gate().clone(), lease.permit.endpoint().clone());
        let background = affinity.background.then(|| BackgroundResponse::new(head, lease));
        Some(Box::new(Self { seen: Vec::new(), shared: shared.clone(), gate, endpoint, background }))
    }

    /// Takes the next part of the body. Returns `true` when the watch is done.
    pub(in crate::proxy) fn observe(&mut self, part: &[u8]) -> bool {
        let room = MAX_WATCHED_BYTES - self.seen.len();
        self.seen.extend_from_slice(&part[..part.len().min(room)]);
        let Some(id) = openai::response_id(&self.seen) else { return self.seen.len() == MAX_WATCHED_BYTES };
        self.shared.responses.record(id, &self.gate, &self.endpoint);
        if let Some(background) = self.background.take() {
            background.follow(id);
        }
        true
    }
}
