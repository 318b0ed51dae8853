//! What can go wrong with a request, whose fault it is, and the one table that says how it is answered.

use std::{borrow::Cow, fmt, time::Duration};

use http::StatusCode;
use thiserror::Error;
use tonic::Code;

use crate::domain::{ByteCount, FailureDetail, Period, Reason, RouteKey, withhold_addresses};

/// How a request ended. Every admitted request has exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The answer went out to its last byte, whatever its status.
    Completed,
    /// The client hung up first.
    ClientGone,
    /// Its deadline came before an endpoint did.
    ColdStartTimeout,
    /// The target could not be started.
    ColdStartFailed,
    /// The endpoint failed it, and it could not be sent again.
    UpstreamError,
    /// The client stopped reading its answer.
    ClientStalled,
    /// We were told to stop.
    Draining,
    /// A defect of ours.
    Internal,
}

/// Why a request was not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// No API path.
    UnknownPath,
    /// An API path, but not with this method.
    MethodNotAllowed,
    /// No route serves the model.
    ModelNotFound,
    /// A web page of another site sent it, or its host is another site's.
    CrossSite,
    /// It cannot be read.
    InvalidRequest,
    /// Its body is encoded in a way that hides the model.
    UnsupportedEncoding,
    /// Its body is larger than what we buffer.
    RequestTooLarge,
    /// Its body came too slowly.
    RequestTimeout,
    /// Nothing is up, and as many as may wait do.
    HoldQueueFull,
    /// Endpoints are up and full, and as many as may wait do.
    Saturated,
    /// It would have to wait, and asked not to.
    NoWait,
    /// The target is at zero, and autoscaling is paused.
    AutoscalingPaused,
    /// We are about to stop, and nothing is up.
    Draining,
}

/// Who has to do something about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// Whoever sent the request.
    Client,
    /// This proxy, its configuration or its limits.
    Us,
    /// The model server or what starts it.
    Upstream,
}

/// What can go wrong with a request. The text is what operators read; of [`ProxyError::for_client`], what the client does.
#[derive(Clone, Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum ProxyError {
    #[error(
        "Unknown path: {}. Anteroom serves the OpenAI API under /v1, for example POST /v1/chat/completions.",
        echo(.0)
    )]
    UnknownPath(String),
    #[error("{} wants {allowed}.", echo(.path))]
    MethodNotAllowed { path: String, allowed: &'static str },
    #[error("The model `{}` does not exist here. GET /v1/models lists those that do.", echo(.0))]
    ModelNotFound(String),
    #[error("{}", cross_site(.0.as_deref()))]
    CrossSite(Option<String>),
    #[error(
        "The request is for the host `{}`, which is none of this proxy's. If it is one, add it to `allowedHosts` or to \
         `match.hosts` of a route.",
        echo(.0)
    )]
    ForeignHost(String),
    #[error("{}", Cut(.0, MAX_MESSAGE_CHARS))]
    InvalidRequest(String),
    /// Two readers could read it two ways: nothing behind it on its connection is read.
    #[error("{0}")]
    Ambiguous(String),
    #[error(
        "Content-Encoding `{}` hides the model name, by which this request is routed: send the body as it is.",
        echo(.0)
    )]
    UnsupportedEncoding(String),
    #[error("The request body is larger than the {limit} bytes that are allowed.")]
    RequestTooLarge { limit: usize },
    #[error("{}", too_slow(*.pause, *.rate))]
    RequestTimeout { pause: Duration, rate: ByteCount },
    #[error("`{route}` is starting, and its waiting room is full: {reason}.")]
    HoldQueueFull { route: RouteKey, reason: String, retry_after: Option<Duration> },
    #[error("The waiting room is full: the bodies of all requests would take more than {0} bytes.")]
    BuffersFull(usize),
    #[error("Only a model server can answer {}, and none is running; this path starts none.", echo(.0))]
    NotKept(String),
    #[error("None of the model servers that are up has the response `{}`.", echo(.0))]
    NoSuchResponse(String),
    #[error("`{route}` is busy, and its waiting room is full: {reason}.")]
    Saturated { route: RouteKey, reason: String },
    #[error("`{route}` cannot take the request at once, and it asked not to wait.")]
    NoWait { route: RouteKey, retry_after: Option<Duration> },
    #[error("`{route}` is at zero, and nothing may start it. {reason}")]
    AutoscalingPaused { route: RouteKey, reason: Reason },
    #[error(
        "`{route}` did not become ready within the {} that this request may wait ({limit}).{}",
        Period::from(*.waited), because(.reason.as_deref())
    )]
    ColdStartTimeout {
        route: RouteKey,
        waited: Duration,
        limit: &'static str,
        /// What stands in the way, as far as is known.
        reason: Option<Reason>,
        retry_after: Option<Duration>,
    },
    #[error("`{route}` could not be started{}: {reason}", again(*.retry_after))]
    ColdStartFailed {
        route: RouteKey,
        reason: Reason,
        /// `None`: the start before failed for the same reason.
        retry_after: Option<Duration>,
    },
    #[error("`{route}` failed: {reason}")]
    UpstreamError { route: RouteKey, reason: String },
    /// Of a route that serves anything, which tells the two apart as gateways do.
    #[error("`{route}` did not answer in time: {reason}")]
    UpstreamTimeout { route: RouteKey, reason: String },
    #[error("This server is shutting down; send the request again.")]
    Draining { admitted: bool },
    #[error("An internal error, which is a defect of Anteroom.")]
    Internal,
}

