//! Complete responses, and errors in vLLM's format.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use serde::Serialize;
use serde_json::json;
use std::convert::Infallible;

pub(super) type SimResponse = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// An error in vLLM's format, with the numeric status as `code`.
#[derive(Debug)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) kind: &'static str,
    pub(super) param: Option<&'static str>,
    pub(super) message: String,
}

pub(super) const PLAIN_TEXT: &str = "text/plain; charset=utf-8";

pub(super) fn of_type(content_type: &'static str, body: impl Into<Bytes>) -> SimResponse {
    let mut answer = Response::new(Full::new(body.into()).boxed_unsync());
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

pub(super) fn text(body: impl Into<Bytes>) -> SimResponse {
    of_type(PLAIN_TEXT, body)
}

pub(super) fn json(body: &impl Serialize) -> SimResponse {
    of_type("application/json", encode(body))
}

pub(super) fn encode(body: &impl Serialize) -> Vec<u8> {
    // Cannot fail: all map keys are strings.
    serde_json::to_vec(body).expect("an answer serializes")
}

// === impl ApiError ===

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::BAD_REQUEST => "BadRequestError",
            StatusCode::NOT_FOUND => "NotFoundError",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
            status if status.is_server_error() => "InternalServerError",
            status => status.canonical_reason().unwrap_or("Error"),
        };
        Self { status, kind, param: None, message: message.into() }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// Builds an error like the web framework of vLLM, with the reason phrase only.
    pub(super) fn http(status: StatusCode) -> Self {
        let phrase = status.canonical_reason().unwrap_or("Error");
        Self { status, kind: phrase, param: None, message: phrase.to_owned() }
    }

    pub(super) fn unknown_model(model: &str) -> Self {
        let message = format!("The model `{model}` does not exist.");
        Self { param: Some("model"), ..Self::new(StatusCode::NOT_FOUND, message) }
    }

    pub(super) fn anthropic(self) -> SimResponse {
        let body = json!({"type": "error", "error": {"type": self.kind, "message": self.message}});
        let mut answer = json(&body);
        *answer.status_mut() = self.status;
        answer
    }
}

impl From<ApiError> for SimResponse {
    fn from(error: ApiError) -> Self {
        #[derive(Serialize)]
        struct ErrorEnvelope<'a> {
            error: Info<'a>,
        }
        #[derive(Serialize)]
        struct Info<'a> {
            message: &'a str,
            r#type: &'a str,
            param: Option<&'a str>,
            code: u16,
        }
        let ApiError { status, kind, param, message } = &error;
        let mut answer = json(&ErrorEnvelope {
            error: Info { message, r#type: kind, param: *param, code: status.as_u16() },
        });
        *answer.status_mut() = *status;
        answer
    }
}
