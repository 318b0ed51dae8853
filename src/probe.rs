//! The readiness probe, and a look at a server's metrics: one GET on a connection of its own.

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

/// What a probe saw. Its text goes into reasons that people read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// 2xx.
    Ready,
    /// The host name has no address: it, and why.
    Unresolved(String, String),
    /// Nobody listens.
    Refused,
    /// An answer, but not 2xx.
    Status(StatusCode),
    /// No connection in time.
    Unheard(Period),
    /// A connection, and no answer in time.
    TimedOut(Period),
    /// The connection failed in another way, or what came back is no answer.
    Broken(String),
}

/// How a server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// In HTTP/1.1.
    Http1,
    /// In HTTP/2 without TLS, with prior knowledge.
    Http2,
}

/// What a server is asked, or told.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// How.
    pub speaks: Speaks,
    /// The method.
    pub method: Method,
    /// The path, and a query.
    pub path: &'a str,
    /// JSON, or nothing.
    pub body: &'static str,
}

/// How long connecting to a pod may take. One whose network is not there yet lets SYNs go unheard, and the kernel sends
/// the next only after a second: we are back sooner. Within a cluster an answer takes a few milliseconds.
const CONNECT: Duration = Duration::from_millis(200);

/// Asks the server at `address` (`host:port`) whether it is ready.
pub async fn probe(address: &str, readiness: &Readiness) -> Answer {
    answer(address, Speaks::Http1, readiness, readiness.timeout).await
}

/// Asks a pod, which may not even have a network yet.
pub async fn probe_pod(address: &str, speaks: Speaks, readiness: &Readiness) -> Answer {
    answer(address, speaks, readiness, Period::from(CONNECT.min(readiness.timeout.get()))).await
}

/// Looks the host of `address` up, within `limit`: what a probe of it would see if that fails. An address costs nothing.
pub async fn resolve(address: &str, limit: Period) -> Result<Vec<SocketAddr>, Answer> {
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
    Err(Answer::Unresolved(host.to_owned(), reason))
}

async fn answer(address: &str, speaks: Speaks, readiness: &Readiness, connect: Period) -> Answer {
    // By itself: one that takes too long is no server that does not answer.
    let found = match resolve(address, readiness.timeout).await {
        Ok(found) => found,
        Err(unresolved) => return unresolved,
    };
    let status = async |response: Response<Incoming>| Ok(response.status());
    let question = Question { speaks, ..Question::get(&readiness.path) };
    match timeout(readiness.timeout.get(), ask_at(&found[..], address, question, connect, status)).await {
        Ok(Ok(status)) if status.is_success() => Answer::Ready,
        Ok(Ok(status)) => Answer::Status(status),
        Ok(Err(error)) => error.into(),
        Err(_) => Answer::TimedOut(readiness.timeout),
    }
}

/// Reads a page of a pod, such as its metrics: at most `longest` bytes, within `limit`. `None` if there is none to be
/// had.
pub async fn fetch(
    address: &str,
    speaks: Speaks,
    path: &str,
    longest: usize,
    limit: Duration,
) -> Option<Bytes> {
    let page = async |response: Response<Incoming>| {
        if !response.status().is_success() {
            return Ok(None);
        }
        Ok(Limited::new(response.into_body(), longest).collect().await.ok().map(Collected::to_bytes))
    };
    let question = Question { speaks, ..Question::get(path) };
    timeout(limit, ask(address, question, Period::from(CONNECT), page)).await.ok()?.ok()?
}

/// Tells the server at `address` to do something, and waits until it has: what it says, of a body not more than 64 KiB.
/// It may take its time, so the caller has a deadline. Cancel-safe.
///
/// # Errors
/// What a probe would have seen.
pub async fn call(address: &str, question: Question<'_>) -> Result<(StatusCode, Bytes), Answer> {
    const LONGEST: usize = 64 << 10;
    let said = async |response: Response<Incoming>| {
        let status = response.status();
        let body = Limited::new(response.into_body(), LONGEST).collect().await;
        Ok((status, body.map(Collected::to_bytes).unwrap_or_default()))
    };
    Ok(ask(address, question, Period::from_secs(10), said).await?)
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
    question: Question<'_>,
    connect: Period,
    read: impl AsyncFnOnce(Response<Incoming>) -> Result<T, ProbeError>,
) -> Result<T, ProbeError> {
    ask_at(address, address, question, connect, read).await
}

