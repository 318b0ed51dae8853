//! Shared parts of the end-to-end tests: the complete proxy, scripted model servers, and raw clients.
//!
//! Nothing sleeps to synchronise: tests wait for events, with a timeout that only a failure reaches.

pub mod cluster;
pub mod collector;
pub mod h2;
pub mod h2c;
pub mod proxy;
pub mod upstream;
pub mod wire;

use std::{future::Future, time::Duration};

pub use proxy::{TestProxy, route, routes};
pub use upstream::TestUpstream;
pub use wire::Wire;

/// Timeout far above any duration here, even on a busy machine: only a defect reaches it.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Awaits `future`. Panics after [`TEST_TIMEOUT`].
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(TEST_TIMEOUT, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// Polls a condition that has no event. Panics after [`TEST_TIMEOUT`].
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    soon(what, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}
