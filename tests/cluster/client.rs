//! HTTP/1.1 client: one connection per request, streaming responses.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use crate::wait;

/// Response with a streaming body. Dropping it closes the connection.
pub(crate) struct StreamingResponse {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    _connection: AbortOnDropHandle<()>,
}

/// Sends a request. The error is a message.
pub(crate) async fn send(
    address: SocketAddr,
    request: Request<Full<Bytes>>,
) -> Result<StreamingResponse, String> {
    let stream = TcpStream::connect(address).await.map_err(|error| format!("{address}: {error}"))?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(words)?;
    let connection = AbortOnDropHandle::new(tokio::spawn(async move {
        let _ = connection.await;
    }));
    let answer = sender.send_request(request).await.map_err(words)?;
    let (head, body) = answer.into_parts();
    Ok(StreamingResponse { status: head.status, headers: head.headers, body, _connection: connection })
}

/// Sends a GET, like a probe; times out after [`wait::WAIT_LIMIT`].
pub(crate) async fn get(address: SocketAddr, path: &str) -> Result<StreamingResponse, String> {
    let request = Request::get(path).header("host", address.to_string()).body(Full::default()).unwrap();
    match tokio::time::timeout(wait::WAIT_LIMIT, send(address, request)).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("{address}{path}: no answer within {:?}", wait::WAIT_LIMIT)),
    }
}

/// Builds a request for a completion, as SDKs do.
pub(crate) fn completion(host: &str, model: &str, stream: bool) -> Request<Full<Bytes>> {
    post(
        host,
        &json!({ "model": model, "stream": stream, "messages": [{ "role": "user", "content": "hello" }] }),
    )
}

/// Builds a request for a stream of at most `tokens` tokens.
pub(crate) fn limited(host: &str, model: &str, tokens: u32) -> Request<Full<Bytes>> {
    post(
        host,
        &json!({ "model": model, "stream": true, "max_tokens": tokens, "messages": [{ "role": "user", "content": "hello" }] }),
    )
}

fn post(host: &str, body: &Value) -> Request<Full<Bytes>> {
    Request::post("/v1/chat/completions")
        .header("host", host)
        .header("content-type", "application/json")
        .body(Full::new(body.to_string().into()))
        .unwrap()
}

fn words(error: hyper::Error) -> String {
    error.to_string()
}

// === impl StreamingResponse ===

impl StreamingResponse {
    /// Returns the next part of the body; `None` at its proper end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, String> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if !data.is_empty() => return Ok(Some(data)),
                    _ => {}
                },
                Some(Err(error)) => return Err(words(error)),
            }
        }
    }

    /// Reads the rest of the body.
    pub(crate) async fn text(mut self) -> Result<String, String> {
        let mut text = Vec::new();
        while let Some(part) = self.next().await? {
            text.extend_from_slice(&part);
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Reads the body as JSON, within 60 s.
    pub(crate) async fn json(self) -> Value {
        let text = wait::within("the body", Duration::from_secs(60), self.text()).await.unwrap();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("not JSON ({error}): {text}"))
    }
}
