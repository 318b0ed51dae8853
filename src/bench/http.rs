//! A small HTTP client: one connection a request, to an address that anybody may have typed.

use std::{fmt, str::FromStr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet, time::timeout};

/// Where a server is: `http://host:port`, with a path that goes before every other if it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    host: String,
    port: u16,
    prefix: String,
}

/// A connection, which is closed when this is dropped.
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    _driver: JoinSet<()>,
}

/// How long a connection may take to be there.
const CONNECT: Duration = Duration::from_secs(10);

/// The largest answer that is read as a whole.
const WHOLE: usize = 64 << 20;

// === impl Base ===

impl FromStr for Base {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = match text.split_once("://") {
            None => text,
            Some(("http", rest)) => rest,
            Some(("https", _)) => {
                return Err(format!(
                    "{text} speaks TLS, which this command does not; reach the proxy itself, for example through \
                     `kubectl port-forward`, and give http://127.0.0.1:PORT"
                ));
            }
            Some((scheme, _)) => return Err(format!("{text}: write http://HOST:PORT, not {scheme}://")),
        };
        let (authority, prefix) = match rest.find('/') {
            Some(place) => rest.split_at(place),
            None => (rest, ""),
        };
        let wrong = || format!("{text} is no address: write http://HOST:PORT");
        let authority: http::uri::Authority = authority.parse().map_err(|_| wrong())?;
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        if host.is_empty() || authority.as_str().contains('@') || prefix.contains(['?', '#']) {
            return Err(wrong());
        }
        let port = match authority.port() {
            Some(port) => port.as_str().parse().map_err(|_| wrong())?,
            // What is no port is none.
            None if authority.as_str().len() > authority.host().len() => return Err(wrong()),
            None => 80,
        };
        Ok(Self { host, port, prefix: prefix.trim_end_matches('/').to_owned() })
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority(), self.prefix)
    }
}

impl From<std::net::SocketAddr> for Base {
    fn from(address: std::net::SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port(), prefix: String::new() }
    }
}

impl Base {
    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// Connects.
    ///
    /// # Errors
    /// A sentence, when nothing can be connected to.
    pub(super) async fn connect(&self) -> Result<Connection, String> {
        let stream = match timeout(CONNECT, TcpStream::connect((self.host.as_str(), self.port))).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(format!("cannot connect: {error}")),
            Err(_) => return Err(format!("cannot connect: no answer within {} s", CONNECT.as_secs())),
        };
        // A request is one write, and is to be sent at once.
        let _ = stream.set_nodelay(true);
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| format!("cannot connect: {error}"))?;
        let mut driver = JoinSet::new();
        // What goes wrong with it is said to who reads the answer.
        driver.spawn(async { connection.await.unwrap_or_default() });
        Ok(Connection { sender, _driver: driver })
    }

    /// A request for a path of this server.
    ///
    /// # Errors
    /// When a header or the path cannot be sent.
    pub(super) fn request(
        &self,
        method: Method,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, String> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.prefix))
            .header(header::HOST, self.authority());
        let mut request = request.body(Full::new(body)).map_err(|error| error.to_string())?;
        request.headers_mut().extend(headers.clone());
        Ok(request)
    }

    /// Reads a path as a whole.
    ///
    /// # Errors
    /// A sentence, when there is no answer within `limit`.
    pub(super) async fn get(&self, path: &str, limit: Duration) -> Result<(StatusCode, Bytes), String> {
        let get = async {
            let request = self.request(Method::GET, path, &HeaderMap::new(), Bytes::new())?;
            let mut connection = self.connect().await?;
            let response = connection.send(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), WHOLE).collect().await;
            Ok((status, body.map_err(|error| format!("the answer broke off: {error}"))?.to_bytes()))
        };
        timeout(limit, get).await.unwrap_or_else(|_| Err(format!("no answer within {} s", limit.as_secs())))
    }
}

// === impl Connection ===

impl Connection {
    /// Sends a request, and waits for the head of its answer.
    ///
    /// # Errors
    /// A sentence.
    pub(super) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<http::Response<hyper::body::Incoming>, String> {
        self.sender.send_request(request).await.map_err(|error| format!("no answer: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_be_written_in_several_ways() {
        let read = |text: &str| text.parse::<Base>().map(|base| base.to_string());
        for (text, expected) in [
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("127.0.0.1:8080/", "http://127.0.0.1:8080"),
            ("http://anteroom.models/a/b/", "http://anteroom.models:80/a/b"),
            ("http://[::1]:8080", "http://[::1]:8080"),
        ] {
            assert_eq!(read(text).unwrap(), expected);
        }
        for (text, expected) in [
            ("https://a:1", "port-forward"),
            ("ftp://a:1", "not ftp://"),
            ("http://", "write http://HOST:PORT"),
            ("http://me@a:1", "write http://HOST:PORT"),
            ("a b", "write http://HOST:PORT"),
            ("a:70000", "write http://HOST:PORT"),
            ("http://a:1/?b", "write http://HOST:PORT"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