/// How an error is answered. `docs/errors.md` is checked against this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: StatusCode,
    /// OpenAI's `error.type`.
    pub kind: &'static str,
    /// Anthropic's `error.type`.
    pub anthropic: &'static str,
    /// gRPC's status.
    pub grpc: Code,
    /// OpenAI's `error.code`.
    pub code: &'static str,
    /// `x-should-retry`: what the SDKs should do, where their default would be wrong.
    pub should_retry: Option<bool>,
    /// Whose fault it is.
    pub blame: Blame,
}

/// Text with at most so many characters. An error must not cost more memory than the request that it answers.
struct Cut<'a>(&'a str, usize);

/// Characters of a client's text that an error repeats.
const MAX_ECHO_CHARS: usize = 128;

/// Follows a reason without the output of the model server.
const OUTPUT_ELSEWHERE: &str =
    ". What it printed is in Anteroom's log and, under this request's id (x-request-id), in its admin API";

/// Characters of an error that says what is wrong with a request, the client's text included.
const MAX_MESSAGE_CHARS: usize = 1000;

/// The longest `Retry-After` that we send: openai-python up to 2.8 ignores more than 60 s.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

// === impl Cut ===

impl fmt::Display for Cut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(text, max_chars) = self;
        match text.char_indices().nth(*max_chars) {
            Some((end, _)) => write!(f, "{}… ({} bytes)", &text[..end], text.len()),
            None => f.write_str(text),
        }
    }
}

fn echo(text: &str) -> impl fmt::Display {
    Cut(text, MAX_ECHO_CHARS)
}

// === impl Outcome ===

impl Outcome {
    /// Every outcome, in the order of its number.
    pub const ALL: [Self; 8] = [
        Self::Completed,
        Self::ClientGone,
        Self::ColdStartTimeout,
        Self::ColdStartFailed,
        Self::UpstreamError,
        Self::ClientStalled,
        Self::Draining,
        Self::Internal,
    ];

    /// Its name in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::ClientGone => "client_gone",
            Self::ColdStartTimeout => "cold_start_timeout",
            Self::ColdStartFailed => "cold_start_failed",
            Self::UpstreamError => "upstream_error",
            Self::ClientStalled => "client_stalled",
            Self::Draining => "draining",
            Self::Internal => "internal",
        }
    }
}

// === impl Refusal ===

impl Refusal {
    /// Every reason, in the order of its number.
    pub const ALL: [Self; 13] = [
        Self::UnknownPath,
        Self::MethodNotAllowed,
        Self::ModelNotFound,
        Self::CrossSite,
        Self::InvalidRequest,
        Self::UnsupportedEncoding,
        Self::RequestTooLarge,
        Self::RequestTimeout,
        Self::HoldQueueFull,
        Self::Saturated,
        Self::NoWait,
        Self::AutoscalingPaused,
        Self::Draining,
    ];

