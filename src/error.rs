//! Errors of a request, the party at fault, and the single table that maps them to responses.

use std::{borrow::Cow, fmt, time::Duration};

use http::StatusCode;
use strum::{IntoStaticStr, VariantArray};
use thiserror::Error;
use tonic::Code;

use crate::domain::{ByteCount, FailureDetail, Period, Reason, RouteKey, withhold_addresses};

/// End of a request; every admitted request has exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Outcome {
    /// The response was sent to its last byte, whatever its status.
    Completed,
    /// The client disconnected first.
    ClientGone,
    /// No endpoint was ready before the deadline.
    ColdStartTimeout,
    /// The target failed to start.
    ColdStartFailed,
    /// The endpoint failed the request, which could not be retried.
    UpstreamError,
    /// The client stopped reading the response.
    ClientStalled,
    /// The proxy was shut down.
    Draining,
    /// A bug in the proxy.
    Internal,
}

/// Reason for rejecting a request before admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, VariantArray)]
pub enum Refusal {
    /// Not an API path.
    UnknownPath,
    /// An API path with a wrong method.
    MethodNotAllowed,
    /// No route serves the model.
    ModelNotFound,
    /// Sent by a web page of another site, or with a Host that is not allowed.
    CrossSite,
    /// The request cannot be parsed.
    InvalidRequest,
    /// The body's encoding hides the model.
    UnsupportedEncoding,
    /// The body exceeds the buffer limit.
    RequestTooLarge,
    /// The body arrived too slowly.
    RequestTimeout,
    /// Nothing is ready, and the hold queue is full.
    HoldQueueFull,
    /// Endpoints are at capacity, and the hold queue is full.
    Saturated,
    /// The request would be held but asked not to wait.
    NoWait,
    /// The target is at zero, and autoscaling is paused.
    AutoscalingPaused,
    /// The proxy is about to shut down, and nothing is ready.
    Draining,
}

/// Party that has to act on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The client.
    Client,
    /// This proxy, its configuration or its limits.
    Us,
    /// The model server, or the launcher or autoscaler that starts it.
    Upstream,
}

/// Error of a request. `Display` is for logs and operators; clients get [`ProxyError::for_client`].
#[derive(Clone, Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum ProxyError {
    #[error(
        "Unknown path: {}. Anteroom serves the OpenAI API under /v1, for example POST /v1/chat/completions.",
        echo(.0)
    )]
    UnknownPath(String),
    #[error("{} only accepts {allowed}.", echo(.path))]
    MethodNotAllowed { path: String, allowed: &'static str },
    #[error("The model `{}` does not exist. GET /v1/models lists the available models.", echo(.0))]
    ModelNotFound(String),
    #[error("{}", cross_site(.0.as_deref()))]
    CrossSite(Option<String>),
    #[error(
        "The host `{}` is not allowed. To allow it, add it to `allowedHosts` or to `match.hosts` of a route.",
        echo(.0)
    )]
    ForeignHost(String),
    #[error("{}", Truncated(.0, MAX_MESSAGE_CHARS))]
    InvalidRequest(String),
    /// The request can be parsed in two ways (request smuggling), so nothing after it on the connection is read.
    #[error("{0}")]
    Ambiguous(String),
    #[error(
        "Content-Encoding `{}` hides the model name needed for routing. Send the body without encoding.",
        echo(.0)
    )]
    UnsupportedEncoding(String),
    #[error("The request body exceeds the limit of {limit} bytes.")]
    RequestTooLarge { limit: usize },
    #[error("{}", too_slow(*.pause, *.rate))]
    RequestTimeout { pause: Duration, rate: ByteCount },
    #[error("`{route}` is starting, and its hold queue is full: {reason}.")]
    HoldQueueFull { route: RouteKey, reason: String, retry_after: Option<Duration> },
    #[error("Request buffers are full: all request bodies together may take {0} bytes.")]
    BuffersFull(usize),
    #[error("{} needs a running model server, and this path does not start one.", echo(.0))]
    NotKept(String),
    #[error("No running model server has the response `{}`.", echo(.0))]
    NoSuchResponse(String),
    #[error("`{route}` is at capacity, and its hold queue is full: {reason}.")]
    Saturated { route: RouteKey, reason: String },
    #[error("`{route}` has no capacity right now, and the request asked not to wait.")]
    NoWait { route: RouteKey, retry_after: Option<Duration> },
    #[error("`{route}` is at zero and cannot be started. {reason}")]
    AutoscalingPaused { route: RouteKey, reason: Reason },
    #[error(
        "`{route}` did not become ready within {} ({limit}).{}",
        Period::from(*.waited), reason_suffix(.reason.as_deref())
    )]
    ColdStartTimeout {
        route: RouteKey,
        waited: Duration,
        limit: &'static str,
        /// Obstacle to the start, if known.
        reason: Option<Reason>,
        retry_after: Option<Duration>,
    },
    #[error("`{route}` could not be started{}: {reason}", repeated_failure_suffix(*.retry_after))]
    ColdStartFailed {
        route: RouteKey,
        reason: Reason,
        /// `None` after two failures for the same reason.
        retry_after: Option<Duration>,
    },
    #[error("`{route}` failed: {reason}")]
    UpstreamError { route: RouteKey, reason: String },
    /// Only for routes that serve any HTTP application; like gateways, they distinguish it from `UpstreamError`.
    #[error("`{route}` did not answer in time: {reason}")]
    UpstreamTimeout { route: RouteKey, reason: String },
    #[error("This replica is shutting down; retry the request.")]
    Draining { admitted: bool },
    #[error("Internal error: a bug in Anteroom. Please report it; the log has the details.")]
    Internal,
}

