//! Models listed by a target's servers, from the last query of one of them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use serde_json::Value;
use tokio::{sync::Mutex, time::Instant};

use super::Endpoint;

/// Last list of a target, kept while nothing is ready.
#[derive(Default)]
pub struct ListedModels {
    last: ArcSwapOption<ModelList>,
    /// Held by the request that queries the server; others wait for its result.
    query_lock: Mutex<()>,
}

/// List returned by a server.
#[derive(Debug)]
pub struct ModelList {
    /// Entries by `id`, as the server wrote them.
    pub models: Arc<BTreeMap<Box<str>, Value>>,
    /// Id of the endpoint that was queried.
    endpoint: u64,
    /// Time of the next query.
    due: Instant,
}

// === impl ListedModels ===

impl ListedModels {
    /// Maximum age of a list: LoRA adapters are loaded and unloaded while a server runs.
    pub const MAX_AGE: Duration = Duration::from_secs(60);
    /// Interval between queries of a server that returned no list.
    pub const LIST_RETRY_INTERVAL: Duration = Duration::from_secs(10);

    /// Returns the last list.
    pub fn last(&self) -> Option<Arc<ModelList>> {
        self.last.load_full()
    }

    /// Returns a ready endpoint to query if the list is too old or its endpoint is no longer ready.
    pub fn endpoint_to_query(&self, endpoints: &[Arc<Endpoint>]) -> Option<Arc<Endpoint>> {
        let ready = || endpoints.iter().filter(|endpoint| endpoint.is_ready());
        let is_fresh = |last: &ModelList| {
            Instant::now() < last.due && ready().any(|endpoint| endpoint.id() == last.endpoint)
        };
        if self.last.load().as_deref().is_some_and(is_fresh) {
            return None;
        }
        ready().next().cloned()
    }

    /// Queries the list with `ask`, unless a concurrent request has done so. A server without a list leaves the last
    /// one in place. Cancel-safe: the next request queries again.
    pub async fn refresh(
        &self,
        endpoints: &[Arc<Endpoint>],
        ask: impl AsyncFnOnce(&Endpoint) -> Option<BTreeMap<Box<str>, Value>>,
    ) {
        let _turn = self.query_lock.lock().await;
        let Some(endpoint) = self.endpoint_to_query(endpoints) else { return };
        let (models, age) = match ask(&endpoint).await {
            Some(models) => (Arc::new(models), Self::MAX_AGE),
            None => {
                (self.last().map(|last| last.models.clone()).unwrap_or_default(), Self::LIST_RETRY_INTERVAL)
            }
        };
        let listing = ModelList { models, endpoint: endpoint.id(), due: Instant::now() + age };
        self.last.store(Some(Arc::new(listing)));
    }

    /// Clears the list after the target changed.
    pub fn forget(&self) {
        self.last.store(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(id: &str) -> Option<BTreeMap<Box<str>, Value>> {
        Some(BTreeMap::from([(id.into(), serde_json::json!({ "id": id }))]))
    }

    fn ready(address: &str) -> Arc<Endpoint> {
        let endpoint = Endpoint::new(address, 1);
        super::super::TargetState::default().ready(&endpoint, None);
        endpoint
    }

    #[tokio::test(start_paused = true)]
    async fn list_is_queried_each_minute_and_of_new_servers() {
        let listed = ListedModels::default();
        let first = [ready("127.0.0.1:1")];
        listed.refresh(&first, async |_| one("a")).await;
        assert!(listed.endpoint_to_query(&first).is_none());
        listed.refresh(&first, async |_| panic!("it has just been asked")).await;
        tokio::time::advance(ListedModels::MAX_AGE).await;
        assert!(listed.endpoint_to_query(&first).is_some());
        listed.refresh(&first, async |_| one("b")).await;
        // A restarted server may list other models.
        first[0].retire();
        assert!(listed.endpoint_to_query(&first).is_none(), "nothing is up to be asked");
        assert!(listed.last().unwrap().models.contains_key("b"), "the list stays");
        assert!(listed.endpoint_to_query(&[ready("127.0.0.1:2")]).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn server_without_a_model_list_removes_none() {
        let listed = ListedModels::default();
        let endpoints = [ready("127.0.0.1:1")];
        listed.refresh(&endpoints, async |_| one("a")).await;
        tokio::time::advance(ListedModels::MAX_AGE).await;
        listed.refresh(&endpoints, async |_| None).await;
        assert!(listed.last().unwrap().models.contains_key("a"));
        assert!(listed.endpoint_to_query(&endpoints).is_none());
        tokio::time::advance(ListedModels::LIST_RETRY_INTERVAL).await;
        assert!(listed.endpoint_to_query(&endpoints).is_some());
    }
}
