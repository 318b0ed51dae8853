//! Clients of the demo, which behave like an OpenAI SDK.

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

use super::error::DemoError;

/// Progress of a client. Times are relative to the burst.
#[derive(Clone, Debug, Default)]
pub(super) struct ClientState {
    /// Number of SSE comments received while waiting.
    pub(super) heartbeats: u32,
    /// Text of the last heartbeat.
    pub(super) heartbeat: String,
    pub(super) first_heartbeat: Option<Duration>,
    pub(super) first_token: Option<Duration>,
    /// End of the answer, complete or not.
    pub(super) done: Option<Duration>,
    pub(super) tokens: u32,
    pub(super) text: String,
    pub(super) error: Option<String>,
}

/// Clients of a burst, with a common clock.
pub(super) struct DemoClients {
    pub(super) began: Instant,
    states: Vec<Arc<Mutex<ClientState>>>,
    running: JoinSet<()>,
}

struct DemoClient {
    began: Instant,
    state: Arc<Mutex<ClientState>>,
    sender: SendRequest<Full<Bytes>>,
}

/// Prompts, used in rotation.
const PROMPTS: [&str; 8] = [
    "What is a waiting room for?",
    "Tell me a story about patience.",
    "How does a model wake up?",
    "What is at the end of the queue?",
    "Who keeps the door?",
    "Describe a quiet morning.",
    "Why do good things take time?",
    "What happens while I wait?",
];

// === impl DemoClients ===

impl DemoClients {
    /// Opens `count` connections, then sends all requests concurrently.
    ///
    /// # Errors
    /// If a connection fails; nothing has been sent then.
    pub(super) async fn send(address: SocketAddr, count: usize) -> Result<Self, DemoError> {
        let mut senders = Vec::with_capacity(count);
        let mut running = JoinSet::new();
        for _ in 0..count {
            let stream = TcpStream::connect(address).await.map_err(DemoError::Connect)?;
            let (sender, connection) =
                http1::handshake(TokioIo::new(stream)).await.map_err(DemoError::Handshake)?;
            // Ignores errors: the reader of the response gets them as well.
            running.spawn(async { connection.await.unwrap_or_default() });
            senders.push(sender);
        }
        let mut clients = Self { began: Instant::now(), states: Vec::with_capacity(count), running };
        for (number, sender) in senders.into_iter().enumerate() {
            let state = Arc::<Mutex<ClientState>>::default();
            clients.states.push(state.clone());
            let client = DemoClient { began: clients.began, state, sender };
            clients.running.spawn(client.run(address, number));
        }
        Ok(clients)
    }

    /// Returns the progress of each client.
    pub(super) fn snapshot(&self) -> Vec<ClientState> {
        self.states.iter().map(|state| state.lock().clone()).collect()
    }

    /// Waits for all clients and periodically calls `update`. Cancel-safe; dropping the clients closes their connections.
    pub(super) async fn watch(&mut self, every: Duration, mut update: impl FnMut(&[ClientState], Duration)) {
        let mut ticks = tokio::time::interval(every);
        loop {
            tokio::select! {
                // Biased only to save the random choice: the order does not matter.
                biased;
                _ = ticks.tick() => update(&self.snapshot(), self.began.elapsed()),
                ended = self.running.join_next() => if ended.is_none() { break },
            }
        }
        update(&self.snapshot(), self.began.elapsed());
    }
}

// === impl DemoClient ===

impl DemoClient {
    async fn run(mut self, address: SocketAddr, number: usize) {
        let error = self.ask(address, number).await.err();
        let mut state = self.state.lock();
        state.done = Some(self.began.elapsed());
        state.error = error;
    }

    async fn ask(&mut self, address: SocketAddr, number: usize) -> Result<(), String> {
        let question = PROMPTS[number % PROMPTS.len()];
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
            self.sender.send_request(request).await.map_err(|error| format!("no response: {error}"))?;
        if response.status() == StatusCode::OK {
            return self.read(response).await;
        }
        let status = response.status();
        let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let message = serde_json::from_slice(&body).ok().and_then(|body: Value| error_message(&body));
        Err(format!("{status}: {}", message.unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned())))
    }

    async fn read(&self, response: Response<Incoming>) -> Result<(), String> {
        let mut body = response.into_body();
        let mut lines = StreamLines::default();
        let mut ended = false;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| format!("answer interrupted: {error}"))?;
            for line in lines.take(frame.data_ref().map_or(&[][..], |data| data)) {
                ended |= self.line(&line)?;
            }
        }
        if ended { Ok(()) } else { Err("the answer ended without [DONE]".to_owned()) }
    }

    /// Processes a line of the stream. Returns `true` after the last one.
    fn line(&self, line: &str) -> Result<bool, String> {
        let now = self.began.elapsed();
        let mut state = self.state.lock();
        if let Some(comment) = line.strip_prefix(':').map(str::trim) {
            if comment.starts_with("server-timing") {
                // The `server-timing` comment reports the wait; it is not a heartbeat.
                return Ok(false);
            }
            state.heartbeats += 1;
            state.first_heartbeat.get_or_insert(now);
            state.heartbeat = comment.to_owned();
            return Ok(false);
        }
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { return Ok(false) };
        if data == "[DONE]" {
            return Ok(true);
        }
        let chunk: Value =
            serde_json::from_str(data).map_err(|error| format!("a chunk is not JSON: {error}"))?;
        if let Some(message) = error_message(&chunk) {
            return Err(message);
        }
        // Empty in the first chunk, which has only the role.
        let word = chunk.pointer("/choices/0/delta/content").and_then(Value::as_str).unwrap_or_default();
        if !word.is_empty() {
            state.first_token.get_or_insert(now);
            state.tokens += 1;
            state.text.push_str(word);
        }
        Ok(false)
    }
}

fn error_message(body: &Value) -> Option<String> {
    let error = body.get("error")?;
    Some(error.get("message").and_then(Value::as_str).map_or_else(|| error.to_string(), str::to_owned))
}

/// Splits a stream into lines.
#[derive(Default)]
struct StreamLines(Vec<u8>);

impl StreamLines {
    /// Returns the lines completed by `part`.
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
    fn lines_are_reassembled_from_parts() {
        let mut lines = StreamLines::default();
        assert!(lines.take(b"data: {\"a\"").is_empty());
        assert_eq!(lines.take(b": 1}\r\n\n: beat\nda"), ["data: {\"a\": 1}", "", ": beat"]);
        assert_eq!(lines.take(b"ta: [DONE]\n"), ["data: [DONE]"]);
    }
}
