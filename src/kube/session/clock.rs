//! Wall clock of the API server, so that replicas and terminals need not have synchronized clocks.

use std::time::{Duration, SystemTime};

use http::{Request, header::DATE};
use jiff::Timestamp;
use kube::{Client, client::Body};
use tokio::time::{Instant, timeout};

/// A time read once and advanced by the clock of the runtime.
#[derive(Clone, Copy, Debug)]
pub struct ApiServerClock {
    read: Timestamp,
    at: Instant,
}

// === impl ApiServerClock ===

impl ApiServerClock {
    /// Timeout of reading the time.
    const READ_TIMEOUT: Duration = Duration::from_secs(5);

    /// Creates a clock that shows `now` at this moment.
    pub fn starting(now: Timestamp) -> Self {
        Self { read: now, at: Instant::now() }
    }

    /// Creates a clock from the local system time.
    pub fn of_machine() -> Self {
        Self::starting(Timestamp::try_from(SystemTime::now()).unwrap_or(Timestamp::UNIX_EPOCH))
    }

    /// Reads the time of the API server from its `Date` header, to the second.
    pub async fn of_server(client: &Client) -> Option<Self> {
        let request = Request::get("/version").body(Body::empty()).ok()?;
        let response = timeout(Self::READ_TIMEOUT, client.send(request)).await.ok()?.ok()?;
        let date = response.headers().get(DATE)?.to_str().ok()?;
        let date = httpdate(date)?;
        Some(Self::starting(date))
    }

    /// Returns the current time.
    pub fn now(&self) -> Timestamp {
        self.read.saturating_add(self.at.elapsed()).unwrap_or(Timestamp::MAX)
    }

    /// Returns the time since the clock was read.
    pub fn age(&self) -> Duration {
        self.at.elapsed()
    }
}

fn httpdate(text: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::parse(text).ok().map(|time| time.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn clock_advances_from_time_read() {
        let read = httpdate("Tue, 24 Nov 2026 20:00:00 GMT").unwrap();
        let clock = ApiServerClock::starting(read);
        tokio::time::advance(Duration::from_millis(90_500)).await;
        assert_eq!(clock.now().to_string(), "2026-11-24T20:01:30.5Z", "90.5 s later");
    }
}
