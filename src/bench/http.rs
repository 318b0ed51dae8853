//! Minimal HTTP/1 client with one connection per request.

use std::{fmt, str::FromStr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet, time::timeout};

/// Base URL of a server, `http://host:port[/prefix]`. The prefix is prepended to every path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl {
    host: String,
    port: u16,
    prefix: String,
}

/// A connection. Closed on drop.
pub(super) struct HttpConnection {
    sender: SendRequest<Full<Bytes>>,
    _driver: JoinSet<()>,
}

/// Timeout of connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest body that [`BaseUrl::get`] reads.
const MAX_API_BODY_BYTES: usize = 64 << 20;

// === impl BaseUrl ===

impl FromStr for BaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = match text.split_once("://") {
            None => text,
            Some(("http", rest)) => rest,
            Some(("https", _)) => {
                return Err(format!(
                    "{text}: TLS is not supported; connect to the proxy directly, for example with `kubectl port-forward`, \
                     and use http://127.0.0.1:PORT"
                ));
            }
            Some((scheme, _)) => return Err(format!("{text}: use http://HOST:PORT, not {scheme}://")),
        };
        let (authority, prefix) = match rest.find('/') {
            Some(place) => rest.split_at(place),
            None => (rest, ""),
        };
        let invalid = || format!("{text} is not a valid address; use http://HOST:PORT");
        let authority: http::uri::Authority = authority.parse().map_err(|_| invalid())?;
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        if host.is_empty() || authority.as_str().contains('@') || prefix.contains(['?', '#']) {
            return Err(invalid());
        }
        let port = match authority.port() {
            Some(port) => port.as_str().parse().map_err(|_| invalid())?,
            // The authority has a colon without a port.
            None if authority.as_str().len() > authority.host().len() => return Err(invalid()),
            None => 80,
        };
        Ok(Self { host, port, prefix: prefix.trim_end_matches('/').to_owned() })
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority(), self.prefix)
    }
}

impl From<std::net::SocketAddr> for BaseUrl {
    fn from(address: std::net::SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port(), prefix: String::new() }
    }
}

impl BaseUrl {
    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// Opens a connection, within [`CONNECT_TIMEOUT`].
    pub(super) async fn connect(&self) -> Result<HttpConnection, String> {
        let stream = match timeout(CONNECT_TIMEOUT, TcpStream::connect((self.host.as_str(), self.port))).await
        {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(format!("cannot connect: {error}")),
            Err(_) => return Err(format!("cannot connect: timed out after {} s", CONNECT_TIMEOUT.as_secs())),
        };
        // A request is a single write: Nagle's algorithm would only delay it.
        let _ = stream.set_nodelay(true);
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| format!("cannot connect: {error}"))?;
        let mut driver = JoinSet::new();
        // Ignores errors: the reader of the response gets them as well.
        driver.spawn(async { connection.await.unwrap_or_default() });
        Ok(HttpConnection { sender, _driver: driver })
    }

    /// Builds a request.
    ///
    /// # Errors
    /// If a header or the path is invalid.
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

    /// Sends a GET request and reads the whole response, within `time_limit`.
    pub(super) async fn get(&self, path: &str, time_limit: Duration) -> Result<(StatusCode, Bytes), String> {
        let get = async {
            let request = self.request(Method::GET, path, &HeaderMap::new(), Bytes::new())?;
            let mut connection = self.connect().await?;
            let response = connection.send(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_API_BODY_BYTES).collect().await;
            Ok((status, body.map_err(|error| format!("response interrupted: {error}"))?.to_bytes()))
        };
        timeout(time_limit, get)
            .await
            .unwrap_or_else(|_| Err(format!("no response within {} s", time_limit.as_secs())))
    }
}

// === impl HttpConnection ===

impl HttpConnection {
    /// Sends a request and waits for the response head.
    pub(super) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<http::Response<hyper::body::Incoming>, String> {
        self.sender.send_request(request).await.map_err(|error| format!("no response: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_url_parses_addresses_and_urls() {
        let read = |text: &str| text.parse::<BaseUrl>().map(|base| base.to_string());
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
            ("http://", "use http://HOST:PORT"),
            ("http://me@a:1", "use http://HOST:PORT"),
            ("a b", "use http://HOST:PORT"),
            ("a:70000", "use http://HOST:PORT"),
            ("http://a:1/?b", "use http://HOST:PORT"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
