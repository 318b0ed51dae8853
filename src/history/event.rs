//! Events of a request.

use serde::Serialize;

/// An event of a request.
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
    /// The client got status 200 early, and gets heartbeats.
    EarlyAnswer,
    /// The request was dispatched to an endpoint.
    Dispatched {
        /// `host:port`.
        endpoint: Box<str>,
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
    /// A dispatch failed: see the event before.
    DispatchFailed,
}

// === impl Event ===

impl Event {
    pub(super) const fn bytes(&self) -> usize {
        match self {
            Self::Dispatched { endpoint } => endpoint.len(),
            Self::DispatchFailed { endpoint, reason } => endpoint.len() + reason.len(),
            _ => 0,
        }
    }
}
