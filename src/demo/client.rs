//! The demo's clients: what any program with an OpenAI SDK does, and what it sees.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{net::TcpStream, task::JoinSet, time::Instant};

use super::DemoError;

/// What a client has seen so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// SSE comments that came while it waited.
    pub(super) heartbeats: u32,
    /// The last of them.
    pub(super) heartbeat: String,
    pub(super) first_heartbeat: Option<Duration>,
    pub(super) first_token: Option<Duration>,
    /// When its answer ended, for good or bad.
    pub(super) done: Option<Duration>,
    pub(super) tokens: u32,
    /// The answer.
    pub(super) text: String,
    pub(super) error: Option<String>,
}

/// The clients of one demo, on their common clock.
pub(super) struct Clients {
    pub(super) began: Instant,
    seen: Vec<Arc<Mutex<Seen>>>,
    running: JoinSet<()>,
}

struct Client {
    began: Instant,
    seen: Arc<Mutex<Seen>>,
    sender: SendRequest<Full<Bytes>>,
}

/// What they ask, one after the other.
const QUESTIONS: [&str; 8] = [
    "What is a waiting room for?",
    "Tell me a story about patience.",
    "How does a model wake up?",
    "What is at the end of the queue?",
    "Who keeps the door?",
    "Describe a quiet morning.",
    "Why do good things take time?",
    "What happens while I wait?",
];

// === impl Clients ===

impl Clients {
    /// Connects that many, then sends all requests at once.
    ///
    /// # Errors
    /// When one cannot connect; then nothing has been sent.
    pub(super) async fn send(address: SocketAddr, count: usize) -> Result<Self, DemoError> {
        let mut senders = Vec::with_capacity(count);
        let mut running = JoinSet::new();
        for _ in 0..count {
            let stream = TcpStream::connect(address).await.map_err(DemoError::Connect)?;
            let (sender, connection) =
                http1::handshake(TokioIo::new(stream)).await.map_err(DemoError::Handshake)?;
            // What goes wrong with it is said to who reads the answer.
            running.spawn(async { connection.await.unwrap_or_default() });
            senders.push(sender);
        }
        let mut clients = Self { began: Instant::now(), seen: Vec::with_capacity(count), running };
        for (number, sender) in senders.into_iter().enumerate() {
            let seen = Arc::<Mutex<Seen>>::default();
            clients.seen.push(seen.clone());
            let client = Client { began: clients.began, seen, sender };
            clients.running.spawn(client.run(address, number));
        }
        Ok(clients)
    }

    /// What each has seen so far.
    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.iter().map(|seen| seen.lock().clone()).collect()
    }

    /// Waits until every one is done, and calls `look` now and then. Cancel-safe; dropping the clients hangs up.
    pub(super) async fn watch(&mut self, every: Duration, mut look: impl FnMut(&[Seen], Duration)) {
        let mut looks = tokio::time::interval(every);
        loop {
            tokio::select! {
                // The order does not matter: each look shows all that is known.
                biased;
                _ = looks.tick() => look(&self.seen(), self.began.elapsed()),
                ended = self.running.join_next() => if ended.is_none() { break },
            }
        }
        look(&self.seen(), self.began.elapsed());
    }
}

// === impl Client ===

impl Client {
    async fn run(mut self, address: SocketAddr, number: usize) {
        let error = self.ask(address, number).await.err();
        let mut seen = self.seen.lock();
        seen.done = Some(self.began.elapsed());
        seen.error = error;
    }

    async fn ask(&mut self, address: SocketAddr, number: usize) -> Result<(), String> {
        let question = QUESTIONS[number % QUESTIONS.len()];
        let question = format!("{question} ({})", number + 1);
        let body = json!({
            "model": "demo",
            "stream": true,
            "messages": [{"role": "user", "content": question}],
        });
        let request = Request::builder()
            .method(Method::POST)
            .uri("/v1/chat/completions")
            .header(header::HOST, address.to_string())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::from(body.to_string()))
            .map_err(|error| error.to_string())?;
        let response =
            self.sender.send_request(request).await.map_err(|error| format!("no answer: {error}"))?;
        if response.status() == StatusCode::OK {
            return self.read(response).await;
        }
        let status = response.status();
        let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let message = serde_json::from_slice(&body).ok().and_then(|body: Value| error_of(&body));
        Err(format!("{status}: {}", message.unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned())))
    }

    async fn read(&self, response: Response<Incoming>) -> Result<(), String> {
        let mut body = response.into_body();
        let mut lines = Lines::default();
        let mut ended = false;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| format!("the answer broke off: {error}"))?;
            for line in lines.take(frame.data_ref().map_or(&[][..], |data| data)) {
                ended |= self.line(&line)?;
            }
        }
        if ended { Ok(()) } else { Err("the answer ended without [DONE]".to_owned()) }
    }

    /// Takes a line of the stream, and says whether it was the last.
    fn line(&self, line: &str) -> Result<bool, String> {
        let now = self.began.elapsed();
        let mut seen = self.seen.lock();
        if let Some(comment) = line.strip_prefix(':').map(str::trim) {
            if comment.starts_with("server-timing") {
                // The account of the wait, once it is over.
                return Ok(false);
            }
            seen.heartbeats += 1;
            seen.first_heartbeat.get_or_insert(now);
            seen.heartbeat = comment.to_owned();
            return Ok(false);
        }
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { return Ok(false) };
        if data == "[DONE]" {
            return Ok(true);
        }
        let chunk: Value =
            serde_json::from_str(data).map_err(|error| format!("a chunk is not JSON: {error}"))?;
        if let Some(message) = error_of(&chunk) {
            return Err(message);
        }
        // The first chunk has the role alone.
        let word = chunk.pointer("/choices/0/delta/content").and_then(Value::as_str).unwrap_or_default();
        if !word.is_empty() {
            seen.first_token.get_or_insert(now);
            seen.tokens += 1;
            seen.text.push_str(word);
        }
        Ok(false)
    }
}

fn error_of(body: &Value) -> Option<String> {
    let error = body.get("error")?;
    Some(error.get("message").and_then(Value::as_str).map_or_else(|| error.to_string(), str::to_owned))
}

/// The lines of a stream that comes in parts.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    /// The lines that `part` completes.
    fn take(&mut self, part: &[u8]) -> Vec<String> {
        self.0.extend_from_slice(part);
        let Some(end) = self.0.iter().rposition(|byte| *byte == b'\n') else { return Vec::new() };
        let rest = self.0.split_off(end + 1);
        let whole = std::mem::replace(&mut self.0, rest);
        String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_the_stream_is_cut() {
        let mut lines = Lines::default();
        assert!(lines.take(b"data: {\"a\"").is_empty());
        assert_eq!(lines.take(b": 1}\r\n\n: beat\nda"), ["data: {\"a\": 1}", "", ": beat"]);
        assert_eq!(lines.take(b"ta: [DONE]\n"), ["data: [DONE]"]);
    }
}
