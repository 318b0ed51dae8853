//! Blocking client of Anteroom's admin API.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use crate::clock::Instant;
use crate::contender::StartedContender;
use crate::error::LoadtestError;
use crate::http::{self, Framing};
use crate::setup::Setup;

/// Timeout of one read in [`get`]; the metrics of thousands of routes are several megabytes.
const GET_READ_TIMEOUT: Duration = Duration::from_secs(20);

/// Returns the status and the body of `GET path`, on a connection of its own.
pub(crate) fn get(admin: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&admin, GET_READ_TIMEOUT)?;
    stream.set_read_timeout(Some(GET_READ_TIMEOUT))?;
    // Sent in one write: a server that closes after responding resets the connection on later data.
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, format!("no answer to GET {path}"));
    let answer = String::from_utf8(answer).map_err(|_| malformed())?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(malformed)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(malformed)?;
    Ok((status, body.to_owned()))
}

/// Returns `true` if `/readyz` responds with 200.
pub(crate) fn is_ready(admin: SocketAddr) -> bool {
    get(admin, "/readyz").is_ok_and(|(status, _)| status == 200)
}

/// Waits until `running` is ready. Fails with its log if it exits or takes longer than [`ANTEROOM_START_TIMEOUT`].
pub(crate) fn await_ready(running: &mut StartedContender, setup: &Setup) -> Result<(), LoadtestError> {
    let deadline = Instant::now() + ANTEROOM_START_TIMEOUT;
    while !is_ready(running.admin) {
        setup.check_stop()?;
        running.check_start("anteroom", deadline)?;
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Time Anteroom may take to start.
const ANTEROOM_START_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout of one read on an [`AdminClient`] connection.
const ADMIN_READ_TIMEOUT: Duration = Duration::from_secs(30);

/// A keep-alive connection to the admin API. Its reads block the event loop of the rig.
#[derive(Debug)]
pub(crate) struct AdminClient {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// Requests held and in flight on the only route of a configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OnlyRouteLoad {
    pub(crate) held: u64,
    pub(crate) in_flight: u64,
}

/// Body of a `/metrics` response.
#[derive(Debug)]
pub(crate) struct ScrapedMetrics(String);

// === impl AdminClient ===

impl AdminClient {
    /// Waits until `running` responds on its admin port. Fails with its log if it exits or takes longer than [`ANTEROOM_START_TIMEOUT`].
    pub(crate) fn await_start(running: &mut StartedContender) -> Result<Self, LoadtestError> {
        let deadline = Instant::now() + ANTEROOM_START_TIMEOUT;
        loop {
            let answer =
                Self::connect(running.admin).and_then(|mut admin| admin.get("/livez").map(|_| admin));
            if let Ok(admin) = answer {
                return Ok(admin);
            }
            running.check_start("anteroom", deadline)?;
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ADMIN_READ_TIMEOUT))?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    pub(crate) fn query_only_route_load(&mut self) -> Result<OnlyRouteLoad, LoadtestError> {
        let routes = self.get("/api/v1/routes").map_err(failed)?;
        OnlyRouteLoad::of(&routes).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))
    }

    pub(crate) fn metrics(&mut self) -> Result<ScrapedMetrics, LoadtestError> {
        self.get("/metrics").map(ScrapedMetrics).map_err(failed)
    }

    fn get(&mut self, path: &str) -> io::Result<String> {
        write!(self.stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
        self.buffer.clear();
        let mut part = [0; 16 * 1024];
        loop {
            let read = self.stream.read(&mut part)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.buffer.extend_from_slice(&part[..read]);
            let Some(head) = http::head(&self.buffer).map_err(io::Error::other)? else { continue };
            let Framing::Length(length) = head.body else {
                return Err(io::Error::other(format!("{path} has a body of unknown length")));
            };
            let body = &self.buffer[head.len..];
            if body.len() < length {
                continue;
            }
            if http::status(head.start) != Some(200) {
                let status = String::from_utf8_lossy(head.start);
                return Err(io::Error::other(format!("{path} is answered with {status}")));
            }
            return String::from_utf8(body.to_vec()).map_err(io::Error::other);
        }
    }
}

fn failed(error: io::Error) -> LoadtestError {
    LoadtestError::io("read anteroom's admin API", error)
}

// === impl OnlyRouteLoad ===

impl OnlyRouteLoad {
    fn of(routes: &str) -> Option<Self> {
        let routes: Value = serde_json::from_str(routes).ok()?;
        let route = routes.get("routes")?.get(0)?;
        Some(Self { held: route.get("held")?.as_u64()?, in_flight: route.get("in_flight")?.as_u64()? })
    }
}

// === impl ScrapedMetrics ===

impl ScrapedMetrics {
    /// Sums the counters of `name` that carry all of these `key="value"` labels.
    pub(crate) fn sum(&self, name: &str, labels: &[&str]) -> u64 {
        let counts = self.0.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?.strip_prefix('{')?;
            // No label value here contains a brace, route names included.
            let (found, count) = rest.split_once("} ")?;
            labels.iter().all(|label| found.split(',').any(|found| found == *label)).then_some(count)
        });
        counts.filter_map(|count| count.split_whitespace().next()?.parse::<u64>().ok()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn get_returns_status_and_body() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let answering = std::thread::spawn(move || {
            for answer in ["HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\nno", "HTTP/1.1 503 No"] {
                let (mut stream, _) = listener.accept().unwrap();
                // Read the request first: closing with unread data would reset the connection.
                let mut question = [0; 1024];
                assert!(stream.read(&mut question).unwrap() > 0);
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        assert_eq!(get(address, "/readyz").unwrap(), (503, "no".into()));
        assert!(!is_ready(address), "that answer is cut");
        answering.join().unwrap();
    }

    #[test]
    fn sum_adds_series_with_all_labels() {
        let metrics = ScrapedMetrics(
            "# TYPE anteroom_requests counter\n\
             anteroom_requests_total{route=\"a\",outcome=\"completed\",code=\"200\",cold_start=\"true\"} 3\n\
             anteroom_requests_total{route=\"a\",outcome=\"completed\",code=\"200\",cold_start=\"false\"} 4\n\
             anteroom_requests_total{route=\"a\",outcome=\"client_gone\",code=\"other\",cold_start=\"false\"} 5\n"
                .into(),
        );
        let sum = |labels: &[&str]| metrics.sum("anteroom_requests_total", labels);
        assert_eq!((sum(&[]), sum(&["outcome=\"completed\""])), (12, 7));
        assert_eq!(sum(&["outcome=\"completed\"", "cold_start=\"true\""]), 3);
        assert_eq!(metrics.sum("anteroom_requests", &[]), 0);
    }

    #[test]
    fn only_route_load_is_parsed() {
        let demand = OnlyRouteLoad::of(r#"{"routes":[{"name":"a","held":7,"in_flight":2}]}"#);
        assert_eq!(demand, Some(OnlyRouteLoad { held: 7, in_flight: 2 }));
        assert_eq!(OnlyRouteLoad::of(r#"{"routes":[]}"#), None);
    }
}
