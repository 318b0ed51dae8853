//! API spoken by a request, and its error format.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header::CONTENT_TYPE};
use serde_json::{Value, json};

use super::sse_data;
use crate::error::{ProxyError, anthropic_type};

/// API spoken by a request. SDKs only understand errors in the format of their own API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI, and everything without an error format of its own.
    #[default]
    OpenAi,
    /// OpenAI's Responses API, which streams typed events.
    Responses,
    /// Anthropic's Messages API.
    Anthropic,
    /// gRPC: an error is a status in the headers.
    Grpc,
}

/// An error with the fields of all dialects.
struct ErrorFields {
    message: String,
    kind: String,
    anthropic: &'static str,
    code: String,
    param: Value,
}

// === impl Dialect ===

impl Dialect {
    /// Determines the dialect from the path, which may have a prefix, or else from the headers.
    pub fn of(path: &str, headers: &HeaderMap) -> Self {
        // The most common path first.
        if path.ends_with("/completions") {
            return Self::OpenAi;
        }
        if path.ends_with("/v1/responses") {
            return Self::Responses;
        }
        // Anthropic's SDKs send their version with every request, such as `GET /v1/models`.
        if path.contains("/v1/messages") || headers.contains_key("anthropic-version") {
            return Self::Anthropic;
        }
        let kind = headers.get(CONTENT_TYPE).map_or(&b""[..], |kind| kind.as_bytes());
        if kind.starts_with(b"application/grpc") { Self::Grpc } else { Self::OpenAi }
    }

    /// Formats the body of an error response, also after an early 200. Empty for gRPC.
    pub fn error_body(self, error: &ProxyError, request_id: &str) -> Bytes {
        let fault = ErrorFields::of(error);
        let body = match self {
            Self::OpenAi | Self::Responses => json!({"error": fault.openai()}),
            Self::Anthropic => fault.anthropic(request_id),
            Self::Grpc => return Bytes::new(),
        };
        body.to_string().into()
    }

    /// Formats an error inside a stream of events, which SDKs raise as `APIError`.
    pub fn error_event(self, error: &ProxyError, request_id: &str) -> Bytes {
        self.event(&ErrorFields::of(error), request_id)
    }

    /// Formats a model server's error response inside a stream of events.
    pub fn upstream_error_event(self, status: StatusCode, body: &[u8], request_id: &str) -> Bytes {
        match serde_json::from_slice::<Value>(body) {
            Ok(value) if self.is_error(&value) => {
                let data = sse_data(value.to_string().as_bytes());
                if self == Self::Anthropic { named("error", &data) } else { data }
            }
            Ok(value) => self.event(&ErrorFields::of_upstream(status, &value, body), request_id),
            Err(_) => self.event(&ErrorFields::of_upstream(status, &Value::Null, body), request_id),
        }
    }

    /// Returns whether an error response is already valid as an event of this dialect.
    fn is_error(self, value: &Value) -> bool {
        match self {
            Self::OpenAi | Self::Grpc => value.get("error").is_some(),
            Self::Responses => false,
            Self::Anthropic => value["type"] == "error" && value["error"].is_object(),
        }
    }

    fn event(self, fault: &ErrorFields, request_id: &str) -> Bytes {
        match self {
            Self::OpenAi | Self::Grpc => sse_data(json!({"error": fault.openai()}).to_string().as_bytes()),
            Self::Anthropic => named("error", &sse_data(fault.anthropic(request_id).to_string().as_bytes())),
            Self::Responses => {
                let [error, failed] = fault.responses(request_id).map(|event| event.to_string());
                let error = named("error", &sse_data(error.as_bytes()));
                let failed = named("response.failed", &sse_data(failed.as_bytes()));
                [error, failed].concat().into()
            }
        }
    }
}

// === impl ErrorFields ===

impl ErrorFields {
    fn of(error: &ProxyError) -> Self {
        let answer = error.answer();
        Self {
            message: error.to_string(),
            kind: answer.kind.into(),
            anthropic: answer.anthropic,
            code: answer.code.into(),
            param: error.param().into(),
        }
    }

