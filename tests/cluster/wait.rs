//! Waiting for conditions rather than fixed times: every wait has a limit and reports the last observation when it
//! times out.

use std::{fmt::Debug, time::Duration};

use futures_util::StreamExt as _;
use kube::{
    Api, Resource,
    runtime::{WatchStreamExt as _, watcher},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout_at};

/// Limit for anything that takes milliseconds on an idle machine.
pub(crate) const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// Calls `look` until it returns a value. Its last error is shown if the wait times out.
pub(crate) async fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let end = Instant::now() + limit;
    let mut seen = "nothing yet".to_owned();
    while Instant::now() < end {
        match timeout_at(end, look()).await {
            Ok(Ok(found)) => return found,
            Ok(Err(now)) => seen = now,
            Err(_) => break,
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("{what}: not within {limit:?}; last seen: {seen}");
}

/// Fails if `work` takes longer than `limit`.
pub(crate) async fn within<T>(what: &str, limit: Duration, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => panic!("{what}: not within {limit:?}"),
    }
}

/// Watches one object until `done` returns a value; `None` stands for a missing object.
pub(crate) async fn object<K, T>(
    api: &Api<K>,
    name: &str,
    what: &str,
    limit: Duration,
    mut done: impl FnMut(Option<&K>) -> Option<T>,
) -> T
where
    K: Resource + Clone + Debug + DeserializeOwned + Serialize + Send + 'static,
{
    let mut seen = "nothing, the watch has not begun".to_owned();
    let watch = async {
        let mut stream =
            std::pin::pin!(watcher::watch_object(api.clone(), name).backoff(ShortBackoff::default()));
        while let Some(event) = stream.next().await {
            match event {
                Ok(object) => {
                    if let Some(found) = done(object.as_ref()) {
                        return Some(found);
                    }
                    seen = object.as_ref().map_or_else(|| "no such object".to_owned(), brief);
                }
                Err(error) => seen = error.to_string(),
            }
        }
        None
    };
    let found = tokio::time::timeout(limit, watch).await;
    found.ok().flatten().unwrap_or_else(|| panic!("{name}: {what}: not within {limit:?}; last seen: {seen}"))
}

/// Formats an object for a failure message, without managed fields.
pub(crate) fn brief(object: &impl Serialize) -> String {
    let mut value = serde_json::to_value(object).unwrap_or_default();
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    value.to_string()
}

/// Backoff between failed watches: shorter than kube's default, since the apiserver is a local process that restarts.
#[derive(Debug, Default)]
pub(crate) struct ShortBackoff(u32);

impl Iterator for ShortBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0 = (self.0 + 1).min(5);
        Some(Duration::from_millis(25 << self.0))
    }
}

impl kube::runtime::utils::Backoff for ShortBackoff {
    fn reset(&mut self) {
        self.0 = 0;
    }
}
