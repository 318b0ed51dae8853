//! Reasons for a missing response head.

use std::{io, time::Duration};

use strum::IntoStaticStr;
use thiserror::Error;

use super::dial::is_starved;
use crate::domain::Period;

/// Reason for a missing response head.
#[derive(Debug, Error, IntoStaticStr)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
#[strum(serialize_all = "snake_case")]
pub enum SendError {
    #[error("cannot connect to {address}: {source}")]
    Connect { address: Box<str>, source: io::Error },
    #[error("connecting to {0} timed out")]
    ConnectTimeout(Box<str>),
    #[error("{address} broke the connection off before it answered: {}", chain(.source))]
    Reset { address: Box<str>, source: hyper::Error },
    /// The connection was severed by the endpoint's publisher. A server may have seen the request, but nothing will
    /// answer it.
    #[error("{0} is gone: its pod was deleted or has died")]
    Gone(Box<str>),
    #[error("the request body was aborted: {0}")]
    #[strum(serialize = "request_body")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error(
        "{address} answered with more than {limit} header fields, or with a head of more than 64 KiB; \
         raise the route's `upstream.maxResponseHeaders` if that is intended"
    )]
    HeadTooLarge { address: Box<str>, limit: usize },
    #[error("{address} sent no response head within {}", Period::from(*.limit))]
    ResponseTimeout { address: Box<str>, limit: Duration },
}

// === impl SendError ===

impl SendError {
    /// Returns a short name for metrics and records.
    pub fn name(&self) -> &'static str {
        self.into()
    }

    /// Returns whether the failure is local: out of file descriptors, ports or memory.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Connect { source, .. } if is_starved(source))
    }
}

/// Formats an error with its sources in one line; hyper does not include them.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
