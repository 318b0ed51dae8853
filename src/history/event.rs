//! Events of a request, from which its timeline and its trace derive.

use serde::Serialize;

/// An event of a request. Those that are not serialised are no entries of the timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The request arrived.
    Arrived,
    /// The request was enqueued.
    Held {
        /// Position in the queue, from 1.
        position: usize,
        /// Reason of the wait.
        why: HoldReason,
    },
    /// The wait ended.
    #[serde(skip)]
    Dequeued {
        /// `id` of the cold start that held the request.
        cold_start: Option<u64>,
    },
    /// The client got status 200 early, and gets heartbeats.
    EarlyAnswer,
    /// A heartbeat was sent.
    #[serde(skip)]
    Heartbeat,
    /// The request was dispatched to an endpoint.
    Dispatched {
        /// `host:port`.
        endpoint: Box<str>,
    },
    /// The endpoint's response head arrived. It may be a gateway's, which leads to a retry.
    #[serde(skip)]
    HeadArrived {
        /// Status from the endpoint.
        status: u16,
    },
    /// The exchange with the endpoint ended.
    #[serde(skip)]
    AttemptEnded {
        /// Cause of a failure.
        error: Option<&'static str>,
    },
    /// The dispatch failed, and may be retried.
    DispatchFailed {
        /// `host:port`.
        endpoint: Box<str>,
        /// Cause of the failure.
        reason: Box<str>,
    },
    /// The wait failed, and the request went to the fallback.
    FellBack,
    /// The answer began.
    FirstByte {
        /// Status from the endpoint.
        status: u16,
    },
    /// The first token of the answer; only of the answer that ended a cold start.
    FirstToken,
    /// The request ended.
    Ended {
        /// Outcome, or refusal.
        outcome: &'static str,
        /// Status of the answer, or the one that an early 200 has replaced; absent without an answer.
        #[serde(skip_serializing_if = "Option::is_none")]
        status: Option<u16>,
    },
}

/// Reason of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HoldReason {
    /// No endpoint is ready.
    NothingReady,
    /// All ready endpoints are full.
    Saturated,
    /// A dispatch failed; the preceding event has the reason.
    DispatchFailed,
}

/// Maximum length of an endpoint, reason or path kept, in bytes.
pub(super) const MAX_EVENT_TEXT_BYTES: usize = 256;

// === impl Event ===

impl Event {
    /// Creates the event of a dispatch.
    pub fn dispatched(endpoint: &str) -> Self {
        Self::Dispatched { endpoint: bounded(endpoint, MAX_EVENT_TEXT_BYTES) }
    }

    /// Creates the event of a failed dispatch.
    pub fn dispatch_failed(endpoint: &str, reason: &str) -> Self {
        let endpoint = bounded(endpoint, MAX_EVENT_TEXT_BYTES);
        Self::DispatchFailed { endpoint, reason: bounded(reason, MAX_EVENT_TEXT_BYTES) }
    }

    pub(super) const fn bytes(&self) -> usize {
        match self {
            Self::Dispatched { endpoint } => endpoint.len(),
            Self::DispatchFailed { endpoint, reason } => endpoint.len() + reason.len(),
            _ => 0,
        }
    }
}

/// Copies at most `max_bytes`.
pub(super) fn bounded(text: &str, max_bytes: usize) -> Box<str> {
    text[..text.floor_char_boundary(max_bytes)].into()
}
