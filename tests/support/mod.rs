//! What end-to-end tests share: the proxy as it really runs, scripted model servers, and raw clients.
//!
//! Nothing here sleeps to synchronise: tests wait for events, with a bound that only a failure reaches.

pub mod cluster;
pub mod collector;
pub mod h2;
pub mod h2c;
pub mod proxy;
pub mod upstream;
pub mod wire;

use std::{future::Future, time::Duration};

pub use proxy::{Proxy, route, routes};
pub use upstream::Upstream;
pub use wire::Wire;

/// Far above what anything here takes, also on a busy machine: only a defect reaches it.
const BOUND: Duration = Duration::from_secs(30);

/// What comes soon, or the test has failed.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(BOUND, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// Waits until something holds that no event tells of.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    soon(what, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}