/// Response to an error. `docs/errors.md` is checked against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorResponse {
    /// HTTP status.
    pub status: StatusCode,
    /// `error.type` of the OpenAI API.
    pub kind: &'static str,
    /// `error.type` of the Anthropic API.
    pub anthropic: &'static str,
    /// gRPC status.
    pub grpc: Code,
    /// `error.code` of the OpenAI API.
    pub code: &'static str,
    /// `x-should-retry`, where the default of SDKs would be wrong.
    pub should_retry: Option<bool>,
    /// Party at fault.
    pub blame: Blame,
}

/// Text truncated to a number of characters. An error must not take more memory than its request.
struct Truncated<'a>(&'a str, usize);

/// Maximum number of characters that an error repeats from a client's text.
const MAX_ECHO_CHARS: usize = 128;

/// Appended to a reason whose output of the model server is withheld from the client.
const OUTPUT_ELSEWHERE: &str =
    ". Its output is in Anteroom's log and, under this request's id (x-request-id), in the admin API.";

/// Maximum number of characters of an error in a request, including the client's text.
const MAX_MESSAGE_CHARS: usize = 1000;

/// Maximum `Retry-After`: openai-python up to 2.8 ignores more than 60 s.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

// === impl Truncated ===

impl fmt::Display for Truncated<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(text, max_chars) = self;
        match text.char_indices().nth(*max_chars) {
            Some((end, _)) => write!(f, "{}… ({} bytes)", &text[..end], text.len()),
            None => f.write_str(text),
        }
    }
}

fn echo(text: &str) -> impl fmt::Display {
    Truncated(text, MAX_ECHO_CHARS)
}

// === impl Outcome ===

impl Outcome {
    /// All outcomes, in the order of their discriminants.
    pub const ALL: [Self; Self::VARIANTS.len()] = *Self::VARIANTS.first_chunk().unwrap();

    /// Returns the name used in metrics and logs.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

// === impl Refusal ===

impl Refusal {
    /// All refusals, in the order of their discriminants.
    pub const ALL: [Self; Self::VARIANTS.len()] = *Self::VARIANTS.first_chunk().unwrap();