/// Asks the server `at` one of these addresses, by its own name.
async fn ask_at<T>(
    at: impl ToSocketAddrs,
    address: &str,
    question: Question<'_>,
    connect: Period,
    read: impl AsyncFnOnce(Response<Incoming>) -> Result<T, ProbeError>,
) -> Result<T, ProbeError> {
    let connecting = timeout(connect.get(), TcpStream::connect(at)).await;
    let stream = connecting.map_err(|_| ProbeError::Unheard(connect))??;
    if stream.local_addr()? == stream.peer_addr()? {
        // Nobody listens, and the kernel chose the port that we asked for as our own: TCP connects that to itself.
        return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
    }
    let agent = concat!("anteroom/", env!("CARGO_PKG_VERSION"), " (probe)");
    let Question { speaks, method, path, body } = question;
    let uri = match speaks {
        Speaks::Http1 => path.to_owned(),
        Speaks::Http2 => format!("http://{address}{path}"),
    };
    let mut request = Request::builder().method(method).uri(uri).header(header::USER_AGENT, agent);
    if !body.is_empty() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let body = Full::new(Bytes::from_static(body.as_bytes()));
    match speaks {
        Speaks::Http1 => {
            let request = request.header(header::HOST, address).header(header::CONNECTION, "close");
            let request = request.body(body)?;
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            drive(async { read(sender.send_request(request).await?).await }, connection).await
        }
        Speaks::Http2 => {
            let request = request.body(body)?;
            let (mut sender, connection) =
                http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
            drive(async { read(sender.send_request(request).await?).await }, connection).await
        }
    }
}

/// Does `work` over `connection`, which does nothing unless it is polled.
async fn drive<T>(work: impl Future<Output = T>, connection: impl Future) -> T {
    pin!(work, connection);
    tokio::select! {
        // The work first: when it is done, the connection has done all that it should.
        biased;
        done = &mut work => done,
        _ = connection => work.await,
    }
}

// === impl Question ===

impl<'a> Question<'a> {
    /// A GET, in HTTP/1.1.
    pub const fn get(path: &'a str) -> Self {
        Self { speaks: Speaks::Http1, method: Method::GET, path, body: "" }
    }

    /// A POST, in HTTP/1.1.
    pub const fn post(path: &'a str, body: &'static str) -> Self {
        Self { speaks: Speaks::Http1, method: Method::POST, path, body }
    }
}

// === impl Answer ===

impl Answer {
    /// Whether the server takes requests.
    pub fn is_ready(&self) -> bool {
        *self == Self::Ready
    }

    /// Whether something answers that may well take requests: it is ready, or finds fault with the probe itself.
    pub fn is_alive(&self) -> bool {
        match self {
            Self::Ready => true,
            Self::Status(status) => status.is_redirection() || status.is_client_error(),
            Self::Unresolved(..) | Self::Refused | Self::Unheard(_) | Self::TimedOut(_) | Self::Broken(_) => {
                false
            }
        }
    }

    /// Whether a server finds fault with the probe: it would answer so however long it is asked.
    pub fn is_rejection(&self) -> bool {
        self.is_alive() && !self.is_ready()
    }

    /// Whether a gateway that answers so, or does not answer, reaches no server. Other errors say nothing: the path may
    /// be none that it passes on.
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

impl From<ProbeError> for Answer {
    fn from(error: ProbeError) -> Self {
        match error {
            ProbeError::Unheard(limit) => Self::Unheard(limit),
            ProbeError::Connect(error) if error.kind() == io::ErrorKind::ConnectionRefused => Self::Refused,
            error => Self::Broken(error.to_string()),
        }
    }
}

impl fmt::Display for Answer {
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

    async fn answer_to(response: &'static [u8]) -> Answer {
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
    async fn two_hundreds_are_ready_and_nothing_else_is() {
        assert_eq!(answer_to(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n").await, Answer::Ready);
        let unready = answer_to(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").await;
        assert_eq!(unready, Answer::Status(StatusCode::SERVICE_UNAVAILABLE));
        assert!(matches!(answer_to(b"220 mail.example.com ESMTP\r\n").await, Answer::Broken(_)));
        assert!(matches!(answer_to(b"").await, Answer::Broken(_)), "closed without a word");
    }

    /// RFC 6761, section 6.4: no resolver has a name below it.
    #[tokio::test]
    async fn name_that_does_not_resolve_is_named() {
        let readiness = Readiness { timeout: Period::from_secs(30), ..Readiness::default() };
        let Answer::Unresolved(host, reason) = probe("vllm.invalid:8000", &readiness).await else {
            panic!("not unresolved");
        };
        assert_eq!(host, "vllm.invalid");
        assert!(!reason.is_empty() && !reason.contains("failed to lookup"), "{reason}");
    }

    #[tokio::test]
    async fn nobody_and_silence_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let limit = Period::from_millis(20);
        let readiness = Readiness { timeout: limit, ..Readiness::default() };
        assert_eq!(probe(&address, &readiness).await, Answer::TimedOut(limit));
        drop(listener);
        let readiness = Readiness { timeout: Period::from_secs(30), ..Readiness::default() };
        assert_eq!(probe(&address, &readiness).await, Answer::Refused);
    }
}
