//! Relation of a request to stored responses.

use crate::state::Endpoint;

/// Relation of a request to stored responses.
pub(in crate::proxy) struct ResponseAffinity {
    /// Id of the only endpoint that may serve the request.
    pub(in crate::proxy) pin: Option<u64>,
    /// The request creates a response.
    pub(super) creates: bool,
    /// The request has `background: true`.
    pub(super) background: bool,
}

// === impl ResponseAffinity ===

impl ResponseAffinity {
    /// Pins a request to the endpoint of the response that it asks for.
    pub(in crate::proxy) fn at(endpoint: &Endpoint) -> Self {
        Self { pin: Some(endpoint.id()), creates: false, background: false }
    }
}
