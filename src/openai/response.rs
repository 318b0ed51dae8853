//! Responses stored on a model server (`/v1/responses`): their ids and status.

use serde::Deserialize;

/// Fields of `POST /v1/responses` about stored responses. All are `None` if the body cannot be parsed.
#[derive(Debug, Default, Deserialize)]
pub struct ResponseRequest {
    /// Id of the response to continue; only the server that stores it can do that.
    #[serde(rename = "previous_response_id")]
    pub previous: Option<String>,
    /// True if the server returns before the response is complete.
    pub background: Option<bool>,
}

/// Status of a response, from `GET /v1/responses/{id}`.
#[derive(Deserialize)]
struct StoredStatus {
    status: String,
}

/// Maximum length of a response id.
const MAX_RESPONSE_ID_BYTES: usize = 128;

/// Returns whether a POST to this path creates a stored response.
pub fn creates_stored_response(path: &str) -> bool {
    path.ends_with("/v1/responses")
}

impl ResponseRequest {
    /// Parses a request body.
    pub fn read(body: &[u8]) -> Self {
        serde_json::from_slice(body).unwrap_or_default()
    }
}

/// Finds the id of the response at the beginning of an answer to `POST /v1/responses`, JSON or events: the first `id`
/// with the prefix `resp_`. Items inside it have other prefixes.
pub fn response_id(answer: &[u8]) -> Option<&str> {
    const KEY: &[u8] = b"\"id\"";
    let mut rest = answer;
    while let Some(place) = rest.windows(KEY.len()).position(|window| window == KEY) {
        rest = &rest[place + KEY.len()..];
        let Some(value) = rest.trim_ascii_start().strip_prefix(b":") else { continue };
        let Some(value) = value.trim_ascii_start().strip_prefix(b"\"") else { continue };
        let Some(end) = value.iter().position(|byte| *byte == b'"') else { continue };
        if let Ok(id) = str::from_utf8(&value[..end])
            && is_response_id(id)
        {
            return Some(id);
        }
    }
    None
}

/// Returns whether a text can be the id of a response and needs no escaping in a path.
pub fn is_response_id(id: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    id.len() <= MAX_RESPONSE_ID_BYTES && id.starts_with("resp_") && id.bytes().all(fits)
}

/// Returns whether a fetched response is still in progress.
pub fn is_running(response: &[u8]) -> bool {
    let status = serde_json::from_slice(response).map(|StoredStatus { status }| status);
    status.is_ok_and(|status| matches!(&*status, "queued" | "in_progress"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_is_the_first_complete_response_id() {
        for (answer, id) in [
            (r#"{"id":"resp_1","object":"response"}"#, Some("resp_1")),
            ("{\n  \"created_at\": 1,\n  \"id\" : \"resp_a-b.c\",", Some("resp_a-b.c")),
            (r#"{"output":[{"id":"msg_1"}],"id":"resp_2"}"#, Some("resp_2")),
            (
                "event: response.created\ndata: {\"response\":{\"id\":\"resp_3\",\"created_at\":1",
                Some("resp_3"),
            ),
            (r#"{"id":"resp_1"#, None),
            (r#"{"id""#, None),
            (r#"{"id":7,"error":"id"}"#, None),
            (r#"{"id":"resp_ 1"}"#, None),
            ("", None),
        ] {
            assert_eq!(response_id(answer.as_bytes()), id, "{answer}");
        }
        let long = format!(r#"{{"id":"resp_{}"}}"#, "x".repeat(200));
        assert_eq!(response_id(long.as_bytes()), None);
    }

    #[test]
    fn body_names_the_response_it_continues() {
        let read = |body: &str| {
            let request = ResponseRequest::read(body.as_bytes());
            (request.previous, request.background)
        };
        let body =
            r#"{"model":"m","input":[{"background":1}],"previous_response_id":"resp_1","background":true}"#;
        assert_eq!(read(body), (Some("resp_1".into()), Some(true)));
        assert_eq!(read(r#"{"previous_response_id":null}"#), (None, None));
        for unreadable in ["", "[]", "{", r#"{"previous_response_id":7}"#] {
            assert_eq!(read(unreadable), (None, None), "{unreadable}");
        }
    }

    #[test]
    fn response_runs_while_it_is_queued_or_in_progress() {
        let runs = |status: &str| is_running(format!(r#"{{"id":"resp_1","status":"{status}"}}"#).as_bytes());
        assert!(runs("queued") && runs("in_progress"));
        assert!(!["completed", "failed", "cancelled", "incomplete"].into_iter().any(runs));
        assert!(!is_running(b"{}") && !is_running(b""));
    }
}
