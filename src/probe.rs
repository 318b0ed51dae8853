//! Readiness probes and other calls to model servers, each on a connection of its own.

use std::{fmt, io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Collected, Full, Limited};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::{TcpStream, ToSocketAddrs, lookup_host},
    pin,
    time::timeout,
};

use crate::domain::{Period, Readiness};

/// Result of a probe. Its text is part of error messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// 2xx.
    Ready,
    /// The host name does not resolve: the name, and the reason.
    Unresolved(String, String),
    /// Connection refused.
    Refused,
    /// Another status than 2xx.
    Status(StatusCode),
    /// No connection within the time limit.
    Unheard(Period),
    /// A connection, but no answer within the time limit.
    TimedOut(Period),
    /// Another failure of the connection, or an invalid answer.
    Broken(String),
}

/// Protocol of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 without TLS, with prior knowledge.
    Http2,
}

/// A request to a model server.
#[derive(Clone, Debug)]
pub struct ProbeRequest<'a> {
    /// Protocol.
    pub speaks: ProbeProtocol,
    /// Method.
    pub method: Method,
    /// Path and query.
    pub path: &'a str,
    /// JSON, or empty.
    pub body: &'static str,
}

/// Connect timeout for pods. A pod without a network drops SYNs, and the kernel repeats them only after a second; a new
/// probe is sooner. Within a cluster connecting takes a few milliseconds.
const POD_CONNECT_TIMEOUT: Duration = Duration::from_millis(200);

/// Probes the server at `address` (`host:port`).
pub async fn probe(address: &str, readiness: &Readiness) -> ProbeResult {
    answer(address, ProbeProtocol::Http1, readiness, readiness.timeout).await
}

/// Probes a pod, which may not have a network yet.
pub async fn probe_pod(address: &str, speaks: ProbeProtocol, readiness: &Readiness) -> ProbeResult {
    answer(address, speaks, readiness, Period::from(POD_CONNECT_TIMEOUT.min(readiness.timeout.get()))).await
}

/// Resolves the host of `address` within `limit`. An IP address needs no lookup.
///
/// # Errors
/// [`ProbeResult::Unresolved`].
pub async fn resolve(address: &str, limit: Period) -> Result<Vec<SocketAddr>, ProbeResult> {
    let reason = match timeout(limit.get(), lookup_host(address)).await {
        Ok(Ok(found)) => {
            let found: Vec<_> = found.collect();
            if !found.is_empty() {
                return Ok(found);
            }
            "it has no address".to_owned()
        }
        Ok(Err(error)) => {
            let text = error.to_string();
            text.strip_prefix("failed to lookup address information: ").unwrap_or(&text).to_owned()
        }
        Err(_) => format!("no answer within {limit}"),
    };
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    Err(ProbeResult::Unresolved(host.to_owned(), reason))
}

async fn answer(address: &str, speaks: ProbeProtocol, readiness: &Readiness, connect: Period) -> ProbeResult {
    // Separately, so that a slow lookup is not reported as a server that does not answer.
    let found = match resolve(address, readiness.timeout).await {
        Ok(found) => found,
        Err(unresolved) => return unresolved,
    };
    let status = async |response: Response<Incoming>| Ok(response.status());
    let question = ProbeRequest { speaks, ..ProbeRequest::get(&readiness.path) };
    match timeout(readiness.timeout.get(), ask_at(&found[..], address, question, connect, status)).await {
        Ok(Ok(status)) if status.is_success() => ProbeResult::Ready,
        Ok(Ok(status)) => ProbeResult::Status(status),
        Ok(Err(error)) => error.into(),
        Err(_) => ProbeResult::TimedOut(readiness.timeout),
    }
}

/// Fetches a page of a pod, such as its metrics: at most `max_bytes`, within `limit`. Returns `None` on any failure.
pub async fn fetch(
    address: &str,
    speaks: ProbeProtocol,
    path: &str,
    max_bytes: usize,
    limit: Duration,
) -> Option<Bytes> {
    let page = async |response: Response<Incoming>| {
        if !response.status().is_success() {
            return Ok(None);
        }
        Ok(Limited::new(response.into_body(), max_bytes).collect().await.ok().map(Collected::to_bytes))
    };
    let question = ProbeRequest { speaks, ..ProbeRequest::get(path) };
    timeout(limit, ask(address, question, Period::from(POD_CONNECT_TIMEOUT), page)).await.ok()?.ok()?
}