    /// Parses an error response of a model server in any format; falls back to its text.
    fn of_upstream(status: StatusCode, value: &Value, body: &[u8]) -> Self {
        let error = &value["error"];
        let text = |value: &Value| match value {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        };
        let kind = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
        let whole = || match body {
            [] => status.to_string(),
            body => String::from_utf8_lossy(body).into_owned(),
        };
        Self {
            message: text(&error["message"]).unwrap_or_else(whole),
            kind: text(&error["type"]).unwrap_or_else(|| kind.into()),
            anthropic: anthropic_type(status),
            // A number in vLLM, a string in the API's reference.
            code: text(&error["code"]).unwrap_or_else(|| status.as_str().into()),
            param: error["param"].clone(),
        }
    }

    /// Formats `{"message","type","param","code"}`.
    fn openai(&self) -> Value {
        let Self { message, kind, code, param, .. } = self;
        json!({"message": message, "type": kind, "param": param, "code": code})
    }

    /// Formats `{"type":"error","error":{"type","message"},"request_id"}`, with `code` added.
    fn anthropic(&self, request_id: &str) -> Value {
        let Self { message, anthropic, code, .. } = self;
        let error = json!({"type": anthropic, "message": message, "code": code});
        json!({"type": "error", "error": error, "request_id": request_id})
    }

    /// Formats the `error` event of the API's reference, with the `error` object that SDKs raise, and a
    /// `response.failed` event for clients that wait for the end of the response.
    fn responses(&self, request_id: &str) -> [Value; 2] {
        let Self { message, kind, code, param, .. } = self;
        // OpenAI's API reference allows only a closed list of codes.
        let reason = match &**kind {
            "rate_limit_error" => "rate_limit_exceeded",
            "invalid_request_error" => "invalid_prompt",
            _ => "server_error",
        };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        [
            json!({
                "type": "error", "sequence_number": 0, "code": code, "message": message, "param": param,
                "error": self.openai(),
            }),
            json!({
                "type": "response.failed",
                "sequence_number": 1,
                "response": {
                    "id": format!("resp_{request_id}"), "object": "response", "created_at": created,
                    "status": "failed", "error": {"code": reason, "message": message},
                    "incomplete_details": null, "instructions": null, "metadata": {}, "model": "", "output": [],
                    "parallel_tool_calls": true, "temperature": null, "tool_choice": "auto", "tools": [],
                    "top_p": null, "usage": null,
                },
            }),
        ]
    }
}