    /// How it is answered; the code is also its name in metrics and logs.
    pub const fn answer(self) -> Answer {
        use Blame::{Client, Us};
        use Code::{
            FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable,
            Unimplemented,
        };
        // OpenAI's type, Anthropic's type, gRPC's status; gRPC's clients retry `Unavailable`.
        const REQUEST: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        const RATE: &str = "rate_limit_error";
        const NONE: &str = "not_found_error";
        const FORBIDDEN: &str = "permission_error";
        const LARGE: &str = "request_too_large";
        const BUSY: &str = "overloaded_error";
        const API: &str = "api_error";
        match self {
            Self::UnknownPath => {
                answer(404, "unknown_path", [REQUEST, NONE], Unimplemented, Some(false), Client)
            }
            Self::MethodNotAllowed => {
                answer(405, "method_not_allowed", [REQUEST, REQUEST], Unimplemented, Some(false), Client)
            }
            Self::ModelNotFound => {
                answer(404, "model_not_found", [REQUEST, NONE], NotFound, Some(false), Client)
            }
            Self::CrossSite => {
                answer(403, "cross_site", [REQUEST, FORBIDDEN], PermissionDenied, Some(false), Client)
            }
            Self::InvalidRequest => {
                answer(400, "invalid_request", [REQUEST, REQUEST], InvalidArgument, Some(false), Client)
            }
            Self::UnsupportedEncoding => {
                answer(415, "unsupported_encoding", [REQUEST, REQUEST], InvalidArgument, Some(false), Client)
            }
            Self::RequestTooLarge => {
                answer(413, "request_too_large", [REQUEST, LARGE], ResourceExhausted, Some(false), Client)
            }
            Self::RequestTimeout => {
                answer(408, "request_timeout", [REQUEST, REQUEST], InvalidArgument, None, Client)
            }
            Self::HoldQueueFull => {
                answer(503, "hold_queue_full", [SERVER, BUSY], Unavailable, Some(true), Us)
            }
            Self::Saturated => answer(429, "saturated", [RATE, RATE], Unavailable, Some(true), Us),
            Self::NoWait => answer(503, "no_wait", [SERVER, BUSY], Unavailable, Some(true), Client),
            // Somebody has to resume it first: the SDKs would retry in vain.
            Self::AutoscalingPaused => {
                answer(503, "autoscaling_paused", [SERVER, API], FailedPrecondition, Some(false), Us)
            }
            Self::Draining => answer(503, "draining", [SERVER, BUSY], Unavailable, Some(true), Us),
        }
    }
}

// === impl ProxyError ===

impl ProxyError {
    /// How the request ended, if it had been admitted; else why it was not.
    pub const fn ending(&self) -> Result<Outcome, Refusal> {
        match self {
            Self::UnknownPath(_) | Self::NotKept(_) | Self::NoSuchResponse(_) => Err(Refusal::UnknownPath),
            Self::MethodNotAllowed { .. } => Err(Refusal::MethodNotAllowed),
            Self::ModelNotFound(_) => Err(Refusal::ModelNotFound),
            Self::CrossSite(_) | Self::ForeignHost(_) => Err(Refusal::CrossSite),
            Self::InvalidRequest(_) | Self::Ambiguous(_) => Err(Refusal::InvalidRequest),
            Self::UnsupportedEncoding(_) => Err(Refusal::UnsupportedEncoding),
            Self::RequestTooLarge { .. } => Err(Refusal::RequestTooLarge),
            Self::RequestTimeout { .. } => Err(Refusal::RequestTimeout),
            Self::HoldQueueFull { .. } | Self::BuffersFull(_) => Err(Refusal::HoldQueueFull),
            Self::Saturated { .. } => Err(Refusal::Saturated),
            Self::NoWait { .. } => Err(Refusal::NoWait),
            Self::AutoscalingPaused { .. } => Err(Refusal::AutoscalingPaused),
            Self::Draining { admitted: false } => Err(Refusal::Draining),
            Self::Draining { admitted: true } => Ok(Outcome::Draining),
            Self::ColdStartTimeout { .. } => Ok(Outcome::ColdStartTimeout),
            Self::ColdStartFailed { .. } => Ok(Outcome::ColdStartFailed),
            Self::UpstreamError { .. } | Self::UpstreamTimeout { .. } => Ok(Outcome::UpstreamError),
            Self::Internal => Ok(Outcome::Internal),
        }
    }