/// Sends a request to the server at `address` and returns status and body, of at most 64 KiB. Has no time limit after the
/// connection. Cancel-safe.
///
/// # Errors
/// The [`ProbeResult`] of a probe that failed in the same way.
pub async fn call(address: &str, question: ProbeRequest<'_>) -> Result<(StatusCode, Bytes), ProbeResult> {
    const MAX_PROBE_BODY_BYTES: usize = 64 << 10;
    let read = async |response: Response<Incoming>| {
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_PROBE_BODY_BYTES).collect().await;
        Ok((status, body.map(Collected::to_bytes).unwrap_or_default()))
    };
    Ok(ask(address, question, Period::from_secs(10), read).await?)
}

#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("no connection within {0}")]
    Unheard(Period),
    #[error(transparent)]
    Connect(#[from] io::Error),
    #[error(transparent)]
    Request(#[from] http::Error),
    #[error(transparent)]
    Exchange(#[from] hyper::Error),
}

async fn ask<T>(
    address: &str,
    question: ProbeRequest<'_>,
    connect: Period,
    read: impl AsyncFnOnce(Response<Incoming>) -> Result<T, ProbeError>,
) -> Result<T, ProbeError> {
    ask_at(address, address, question, connect, read).await
}

/// Sends a request to the first of the addresses `at` that connects, with `address` as its Host.
async fn ask_at<T>(
    at: impl ToSocketAddrs,
    address: &str,
    question: ProbeRequest<'_>,
    connect: Period,
    read: impl AsyncFnOnce(Response<Incoming>) -> Result<T, ProbeError>,
) -> Result<T, ProbeError> {
    let connecting = timeout(connect.get(), TcpStream::connect(at)).await;
    let stream = connecting.map_err(|_| ProbeError::Unheard(connect))??;
    if stream.local_addr()? == stream.peer_addr()? {
        // A self-connect: no server listens, and the kernel chose the destination port as our own.
        return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
    }
    let agent = concat!("anteroom/", env!("CARGO_PKG_VERSION"), " (probe)");
    let ProbeRequest { speaks, method, path, body } = question;
    let uri = match speaks {
        ProbeProtocol::Http1 => path.to_owned(),
        ProbeProtocol::Http2 => format!("http://{address}{path}"),
    };
    let mut request = Request::builder().method(method).uri(uri).header(header::USER_AGENT, agent);
    if !body.is_empty() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let body = Full::new(Bytes::from_static(body.as_bytes()));
    match speaks {
        ProbeProtocol::Http1 => {
            let request = request.header(header::HOST, address).header(header::CONNECTION, "close");
            let request = request.body(body)?;
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            drive(async { read(sender.send_request(request).await?).await }, connection).await
        }
        ProbeProtocol::Http2 => {
            let request = request.body(body)?;
            let (mut sender, connection) =
                http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
            drive(async { read(sender.send_request(request).await?).await }, connection).await
        }
    }
}

/// Runs `work` while polling its `connection`.
async fn drive<T>(work: impl Future<Output = T>, connection: impl Future) -> T {
    pin!(work, connection);
    tokio::select! {
        // The work first: once it is done, the connection is no longer needed.
        biased;
        done = &mut work => done,
        _ = connection => work.await,
    }
}

// === impl ProbeRequest ===

impl<'a> ProbeRequest<'a> {
    /// Creates a GET over HTTP/1.1.
    pub const fn get(path: &'a str) -> Self {
        Self { speaks: ProbeProtocol::Http1, method: Method::GET, path, body: "" }
    }

    /// Creates a POST over HTTP/1.1.
    pub const fn post(path: &'a str, body: &'static str) -> Self {
        Self { speaks: ProbeProtocol::Http1, method: Method::POST, path, body }
    }
}

// === impl ProbeResult ===

impl ProbeResult {
    /// Returns true if the server is ready for requests.
    pub fn is_ready(&self) -> bool {
        *self == Self::Ready
    }

    /// Returns true if the server may take requests: it is ready, or rejects only the probe.
    pub fn is_alive(&self) -> bool {
        match self {
            Self::Ready => true,
            Self::Status(status) => status.is_redirection() || status.is_client_error(),
            Self::Unresolved(..) | Self::Refused | Self::Unheard(_) | Self::TimedOut(_) | Self::Broken(_) => {
                false
            }
        }
    }

    /// Returns true if the server rejects the probe, which repetition does not change.
    pub fn is_rejection(&self) -> bool {
        self.is_alive() && !self.is_ready()
    }

    /// Returns true if a gateway with this answer reaches no server. Other errors prove nothing, as the gateway may not
    /// forward the path.
    pub const fn is_without_server(&self) -> bool {
        match self {
            Self::Status(status) => matches!(status.as_u16(), 502..=504),
            Self::Unresolved(..) | Self::Refused | Self::Unheard(_) | Self::TimedOut(_) | Self::Broken(_) => {
                true
            }
            Self::Ready => false,
        }
    }
}

impl From<ProbeError> for ProbeResult {
    fn from(error: ProbeError) -> Self {
        match error {
            ProbeError::Unheard(limit) => Self::Unheard(limit),
            ProbeError::Connect(error) if error.kind() == io::ErrorKind::ConnectionRefused => Self::Refused,
            error => Self::Broken(error.to_string()),
        }
    }
}

impl fmt::Display for ProbeResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::Unresolved(host, reason) => write!(f, "`{host}` does not resolve ({reason})"),
            Self::Refused => f.write_str("connection refused"),
            Self::Status(status) => write!(f, "status {}", status.as_u16()),
            Self::Unheard(limit) => write!(f, "no connection within {limit}"),
            Self::TimedOut(limit) => write!(f, "no answer within {limit}"),
            Self::Broken(reason) => f.write_str(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    async fn answer_to(response: &'static [u8]) -> ProbeResult {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 512];
            let count = stream.read(&mut request).await.unwrap();
            stream.write_all(response).await.unwrap();
            String::from_utf8_lossy(&request[..count]).into_owned()
        };
        let readiness = Readiness { timeout: Period::from_secs(30), ..Readiness::default() };
        let (answer, request) = tokio::join!(probe(&address, &readiness), server);
        assert!(request.starts_with("GET /health HTTP/1.1\r\n"), "{request}");
        assert!(request.contains(&format!("host: {address}\r\n")), "{request}");
        answer
    }

    #[tokio::test]
    async fn only_2xx_is_ready() {
        assert_eq!(answer_to(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n").await, ProbeResult::Ready);
        let unready = answer_to(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").await;
        assert_eq!(unready, ProbeResult::Status(StatusCode::SERVICE_UNAVAILABLE));
        assert!(matches!(answer_to(b"220 mail.example.com ESMTP\r\n").await, ProbeResult::Broken(_)));
        assert!(matches!(answer_to(b"").await, ProbeResult::Broken(_)), "closed without an answer");
    }

    /// RFC 6761, section 6.4: `invalid` never resolves.
    #[tokio::test]
    async fn unresolved_name_is_reported() {
        let readiness = Readiness { timeout: Period::from_secs(30), ..Readiness::default() };
        let ProbeResult::Unresolved(host, reason) = probe("vllm.invalid:8000", &readiness).await else {
            panic!("not unresolved");
        };
        assert_eq!(host, "vllm.invalid");
        assert!(!reason.is_empty() && !reason.contains("failed to lookup"), "{reason}");
    }

    #[tokio::test]
    async fn refusal_and_silence_differ() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let limit = Period::from_millis(20);
        let readiness = Readiness { timeout: limit, ..Readiness::default() };
        assert_eq!(probe(&address, &readiness).await, ProbeResult::TimedOut(limit));
        drop(listener);
        let readiness = Readiness { timeout: Period::from_secs(30), ..Readiness::default() };
        assert_eq!(probe(&address, &readiness).await, ProbeResult::Refused);
    }
}
