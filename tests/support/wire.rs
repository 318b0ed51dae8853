//! A connection at byte level, for either side, so that tests control the timing of every byte.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::soon;

/// A connection.
pub struct Wire {
    pub stream: TcpStream,
    /// Bytes read but not yet consumed.
    pub buf: Vec<u8>,
}

/// Head of a message. Names keep the case in which they were sent.
#[derive(Clone, Debug)]
pub struct Head {
    pub start: String,
    pub fields: Vec<(String, String)>,
}

/// A complete response.
#[derive(Clone, Debug)]
pub struct WireResponse {
    pub head: Head,
    pub body: Vec<u8>,
}

/// A part of a chunked body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyPart {
    Data(Vec<u8>),
    /// The last chunk, with its trailers.
    Last(String),
    /// The connection ended early.
    Broken,
}

// === impl Wire ===

impl Wire {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = soon("a connection", TcpStream::connect(address)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, buf: Vec::new() }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        soon("the other side to read", self.stream.write_all(bytes.as_ref())).await.unwrap();
    }

    /// Sends a request and waits for the response.
    pub async fn ask(&mut self, request: impl AsRef<[u8]>) -> WireResponse {
        self.send(request).await;
        self.response().await
    }

    /// Reads more bytes. Returns `false` at the end of the connection, orderly or not.
    async fn fill(&mut self) -> bool {
        let mut part = [0; 16 << 10];
        let read = soon("bytes", self.stream.read(&mut part)).await.unwrap_or(0);
        self.buf.extend_from_slice(&part[..read]);
        read > 0
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        self.buf.drain(..count).collect()
    }

    /// Takes everything up to and including `end`; returns `None` if the connection ends first.
    pub async fn through(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        loop {
            let found = self.buf.windows(end.len()).position(|window| window == end);
            if let Some(place) = found {
                return Some(self.take(place + end.len()));
            }
            if !self.fill().await {
                return None;
            }
        }
    }

    /// Takes the next head; returns `None` if the connection ends instead.
    pub async fn head(&mut self) -> Option<Head> {
        let bytes = self.through(b"\r\n\r\n").await?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let mut lines = text.trim_end().split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let fields = lines.map(|line| {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            (name.to_owned(), value.trim().to_owned())
        });
        Some(Head { start, fields: fields.collect() })
    }

    pub async fn exact(&mut self, count: usize) -> Option<Vec<u8>> {
        while self.buf.len() < count {
            if !self.fill().await {
                return None;
            }
        }
        Some(self.take(count))
    }

    /// Takes the next chunk of a chunked body.
    pub async fn part(&mut self) -> BodyPart {
        let Some(size) = self.through(b"\r\n").await else { return BodyPart::Broken };
        let size = String::from_utf8(size).unwrap();
        let size = usize::from_str_radix(size.trim_end(), 16).unwrap();
        if size == 0 {
            let mut trailers = String::new();
            while let Some(line) = self.through(b"\r\n").await {
                if line == b"\r\n" {
                    return BodyPart::Last(trailers);
                }
                trailers.push_str(&String::from_utf8_lossy(&line));
            }
            return BodyPart::Broken;
        }
        match self.exact(size + 2).await {
            Some(mut data) => {
                data.truncate(size);
                BodyPart::Data(data)
            }
            None => BodyPart::Broken,
        }
    }

    /// Takes parts of a chunked body until they contain `text`, and returns them.
    pub async fn parts_until(&mut self, text: &str) -> String {
        let mut all = String::new();
        while !all.contains(text) {
            match self.part().await {
                BodyPart::Data(data) => all.push_str(&String::from_utf8_lossy(&data)),
                other => panic!("{other:?} before {text:?}, after {all:?}"),
            }
        }
        all
    }

    /// Takes the rest of a chunked body; returns `None` if it is incomplete.
    pub async fn rest(&mut self) -> Option<String> {
        let mut all = String::new();
        loop {
            match self.part().await {
                BodyPart::Data(data) => all.push_str(&String::from_utf8_lossy(&data)),
                BodyPart::Last(_) => return Some(all),
                BodyPart::Broken => return None,
            }
        }
    }

    /// Takes the body that belongs to a head; returns `None` if it is incomplete.
    pub async fn body(&mut self, head: &Head) -> Option<Vec<u8>> {
        if head.get("transfer-encoding").is_some() {
            return self.rest().await.map(String::into_bytes);
        }
        match head.get("content-length") {
            Some(length) => self.exact(length.parse().unwrap()).await,
            None if head.start.starts_with("HTTP/") && ![204, 304].contains(&head.status()) => {
                Some(self.end().await)
            }
            None => Some(Vec::new()),
        }
    }

    /// Takes the next final response.
    pub async fn response(&mut self) -> WireResponse {
        loop {
            let head = self.head().await.expect("a response, but the connection ended");
            if !(100..200).contains(&head.status()) {
                let body = self.body(&head).await.expect("a whole body");
                return WireResponse { head, body };
            }
        }
    }

    /// Waits for the end of the connection and returns the bytes before it.
    pub async fn end(&mut self) -> Vec<u8> {
        while self.fill().await {}
        std::mem::take(&mut self.buf)
    }

    /// Closes the sending side only.
    pub async fn shutdown(&mut self) {
        self.stream.shutdown().await.unwrap();
    }
}

