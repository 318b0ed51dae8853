//! Origin of an error response: the model server or a gateway in between.
//!
//! Model servers use a few error formats, gateways use many. The former are recognized by their fields; every other
//! response is attributed to a gateway. `tests/gateways` has samples of both.

use http::{HeaderMap, StatusCode};
use serde_json::Value;

/// Returns whether an error response has the format of a model server.
pub fn is_model_error(status: StatusCode, body: &[u8]) -> bool {
    // Starlette's response to an unhandled exception, in vLLM and SGLang.
    if status == StatusCode::INTERNAL_SERVER_ERROR && body == b"Internal Server Error" {
        return true;
    }
    let Ok(answer @ Value::Object(_)) = serde_json::from_slice::<Value>(body) else { return false };
    let error = &answer["error"];
    match error {
        Value::Object(error) => {
            let is_text = |key: &str| error.get(key).is_some_and(Value::is_string);
            is_text("message") && is_text("type") && is_detailed(&answer, error)
        }
        // Text Generation Inference and Text Embeddings Inference.
        Value::String(_) => answer["error_type"].is_string(),
        // vLLM before 0.10, SGLang, TensorRT-LLM, LMDeploy.
        _ => answer["object"] == "error" && answer["message"].is_string(),
    }
}

/// Returns whether an `error` with message and type has the details that only model servers add.
fn is_detailed(answer: &Value, error: &serde_json::Map<String, Value>) -> bool {
    /// Error types of llama.cpp, without `unavailable_error`: that one means the model is loading.
    const LLAMA_CPP: [&str; 3] = ["server_error", "not_found_error", "not_supported_error"];
    let is_status = |code: &Value| code.as_str().is_some_and(|code| code.parse::<u16>().is_ok());
    match error.get("code") {
        // Gateways that format the status as a string: LiteLLM, Envoy AI Gateway.
        Some(code) if is_status(code) => false,
        // OpenAI, vLLM, Ollama: `param` is present, if only as null.
        _ if error.contains_key("param") => true,
        Some(code) => code.is_u64() && error["type"].as_str().is_some_and(|kind| LLAMA_CPP.contains(&kind)),
        // Anthropic.
        None => answer["type"] == "error",
    }
}

/// Returns whether a gateway's 503 reports that no endpoint is healthy, so the request reached no model server.
///
/// Envoy: body `no healthy upstream` (local reply, flag UH), or a connect failure, for an endpoint it does not know to
/// be gone; a connection that broke later is `connection termination`. llm-d's router: header
/// `x-llm-d-request-dropped-reason: rejected-no-endpoints`. HAProxy: `No server is available`. Traefik: `no available
/// server`.
pub fn reports_no_endpoint(headers: &HeaderMap, body: &[u8]) -> bool {
    const NO_ENDPOINT_MESSAGES: [&[u8]; 7] = [
        b"no healthy upstream",
        // Envoy up to 1.23.
        b"reset reason: connection failure",
        b"reset reason: remote connection failure",
        b"reset reason: local connection failure",
        b"reset reason: connection timeout",
        b"No server is available",
        b"no available server",
    ];
    let dropped = headers.get("x-llm-d-request-dropped-reason");
    dropped.is_some_and(|reason| reason == "rejected-no-endpoints")
        || NO_ENDPOINT_MESSAGES
            .into_iter()
            .any(|message| body.windows(message.len()).any(|part| part == message))
}

/// Returns whether a server may have processed the request despite a gateway's error. An empty 500 means no: the
/// Gateway API specifies it for a route without endpoints.
pub fn may_have_run(status: StatusCode, body: &[u8]) -> bool {
    match status {
        StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => true,
        StatusCode::INTERNAL_SERVER_ERROR => !body.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_error_shows_if_a_server_was_reached() {
        let prefix = "upstream connect error or disconnect/reset before headers. ";
        for (message, reached_none) in [
            ("no healthy upstream", true),
            (
                "reset reason: remote connection failure, transport failure reason: delayed connect error: 111",
                true,
            ),
            ("reset reason: local connection failure", true),
            ("retried and the latest reset reason: connection timeout", true),
            ("reset reason: connection failure", true),
            ("reset reason: connection termination", false),
            ("reset reason: remote reset", false),
            ("reset reason: protocol error", false),
            ("the model is overloaded", false),
        ] {
            let body = format!("{prefix}{message}");
            assert_eq!(reports_no_endpoint(&HeaderMap::new(), body.as_bytes()), reached_none, "{message}");
        }
    }

    #[test]
    fn similar_formats_are_attributed_to_gateways() {
        let status = StatusCode::NOT_FOUND;
        for body in [
            "",
            "{",
            "[]",
            "null",
            r#"{"error":"Model 'tiny' not found."}"#,
            r#"{"error":{"message":"no pods","code":503}}"#,
            r#"{"error":{"type":"Service Unavailable","code":"no_available_workers","message":"none"}}"#,
            r#"{"error":{"message":"none left","type":"None","param":"None","code":"503"}}"#,
            r#"{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}"#,
            r#"{"error":{"code":503,"message":"no","status":"UNAVAILABLE"}}"#,
            r#"{"message":"Model not found","type":"Not Found","code":404}"#,
            "Internal Server Error",
        ] {
            assert!(!is_model_error(status, body.as_bytes()), "{body}");
        }
    }
}
