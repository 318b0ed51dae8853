//! Model server that records every request: its fields as written, and the bytes after it.

use std::{collections::HashSet, sync::Arc};

use parking_lot::Mutex;

use crate::support::{
    TestProxy, TestUpstream,
    upstream::UpstreamCall,
    wire::{CHAT, Head, post},
};

/// Request as received by the model server.
#[derive(Clone, Debug)]
pub struct RecordedRequest {
    pub head: Head,
    pub body: String,
}

pub struct Recorder {
    pub upstream: TestUpstream,
    seen: Arc<Mutex<Vec<RecordedRequest>>>,
}

pub const TINY_BODY: &str = r#"{"model":"tiny"}"#;
const SENTINEL: &str = r#"{"model":"tiny","text":"sentinel"}"#;

// === impl Recorder ===

impl Recorder {
    pub async fn new() -> Self {
        let seen: Arc<Mutex<Vec<RecordedRequest>>> = Arc::default();
        let record = seen.clone();
        let upstream = TestUpstream::warm().await.automatic(move |call| keep(call, record.clone()));
        Self { upstream, seen }
    }

    /// Returns the requests received since the last call, provided that no other request is in flight.
    pub async fn taken(&self, proxy: &TestProxy) -> Vec<RecordedRequest> {
        assert_eq!(proxy.ask(post(CHAT, SENTINEL)).await.status(), 200);
        let mut seen = std::mem::take(&mut *self.seen.lock());
        assert_eq!(seen.pop().unwrap().body, SENTINEL);
        seen
    }
}

async fn keep(mut call: UpstreamCall, record: Arc<Mutex<Vec<RecordedRequest>>>) {
    one_reading(&call.head);
    let body = call.wire.body(&call.head).await;
    let body = body.map_or_else(|| "(broken)".into(), |body| String::from_utf8_lossy(&body).into_owned());
    let after = String::from_utf8_lossy(&call.wire.buf).into_owned();
    assert_eq!(after, "", "no byte follows a request before it is answered");
    record.lock().push(RecordedRequest { head: call.head.clone(), body });
    call.reply("").await;
}

/// Asserts that the forwarded head is unambiguous.
fn one_reading(head: &Head) {
    let lengths = head.all("content-length");
    let codings = head.all("transfer-encoding");
    assert!(lengths.len() + codings.len() <= 1, "{head:?}");
    assert!(lengths.iter().all(|length| length.bytes().all(|byte| byte.is_ascii_digit())), "{head:?}");
    assert!(codings.iter().all(|coding| *coding == "chunked"), "{head:?}");
    assert_eq!(head.all("host").len(), 1, "{head:?}");
    assert!(head.start.ends_with(" HTTP/1.1") && head.start.split(' ').count() == 3, "{head:?}");
    let names: HashSet<_> = head.fields.iter().map(|(name, _)| name.to_lowercase()).collect();
    for ours in ["upgrade", "http2-settings", "proxy-connection", "keep-alive", "expect"] {
        assert!(!names.contains(ours), "{head:?}");
    }
    for (name, value) in &head.fields {
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.!#$%&'*+^`|~".contains(&byte);
        assert!(!name.is_empty() && name.bytes().all(is_token), "{name:?}");
        assert!(!value.contains(['\r', '\n', '\0']), "{name}: {value:?}");
    }
}