/// Prefixes an event with its name.
fn named(name: &str, event: &[u8]) -> Bytes {
    [b"event: ", name.as_bytes(), b"\n", event].concat().into()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ID: &str = "0123";

    fn failed() -> ProxyError {
        let (route, reason) = ("tiny".into(), "no GPU\nIts last lines:\nOOM".into());
        ProxyError::ColdStartFailed { route, reason, retry_after: Some(Duration::from_secs(1)) }
    }

    /// Parses a stream into names and data of its events.
    fn events(stream: &[u8]) -> Vec<(String, Value)> {
        let events = str::from_utf8(stream).unwrap().split_terminator("\n\n");
        let read = events.map(|event| {
            let mut lines = event.lines();
            let data = lines.next_back().and_then(|line| line.strip_prefix("data: ")).unwrap();
            let name = lines.next().map_or("", |line| line.strip_prefix("event: ").unwrap());
            assert_eq!(lines.next(), None, "{event:?}");
            (name.to_owned(), serde_json::from_str(data).unwrap())
        });
        read.collect()
    }

    #[test]
    fn dialect_follows_from_path_then_headers() {
        let headers = |fields: &[(&str, &str)]| -> HeaderMap {
            fields.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
        };
        let version = [("anthropic-version", "2023-06-01")];
        let grpc = [("content-type", "application/grpc+proto")];
        for (path, fields, dialect) in [
            ("/v1/chat/completions", &[][..], Dialect::OpenAi),
            ("/v1/responses", &[], Dialect::Responses),
            ("/team/v1/responses", &[], Dialect::Responses),
            // Stored responses are not streamed.
            ("/v1/responses/resp_1", &[], Dialect::OpenAi),
            ("/v1/messages", &[], Dialect::Anthropic),
            ("/team/v1/messages/count_tokens", &[], Dialect::Anthropic),
            ("/v1/messages/batches", &[], Dialect::Anthropic),
            ("/v1/models/tiny", &version, Dialect::Anthropic),
            ("/v1/models/tiny", &[], Dialect::OpenAi),
            ("/v1/embeddings", &[], Dialect::OpenAi),
            ("/inference.GRPCInferenceService/ModelInfer", &grpc, Dialect::Grpc),
            (
                "/inference.GRPCInferenceService/ModelInfer",
                &[("content-type", "text/plain")],
                Dialect::OpenAi,
            ),
        ] {
            assert_eq!(Dialect::of(path, &headers(fields)), dialect, "{path}");
        }
    }

    #[test]
    fn own_error_has_the_format_of_its_api() {
        let error = failed();
        let message = error.to_string();
        let openai =
            json!({"message": message, "type": "server_error", "param": null, "code": "cold_start_failed"});
        let anthropic = json!({
            "type": "error", "request_id": ID,
            "error": {"type": "api_error", "message": message, "code": "cold_start_failed"},
        });
        let body =
            |dialect: Dialect| -> Value { serde_json::from_slice(&dialect.error_body(&error, ID)).unwrap() };
        assert_eq!(body(Dialect::OpenAi), json!({"error": openai}));
        assert_eq!(body(Dialect::Responses), json!({"error": openai}));
        assert_eq!(body(Dialect::Anthropic), anthropic);
        assert!(Dialect::Grpc.error_body(&error, ID).is_empty());

        let event = |dialect: Dialect| events(&dialect.error_event(&error, ID));
        assert_eq!(event(Dialect::OpenAi), [(String::new(), json!({"error": openai}))]);
        assert_eq!(event(Dialect::Anthropic), [("error".to_owned(), anthropic)]);
        let responses = event(Dialect::Responses);
        let [(name, data), (last, end)] = &responses[..] else { panic!("{responses:?}") };
        assert_eq!((name.as_str(), last.as_str()), ("error", "response.failed"));
        assert_eq!(
            (&data["type"], &data["code"], &data["error"]),
            (&json!("error"), &openai["code"], &openai)
        );
        assert_eq!(end["response"]["error"], json!({"code": "server_error", "message": message}));
        assert_eq!((&end["type"], &end["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    }

    #[test]
    fn server_error_is_translated_unless_valid() {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let openai = json!({"error": {"message": "busy", "type": "overloaded", "param": null, "code": 503}});
        let anthropic = json!({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}});
        let event = |dialect: Dialect, body: &str| {
            events(&dialect.upstream_error_event(status, body.as_bytes(), ID)).remove(0)
        };
        // Already in the right format.
        assert_eq!(event(Dialect::OpenAi, &openai.to_string()), (String::new(), openai.clone()));
        let laid_out = serde_json::to_string_pretty(&anthropic).unwrap();
        assert_eq!(event(Dialect::Anthropic, &laid_out), ("error".to_owned(), anthropic.clone()));
        // Errors of another API, or in no known format.
        let (name, data) = event(Dialect::Anthropic, &openai.to_string());
        assert_eq!((name.as_str(), &data["error"]["type"]), ("error", &json!("overloaded_error")));
        assert_eq!(data["error"]["message"], "busy");
        let (_, data) = event(Dialect::Responses, &openai.to_string());
        assert_eq!((&data["error"]["code"], &data["message"]), (&json!("503"), &json!("busy")));
        for body in ["no healthy upstream", "<html>", "\"busy\"", "[1]", "{\"detail\":\"busy\"}"] {
            for dialect in [Dialect::OpenAi, Dialect::Responses, Dialect::Anthropic] {
                let (_, data) = event(dialect, body);
                assert_eq!(data["error"]["message"], body, "{dialect:?}");
            }
        }
        assert_eq!(event(Dialect::Anthropic, "").1["error"]["message"], "503 Service Unavailable");
    }
}
