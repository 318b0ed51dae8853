//! Looking for the first token of the answer that a cold start waits for. Other answers are not looked at.

use std::sync::Arc;

use http::{Response, request};

use super::{
    forward::{self, REQUEST_ID},
    traced,
};
use crate::{
    admission::{Gate, Permit},
    coldstart::FirstAnswer,
    openai,
    telemetry::traces::Parent,
};

/// Tells the cold start of the first token or, when dropped before that, that there will be none.
pub(super) struct TokenWatch {
    gate: Arc<Gate>,
    cold_start: u64,
    token: openai::FirstToken,
}

impl TokenWatch {
    /// An answer begins. There is something to watch if it is the first one after a cold start, and streams. An error is
    /// an answer, too: where it is the first, the record ends with it, and has no first token.
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

    /// The next part of the answer. True once the first token is in.
    pub(super) fn sees(&mut self, part: &[u8]) -> bool {
        let is_in = self.token.is_in(part);
        if is_in {
            self.gate.cold_starts().first_token(self.cold_start);
        }
        is_in
    }
}

impl Drop for TokenWatch {
    fn drop(&mut self) {
        // Where there was one, this says nothing new.
        self.gate.cold_starts().ended_without_token(self.cold_start);
    }
}
