//! An HTTP/2 client without TLS.

use std::net::SocketAddr;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::soon;

pub async fn connect(address: SocketAddr) -> SendRequest<Full<Bytes>> {
    let stream = soon("a connection", TcpStream::connect(address)).await.unwrap();
    let (sender, connection) =
        soon("HTTP/2", http2::handshake(TokioExecutor::new(), TokioIo::new(stream))).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// Builds a POST of JSON.
pub fn post(address: SocketAddr, path: &str, body: &str) -> Request<Full<Bytes>> {
    Request::post(format!("http://{address}{path}"))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
        .unwrap()
}
