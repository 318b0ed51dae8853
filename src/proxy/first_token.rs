//! Detection of the first token, which ends the record of a cold start.

use std::sync::Arc;

use http::{Response, request};

use super::{
    forward::{self, REQUEST_ID},
    request_trace,
};
use crate::{
    admission::{Gate, Permit},
    coldstart::FirstAnswer,
    openai,
    telemetry::traces::Parent,
};

/// Reports the first token to the cold start; on drop, its absence.
pub(super) struct TokenWatch {
    gate: Arc<Gate>,
    cold_start: u64,
    token: openai::FirstToken,
}

impl TokenWatch {
    /// Returns a watch for the first response after a cold start if it streams. Any other first response, including an
    /// error, ends the record without a first token.
    pub(super) fn begin<B>(
        permit: &Permit,
        request: &request::Parts,
        response: &Response<B>,
    ) -> Option<Box<Self>> {
        let cold_start = permit.answered(|| FirstAnswer {
            streams: openai::FirstToken::may_be_in(response.status(), response.headers()),
            request_id: request.headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).map(Into::into),
            trace_id: forward::trace_id(&request.headers).map(Into::into),
            is_traced: request_trace::parent(&request.headers).is_some_and(Parent::is_sampled),
        });
        let gate = permit.gate();
        cold_start.map(|cold_start| Box::new(Self { gate: gate.clone(), cold_start, token: <_>::default() }))
    }

    /// Takes the next part of the body. Returns `true` once it has the first token.
    pub(super) fn observe(&mut self, part: &[u8]) -> bool {
        let is_in = self.token.is_in(part);
        if is_in {
            self.gate.cold_starts().first_token(self.cold_start);
        }
        is_in
    }
}

impl Drop for TokenWatch {
    fn drop(&mut self) {
        // No effect if a token has been reported.
        self.gate.cold_starts().ended_without_token(self.cold_start);
    }
}
