//! The readiness probe: one GET on a connection of its own.

use std::{fmt, io};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, pin, time::timeout};

use crate::domain::{Period, Readiness};

/// What a probe saw. Its text goes into reasons that people read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// 2xx.
    Ready,
    /// Nobody listens.
    Refused,
    /// An answer, but not 2xx.
    Status(StatusCode),
    /// No answer in time.
    TimedOut(Period),
    /// The connection failed in another way, or what came back is no answer.
    Broken(String),
}

/// Asks the server at `address` (`host:port`) whether it is ready.
pub async fn probe(address: &str, readiness: &Readiness) -> Answer {
    match timeout(readiness.timeout.get(), ask(address, &readiness.path)).await {
        Ok(Ok(status)) if status.is_success() => Answer::Ready,
        Ok(Ok(status)) => Answer::Status(status),
        Ok(Err(error)) => error.into(),
        Err(_) => Answer::TimedOut(readiness.timeout),
    }
}

#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error(transparent)]
    Connect(#[from] io::Error),
    #[error(transparent)]
    Request(#[from] http::Error),
    #[error(transparent)]
    Exchange(#[from] hyper::Error),
}

async fn ask(address: &str, path: &str) -> Result<StatusCode, ProbeError> {
    let stream = TcpStream::connect(address).await?;
    if stream.local_addr()? == stream.peer_addr()? {
        // Nobody listens, and the kernel chose the port that we asked for as our own: TCP connects that to itself.
        return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
    }
    let request = Request::get(path)
        .header(header::HOST, address)
        .header(header::CONNECTION, "close")
        .header(header::USER_AGENT, concat!("anteroom/", env!("CARGO_PKG_VERSION"), " (probe)"))
        .body(Empty::<Bytes>::new())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let answer = sender.send_request(request);
    pin!(answer, connection);
    let answer = tokio::select! {
        // The answer first: with it the connection has done all that it should.
        biased;
        answer = &mut answer => answer,
        _ = connection => answer.await,
    };
    Ok(answer?.status())
}

// === impl Answer ===

impl Answer {
    /// Whether the server takes requests.
    pub fn is_ready(&self) -> bool {
        *self == Self::Ready
    }
}

impl From<ProbeError> for Answer {
    fn from(error: ProbeError) -> Self {
        match error {
            ProbeError::Connect(error) if error.kind() == io::ErrorKind::ConnectionRefused => Self::Refused,
            error => Self::Broken(error.to_string()),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::Refused => f.write_str("connection refused"),
            Self::Status(status) => write!(f, "status {}", status.as_u16()),
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
