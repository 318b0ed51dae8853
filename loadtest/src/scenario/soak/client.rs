//! A request on a connection of its own and its outcome.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub(super) const MODEL: &str = "soak";
/// Timeout for a cold start and the response.
const COLD_START_TIMEOUT: Duration = Duration::from_secs(20);
/// Time before a client disconnects: the request has been read by then, and waits or is served.
const DISCONNECT_DELAY: Duration = Duration::from_millis(60);
const BIG_BODY_BYTES: usize = 2 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientKind {
    Plain,
    Streamed,
    /// A body of two megabytes.
    Big,
    /// The client disconnects as soon as the response starts to stream.
    LeavesAnswer,
    /// The client disconnects after [`DISCONNECT_DELAY`], usually while it waits.
    LeavesQueue,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ClientOutcome {
    Answered,
    /// The queue was full, according to the response.
    Full,
    Left,
    Wrong(String),
}

/// Sends a request and waits for its end.
pub(super) async fn send(proxy: SocketAddr, kind: ClientKind) -> ClientOutcome {
    match timeout(COLD_START_TIMEOUT, exchange(proxy, kind)).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => ClientOutcome::Wrong(format!("{kind:?}: {error}")),
        Err(_) => {
            ClientOutcome::Wrong(format!("{kind:?}: no answer within {} s", COLD_START_TIMEOUT.as_secs()))
        }
    }
}

async fn exchange(proxy: SocketAddr, kind: ClientKind) -> std::io::Result<ClientOutcome> {
    let mut stream = TcpStream::connect(proxy).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&request(kind)).await?;
    if kind == ClientKind::LeavesQueue {
        let mut answer = [0; 1024];
        // The client disconnects in either case: before a response, or after reading its start.
        return Ok(match timeout(DISCONNECT_DELAY, stream.read(&mut answer)).await {
            Ok(Ok(read)) if is_full(&answer[..read]) => ClientOutcome::Full,
            _ => ClientOutcome::Left,
        });
    }
    let mut answer = Vec::new();
    loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Ok(classify_response(kind, &answer));
        }
        if kind == ClientKind::LeavesAnswer && contains(&answer, "data:") {
            return Ok(ClientOutcome::Left);
        }
    }
}

fn request(kind: ClientKind) -> Vec<u8> {
    let stream = matches!(kind, ClientKind::Streamed | ClientKind::LeavesAnswer);
    let content = if kind == ClientKind::Big { "x".repeat(BIG_BODY_BYTES) } else { "Hello".into() };
    let body = format!(
        r#"{{"model":"{MODEL}","messages":[{{"role":"user","content":"{content}"}}],"stream":{stream}}}"#
    );
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Classifies a complete response.
fn classify_response(kind: ClientKind, answer: &[u8]) -> ClientOutcome {
    if is_full(answer) {
        return ClientOutcome::Full;
    }
    let end = if matches!(kind, ClientKind::Streamed | ClientKind::LeavesAnswer) {
        "[DONE]"
    } else {
        "\"choices\""
    };
    if answer.starts_with(b"HTTP/1.1 200 ") && contains(answer, end) {
        return ClientOutcome::Answered;
    }
    let text = String::from_utf8_lossy(answer);
    ClientOutcome::Wrong(format!("{kind:?}: {}", text.chars().take(500).collect::<String>()))
}

fn is_full(answer: &[u8]) -> bool {
    answer.starts_with(b"HTTP/1.1 503 ") && contains(answer, "hold_queue_full")
        || answer.starts_with(b"HTTP/1.1 429 ") && contains(answer, "saturated")
}

fn contains(text: &[u8], part: &str) -> bool {
    memchr::memmem::find(text, part.as_bytes()).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_response_is_an_error() {
        let plain = br#"HTTP/1.1 200 OK..{"choices":[]}"#;
        assert_eq!(classify_response(ClientKind::Plain, plain), ClientOutcome::Answered);
        assert!(matches!(classify_response(ClientKind::Plain, &plain[..20]), ClientOutcome::Wrong(_)));
        assert!(
            matches!(classify_response(ClientKind::Streamed, plain), ClientOutcome::Wrong(_)),
            "the end of the stream is missing"
        );
        assert_eq!(
            classify_response(ClientKind::Streamed, b"HTTP/1.1 200 OK..data: [DONE]"),
            ClientOutcome::Answered
        );
        assert_eq!(
            classify_response(ClientKind::Plain, b"HTTP/1.1 503 Service.. hold_queue_full"),
            ClientOutcome::Full
        );
        assert!(matches!(
            classify_response(ClientKind::Plain, b"HTTP/1.1 503 Service.. cold_start_failed"),
            ClientOutcome::Wrong(_)
        ));
        assert!(matches!(classify_response(ClientKind::Big, b""), ClientOutcome::Wrong(_)));
    }

    #[test]
    fn requests_name_the_model_and_their_length() {
        let text = String::from_utf8(request(ClientKind::LeavesAnswer)).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("Content-Length: {}", body.len())) && body.contains("\"stream\":true")
        );
        assert!(request(ClientKind::Big).len() > BIG_BODY_BYTES);
    }
}
