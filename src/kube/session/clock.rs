//! What time it is, by the API server: replicas and terminals need not agree among themselves.

use std::time::{Duration, SystemTime};

use http::{Request, header::DATE};
use jiff::Timestamp;
use kube::{Client, client::Body};
use tokio::time::{Instant, timeout};

/// A time of day that was read once and goes on with the runtime's clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    read: Timestamp,
    at: Instant,
}

// === impl Clock ===

impl Clock {
    /// How long the API server has to tell the time.
    const PATIENCE: Duration = Duration::from_secs(5);

    /// One that says `now` now.
    pub fn starting(now: Timestamp) -> Self {
        Self { read: now, at: Instant::now() }
    }

    /// The time of this machine.
    pub fn of_machine() -> Self {
        Self::starting(Timestamp::try_from(SystemTime::now()).unwrap_or(Timestamp::UNIX_EPOCH))
    }

    /// The time of the API server, to the second; `None` if it does not tell.
    pub async fn of_server(client: &Client) -> Option<Self> {
        let request = Request::get("/version").body(Body::empty()).ok()?;
        let response = timeout(Self::PATIENCE, client.send(request)).await.ok()?.ok()?;
        let date = response.headers().get(DATE)?.to_str().ok()?;
        let date = httpdate(date)?;
        Some(Self::starting(date))
    }

    /// What time it is.
    pub fn now(&self) -> Timestamp {
        self.read.saturating_add(self.at.elapsed()).unwrap_or(Timestamp::MAX)
    }

    /// How long ago it was read.
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
    async fn it_goes_on_from_what_was_read() {
        let read = httpdate("Tue, 24 Nov 2026 20:00:00 GMT").unwrap();
        let clock = Clock::starting(read);
        tokio::time::advance(Duration::from_millis(90_500)).await;
        assert_eq!(clock.now().to_string(), "2026-11-24T20:01:30.5Z", "90.5 s later");
    }
}
