//! Origin of an error answer: the model server, or a gateway before it.
//!
//! Model servers answer errors in a few shapes, gateways in as many as there are gateways. So the former are recognised
//! by their fields, and an answer without these is not a model server's. `tests/gateways` has answers of both.

use http::{HeaderMap, StatusCode};
use serde_json::Value;

/// Returns whether an error answer has the shape of a model server.
pub fn is_model_error(status: StatusCode, body: &[u8]) -> bool {
    // What Starlette, under vLLM and SGLang, says of an exception that nobody handles.
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
        // Text generation and embeddings inference.
        Value::String(_) => answer["error_type"].is_string(),
        // vLLM before 0.10, SGLang, TensorRT-LLM, LMDeploy.
        _ => answer["object"] == "error" && answer["message"].is_string(),
    }
}

/// Returns whether an `error` with a message and a type has the details that only model servers give.
fn is_detailed(answer: &Value, error: &serde_json::Map<String, Value>) -> bool {
    /// llama.cpp's, but for `unavailable_error`: it says that the model is being loaded.
    const LLAMA_CPP: [&str; 3] = ["server_error", "not_found_error", "not_supported_error"];
    let is_status = |code: &Value| code.as_str().is_some_and(|code| code.parse::<u16>().is_ok());
    match error.get("code") {
        // A gateway's, which has made a text of the status: LiteLLM, Envoy AI Gateway.
        Some(code) if is_status(code) => false,
        // OpenAI's own, vLLM's, Ollama's: `param` is there, if only as null.
        _ if error.contains_key("param") => true,
        Some(code) => code.is_u64() && error["type"].as_str().is_some_and(|kind| LLAMA_CPP.contains(&kind)),
        // Anthropic's.
        None => answer["type"] == "error",
    }
}

/// Returns whether a gateway's 503 names the lack of a healthy endpoint: the request reached no model server.
///
/// Envoy: body `no healthy upstream` (local reply, flag UH), or that it could not connect, which it says of an endpoint
/// that has gone without its knowing; of a connection that broke later it says `connection termination`. llm-d's router:
/// header `x-llm-d-request-dropped-reason: rejected-no-endpoints`. HAProxy: `No server is available`. Traefik: `no
/// available server`.
pub fn says_no_endpoint(headers: &HeaderMap, body: &[u8]) -> bool {
    const SAYINGS: [&[u8]; 7] = [
        b"no healthy upstream",
        // Until Envoy 1.23.
        b"reset reason: connection failure",
        b"reset reason: remote connection failure",
        b"reset reason: local connection failure",
        b"reset reason: connection timeout",
        b"No server is available",
        b"no available server",
    ];
    let dropped = headers.get("x-llm-d-request-dropped-reason");
    dropped.is_some_and(|reason| reason == "rejected-no-endpoints")
        || SAYINGS.into_iter().any(|saying| body.windows(saying.len()).any(|part| part == saying))
}

/// Returns whether a server may have run the request that a gateway answers with this error. An empty 500 is what the
/// Gateway API asks for where a route has no endpoints.
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
    fn gateway_error_tells_if_a_server_was_reached() {
        let prefix = "upstream connect error or disconnect/reset before headers. ";
        for (saying, reached_none) in [
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
            let body = format!("{prefix}{saying}");
            assert_eq!(says_no_endpoint(&HeaderMap::new(), body.as_bytes()), reached_none, "{saying}");
        }
    }

    #[test]
    fn nearly_the_shape_of_a_model_is_a_gateways() {
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