    /// Returns the response. Its code is also the name in metrics and logs.
    pub const fn answer(self) -> ErrorResponse {
        use Blame::{Client, Us};
        use Code::{
            FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable,
            Unimplemented,
        };
        // Error types of OpenAI and Anthropic. gRPC clients retry `Unavailable`.
        const INVALID_REQUEST_ERROR: &str = "invalid_request_error";
        const SERVER_ERROR: &str = "server_error";
        const RATE_LIMIT_ERROR: &str = "rate_limit_error";
        const NOT_FOUND_ERROR: &str = "not_found_error";
        const PERMISSION_ERROR: &str = "permission_error";
        const REQUEST_TOO_LARGE: &str = "request_too_large";
        const OVERLOADED_ERROR: &str = "overloaded_error";
        const API_ERROR: &str = "api_error";
        match self {
            Self::UnknownPath => answer(
                404,
                "unknown_path",
                [INVALID_REQUEST_ERROR, NOT_FOUND_ERROR],
                Unimplemented,
                Some(false),
                Client,
            ),
            Self::MethodNotAllowed => answer(
                405,
                "method_not_allowed",
                [INVALID_REQUEST_ERROR, INVALID_REQUEST_ERROR],
                Unimplemented,
                Some(false),
                Client,
            ),
            Self::ModelNotFound => answer(
                404,
                "model_not_found",
                [INVALID_REQUEST_ERROR, NOT_FOUND_ERROR],
                NotFound,
                Some(false),
                Client,
            ),
            Self::CrossSite => answer(
                403,
                "cross_site",
                [INVALID_REQUEST_ERROR, PERMISSION_ERROR],
                PermissionDenied,
                Some(false),
                Client,
            ),
            Self::InvalidRequest => answer(
                400,
                "invalid_request",
                [INVALID_REQUEST_ERROR, INVALID_REQUEST_ERROR],
                InvalidArgument,
                Some(false),
                Client,
            ),
            Self::UnsupportedEncoding => answer(
                415,
                "unsupported_encoding",
                [INVALID_REQUEST_ERROR, INVALID_REQUEST_ERROR],
                InvalidArgument,
                Some(false),
                Client,
            ),
            Self::RequestTooLarge => answer(
                413,
                "request_too_large",
                [INVALID_REQUEST_ERROR, REQUEST_TOO_LARGE],
                ResourceExhausted,
                Some(false),
                Client,
            ),
            Self::RequestTimeout => answer(
                408,
                "request_timeout",
                [INVALID_REQUEST_ERROR, INVALID_REQUEST_ERROR],
                InvalidArgument,
                None,
                Client,
            ),
            Self::HoldQueueFull => {
                answer(503, "hold_queue_full", [SERVER_ERROR, OVERLOADED_ERROR], Unavailable, Some(true), Us)
            }
            Self::Saturated => {
                answer(429, "saturated", [RATE_LIMIT_ERROR, RATE_LIMIT_ERROR], Unavailable, Some(true), Us)
            }
            Self::NoWait => {
                answer(503, "no_wait", [SERVER_ERROR, OVERLOADED_ERROR], Unavailable, Some(true), Client)
            }
            // Retries fail until an operator resumes autoscaling.
            Self::AutoscalingPaused => answer(
                503,
                "autoscaling_paused",
                [SERVER_ERROR, API_ERROR],
                FailedPrecondition,
                Some(false),
                Us,
            ),
            Self::Draining => {
                answer(503, "draining", [SERVER_ERROR, OVERLOADED_ERROR], Unavailable, Some(true), Us)
            }
        }
    }
}

// === impl ProxyError ===

impl ProxyError {
    /// Returns the outcome of an admitted request, or the reason for rejecting it.
    pub const fn outcome_or_refusal(&self) -> Result<Outcome, Refusal> {
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

    /// Redacts the error for clients.
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

    /// Maps the error to its response.
    pub const fn answer(&self) -> ErrorResponse {
        use Blame::{Upstream, Us};
        use Code::{DeadlineExceeded, FailedPrecondition, Internal, Unavailable};
        const API: [&str; 2] = ["server_error", "api_error"];
        const TIMEOUT: [&str; 2] = ["server_error", "timeout_error"];
        match self {
            Self::UpstreamTimeout { .. } => {
                return answer(504, "upstream_timeout", TIMEOUT, DeadlineExceeded, Some(false), Upstream);
            }
            // A start that failed twice for the same reason fails again until it is fixed.
            Self::ColdStartFailed { retry_after: None, .. } => {
                return answer(503, "cold_start_failed", API, FailedPrecondition, Some(false), Upstream);
            }
            _ => {}
        }
        match self.outcome_or_refusal() {
            Err(refusal) => refusal.answer(),
            Ok(Outcome::ColdStartTimeout) => {
                answer(504, "cold_start_timeout", TIMEOUT, Unavailable, Some(true), Upstream)
            }
            // `Retry-After` is the backoff of the start; the SDK's default decides on a retry.
            Ok(Outcome::ColdStartFailed) => {
                answer(503, "cold_start_failed", API, Unavailable, None, Upstream)
            }
            // A request that crashes servers must not be retried.
            Ok(Outcome::UpstreamError) => answer(502, "upstream_error", API, Internal, Some(false), Upstream),
            Ok(Outcome::Draining) => Refusal::Draining.answer(),
            Ok(_) => answer(500, "internal", API, Internal, None, Us),
        }
    }

    /// Returns the close code for a WebSocket that fails after its upgrade (RFC 6455, section 7.4.1, and IANA's
    /// registry): service restart or unexpected condition.
    pub const fn close_code(&self) -> u16 {
        match self {
            Self::Draining { .. } => 1012,
            _ => 1011,
        }
    }

    /// Returns `Retry-After` if waiting helps.
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

    /// Returns `error.param` of the OpenAI API, the part of the request at fault.
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
        "Cross-origin requests from web pages of {page} are not allowed. To allow them, add the origin to `cors.origins`."
    )
}

fn too_slow(pause: Duration, rate: ByteCount) -> String {
    let pause = Period::from(pause);
    let on_average = match rate.get() {
        0 => String::new(),
        _ => format!(", or averaged less than {rate} per second"),
    };
    format!("The request body paused for more than {pause}{on_average}.")
}

/// Formats the reason as the end of a sentence; empty without a reason.
fn reason_suffix(reason: Option<&str>) -> String {
    reason.map(|reason| format!(" {reason}")).unwrap_or_default()
}

/// Returns the suffix for a start that failed like the one before.
const fn repeated_failure_suffix(retry_after: Option<Duration>) -> &'static str {
    if retry_after.is_none() { ", twice for the same reason" } else { "" }
}

/// Returns the Anthropic error type for a model server's status.
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
) -> ErrorResponse {
    let Ok(status) = StatusCode::from_u16(status) else { panic!("invalid HTTP status") };
    ErrorResponse { status, kind, anthropic, grpc, code, should_retry, blame }
}