// === impl Head ===

impl Head {
    /// Returns the value of a header that occurs at most once.
    pub fn get(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() < 2, "{name} more than once: {all:?}");
        all.first().copied()
    }

    pub fn all(&self, name: &str) -> Vec<&str> {
        let named = |field: &&(String, String)| field.0.eq_ignore_ascii_case(name);
        self.fields.iter().filter(named).map(|(_, value)| value.as_str()).collect()
    }

    pub fn status(&self) -> u16 {
        self.start.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status")
    }

    /// Returns method and target of a request.
    pub fn line(&self) -> &str {
        self.start.trim_end_matches(" HTTP/1.1")
    }
}

// === impl WireResponse ===

impl WireResponse {
    pub fn status(&self) -> u16 {
        self.head.status()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("JSON instead of {:?}", self.text()))
    }

    /// Returns `error.code`, after checking the format of the error.
    pub fn code(&self) -> String {
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("an error instead of {json}"));
        assert!(error["message"].is_string() && error["type"].is_string(), "{json}");
        assert!(error.contains_key("param"), "{json}");
        error["code"].as_str().expect("the code is a string").to_owned()
    }

    /// Asserts that this is the error with this status and code.
    pub fn is_error(&self, status: u16, code: &str) {
        assert_eq!((self.status(), &*self.code()), (status, code), "{}", self.text());
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.head.get(name)
    }
}

// === requests ===

pub const CHAT: &str = "/v1/chat/completions";

/// Builds a POST of JSON, with further header lines.
pub fn post_with(path: &str, fields: &[(&str, &str)], body: &str) -> String {
    let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: api.test\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{fields}\r\n{body}"
    )
}

/// Builds a POST of JSON.
pub fn post(path: &str, body: &str) -> String {
    post_with(path, &[], body)
}

/// Builds a chat request for the model `tiny` with `text` in its body.
pub fn chat(text: &str) -> String {
    post(CHAT, &format!(r#"{{"model":"tiny","text":"{text}"}}"#))
}

/// Builds a chat request for the model `tiny` that requests a stream.
pub fn streaming(text: &str) -> String {
    post(CHAT, &format!(r#"{{"model":"tiny","stream":true,"text":"{text}"}}"#))
}

/// Builds a GET.
pub fn get(path: &str) -> String {
    get_with(path, &[])
}

/// Builds a GET with further header lines.
pub fn get_with(path: &str, fields: &[(&str, &str)]) -> String {
    let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!("GET {path} HTTP/1.1\r\nHost: api.test\r\n{fields}\r\n")
}