    /// What a client reads of it. Displayed itself, it is for logs and operators.
    pub fn for_client(&self, detail: FailureDetail) -> Cow<'_, Self> {
        if detail == FailureDetail::Full {
            return Cow::Borrowed(self);
        }
        let mut error = self.clone();
        match &mut error {
            Self::UpstreamError { reason, .. } | Self::UpstreamTimeout { reason, .. } => {
                *reason = withhold_addresses(reason).into_owned();
            }
            Self::ColdStartFailed { reason, .. }
            | Self::AutoscalingPaused { reason, .. }
            | Self::ColdStartTimeout { reason: Some(reason), .. } => {
                let brief = reason.for_client(detail);
                let has_output = reason.has_output();
                *reason = if has_output { format!("{}{OUTPUT_ELSEWHERE}", &*brief).into() } else { brief };
            }
            _ => return Cow::Borrowed(self),
        }
        Cow::Owned(error)
    }

    /// The one mapping of errors to answers.
    pub const fn answer(&self) -> Answer {
        use Blame::{Upstream, Us};
        use Code::{DeadlineExceeded, FailedPrecondition, Internal, Unavailable};
        const API: [&str; 2] = ["server_error", "api_error"];
        const TIMEOUT: [&str; 2] = ["server_error", "timeout_error"];
        match self {
            Self::UpstreamTimeout { .. } => {
                return answer(504, "upstream_timeout", TIMEOUT, DeadlineExceeded, Some(false), Upstream);
            }
            // What failed twice in the same way will fail again: somebody has to mend it first.
            Self::ColdStartFailed { retry_after: None, .. } => {
                return answer(503, "cold_start_failed", API, FailedPrecondition, Some(false), Upstream);
            }
            _ => {}
        }
        match self.ending() {
            Err(refusal) => refusal.answer(),
            Ok(Outcome::ColdStartTimeout) => {
                answer(504, "cold_start_timeout", TIMEOUT, Unavailable, Some(true), Upstream)
            }
            // Its Retry-After is the back-off of the start; whether a retry helps, the SDK's default may decide.
            Ok(Outcome::ColdStartFailed) => {
                answer(503, "cold_start_failed", API, Unavailable, None, Upstream)
            }
            // It reached a server, perhaps twice: a request that crashes servers must not be sent round again.
            Ok(Outcome::UpstreamError) => answer(502, "upstream_error", API, Internal, Some(false), Upstream),
            Ok(Outcome::Draining) => Refusal::Draining.answer(),
            Ok(_) => answer(500, "internal", API, Internal, None, Us),
        }
    }

    /// The close code of a WebSocket that ends so after its upgrade (RFC 6455, section 7.4.1, and IANA's registry): the
    /// service restarts, or met something unexpected.
    pub const fn close_code(&self) -> u16 {
        match self {
            Self::Draining { .. } => 1012,
            _ => 1011,
        }
    }

    /// `Retry-After`, where waiting helps.
    pub fn retry_after(&self) -> Option<Duration> {
        const DEFAULT: Duration = Duration::from_secs(5);
        let wait = match self {
            Self::HoldQueueFull { retry_after, .. }
            | Self::NoWait { retry_after, .. }
            | Self::ColdStartTimeout { retry_after, .. } => retry_after.unwrap_or(DEFAULT),
            Self::ColdStartFailed { retry_after, .. } => (*retry_after)?,
            Self::Saturated { .. } | Self::BuffersFull(_) | Self::Draining { .. } => Duration::from_secs(1),
            _ => return None,
        };
        Some(wait.clamp(Duration::from_secs(1), MAX_RETRY_AFTER))
    }

    /// OpenAI's `error.param`: which part of the request is meant.
    pub const fn param(&self) -> Option<&'static str> {
        match self {
            Self::ModelNotFound(_) => Some("model"),
            _ => None,
        }
    }
}

fn cross_site(origin: Option<&str>) -> String {
    let page = origin.map_or("another site".to_owned(), |origin| format!("`{}`", echo(origin)));
    format!(
        "A web page of {page} sent the request, and pages of other origins may not. Add the page's origin to \
         `cors.origins` to allow it."
    )
}

fn too_slow(pause: Duration, rate: ByteCount) -> String {
    let pause = Period::from(pause);
    let on_average = match rate.get() {
        0 => String::new(),
        _ => format!(", or came with less than {rate} a second on average"),
    };
    format!("The request body paused for more than {pause}{on_average}.")
}

/// What is added to a text whose reason is known.
fn because(reason: Option<&str>) -> String {
    reason.map(|reason| format!(" {reason}")).unwrap_or_default()
}

/// What is added to the text of a start that failed as the one before did.
const fn again(retry_after: Option<Duration>) -> &'static str {
    if retry_after.is_none() { ", twice for the same reason" } else { "" }
}

/// The type of an error in Anthropic's API that came from a model server as this status.
pub const fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 | 529 => "overloaded_error",
        504 => "timeout_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    }
}

const fn answer(
    status: u16,
    code: &'static str,
    [kind, anthropic]: [&'static str; 2],
    grpc: Code,
    should_retry: Option<bool>,
    blame: Blame,
) -> Answer {
    let Ok(status) = StatusCode::from_u16(status) else { panic!("an HTTP status") };
    Answer { status, kind, anthropic, grpc, code, should_retry, blame }
}
