//! A request on a connection of its own and its outcome.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub(super) const MODEL: &str = "soak";
/// Timeout for a cold start and the response.
const PATIENCE: Duration = Duration::from_secs(20);
/// Time before a client disconnects: the request has been read by then, and waits or is served.
const STAY: Duration = Duration::from_millis(60);
const BIG: usize = 2 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    Streamed,
    /// A body of two megabytes.
    Big,
    /// The client disconnects as soon as the response starts to stream.
    LeavesAnswer,
    /// The client disconnects after [`STAY`], usually while it waits.
    LeavesQueue,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Answered,
    /// The queue was full, according to the response.
    Full,
    Left,
    Wrong(String),
}

/// Sends a request and waits for its end.
pub(super) async fn send(proxy: SocketAddr, kind: Kind) -> Outcome {
    match timeout(PATIENCE, exchange(proxy, kind)).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => Outcome::Wrong(format!("{kind:?}: {error}")),
        Err(_) => Outcome::Wrong(format!("{kind:?}: no answer within {} s", PATIENCE.as_secs())),
    }
}

async fn exchange(proxy: SocketAddr, kind: Kind) -> std::io::Result<Outcome> {
    let mut stream = TcpStream::connect(proxy).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&request(kind)).await?;
    if kind == Kind::LeavesQueue {
        let mut answer = [0; 1024];
        // The client disconnects in either case: before a response, or after reading its start.
        return Ok(match timeout(STAY, stream.read(&mut answer)).await {
            Ok(Ok(read)) if is_full(&answer[..read]) => Outcome::Full,
            _ => Outcome::Left,
        });
    }
    let mut answer = Vec::new();
    loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Ok(judge(kind, &answer));
        }
        if kind == Kind::LeavesAnswer && contains(&answer, "data:") {
            return Ok(Outcome::Left);
        }
    }
}

fn request(kind: Kind) -> Vec<u8> {
    let stream = matches!(kind, Kind::Streamed | Kind::LeavesAnswer);
    let content = if kind == Kind::Big { "x".repeat(BIG) } else { "Hello".into() };
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
fn judge(kind: Kind, answer: &[u8]) -> Outcome {
    if is_full(answer) {
        return Outcome::Full;
    }
    let end = if matches!(kind, Kind::Streamed | Kind::LeavesAnswer) { "[DONE]" } else { "\"choices\"" };
    if answer.starts_with(b"HTTP/1.1 200 ") && contains(answer, end) {
        return Outcome::Answered;
    }
    let text = String::from_utf8_lossy(answer);
    Outcome::Wrong(format!("{kind:?}: {}", text.chars().take(500).collect::<String>()))
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
    fn only_a_whole_answer_is_one() {
        let plain = br#"HTTP/1.1 200 OK..{"choices":[]}"#;
        assert_eq!(judge(Kind::Plain, plain), Outcome::Answered);
        assert!(matches!(judge(Kind::Plain, &plain[..20]), Outcome::Wrong(_)));
        assert!(
            matches!(judge(Kind::Streamed, plain), Outcome::Wrong(_)),
            "the end of the stream is missing"
        );
        assert_eq!(judge(Kind::Streamed, b"HTTP/1.1 200 OK..data: [DONE]"), Outcome::Answered);
        assert_eq!(judge(Kind::Plain, b"HTTP/1.1 503 Service.. hold_queue_full"), Outcome::Full);
        assert!(matches!(judge(Kind::Plain, b"HTTP/1.1 503 Service.. cold_start_failed"), Outcome::Wrong(_)));
        assert!(matches!(judge(Kind::Big, b""), Outcome::Wrong(_)));
    }

    #[test]
    fn requests_name_the_model_and_their_length() {
        let text = String::from_utf8(request(Kind::LeavesAnswer)).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("Content-Length: {}", body.len())) && body.contains("\"stream\":true")
        );
        assert!(request(Kind::Big).len() > BIG);
    }
}
