//! `GET /v1/models`. Creates no demand.
//!
//! Running servers are queried at most once a minute, and only on a client's request, which waits for them for at most
//! [`REFRESH_TIMEOUT`].

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{catalog::Catalog, shared::Proxy};
use crate::{
    admission::Gate,
    error::ProxyError,
    probe::{self, ProbeProtocol},
    state::{Endpoint, Protocol},
};

/// Time limit of one query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(1);

/// Time that a client waits for all queries.
const REFRESH_TIMEOUT: Duration = Duration::from_millis(1500);

/// Servers queried for one request, concurrently and in all.
const CONCURRENT_QUERIES: usize = 16;
const MAX_QUERIES: usize = 64;

/// Bounds on one server's list.
const MAX_LIST_BYTES: usize = 256 << 10;
const MAX_LISTED_MODELS: usize = 1000;
const MAX_MODEL_ID_BYTES: usize = 512;

// === impl Proxy ===

impl Proxy {
    /// Returns the body of `GET /v1/models`.
    pub(super) async fn model_list(&self) -> Bytes {
        self.catalog().await.list.clone()
    }

    /// Returns the body of `GET /v1/models/{id}`.
    pub(super) async fn model(&self, id: String) -> Result<Bytes, ProxyError> {
        let catalog = self.catalog().await;
        let entry = catalog.entries.get(&*id);
        entry.map(|entry| entry.to_string().into()).ok_or(ProxyError::ModelNotFound(id))
    }

    /// Returns the current catalog, and rebuilds it if its sources have changed.
    async fn catalog(&self) -> Arc<Catalog> {
        self.refresh_models().await;
        let table = self.shared.table.load_full();
        let last = self.shared.catalog.load_full();
        if let Some(catalog) = last.filter(|catalog| catalog.is_current(&table)) {
            return catalog;
        }
        let catalog = Arc::new(Catalog::new(&table));
        self.shared.catalog.store(Some(catalog.clone()));
        catalog
    }

    /// Queries running servers whose lists have expired.
    async fn refresh_models(&self) {
        let table = self.shared.table.load_full();
        let due = table.listing().map(|(gate, _)| gate);
        let due =
            due.filter(|gate| gate.target().models().endpoint_to_query(&gate.target().endpoints()).is_some());
        let due: Vec<Arc<Gate>> = due.take(MAX_QUERIES).cloned().collect();
        if due.is_empty() {
            return;
        }
        let refreshing = stream::iter(due).for_each_concurrent(CONCURRENT_QUERIES, |gate| async move {
            let endpoints = gate.target().endpoints().clone();
            gate.target().models().refresh(&endpoints, query).await;
        });
        // The next request retries the servers that did not respond in time.
        let _ = timeout(REFRESH_TIMEOUT, refreshing).await;
    }
}

async fn query(endpoint: &Endpoint) -> Option<BTreeMap<Box<str>, Value>> {
    let speaks = match endpoint.protocol() {
        Protocol::Http1 => ProbeProtocol::Http1,
        Protocol::H2c => ProbeProtocol::Http2,
    };
    let list = probe::fetch(endpoint.address(), speaks, "/v1/models", MAX_LIST_BYTES, QUERY_TIMEOUT).await;
    let models = list.as_deref().and_then(parse);
    if models.is_none() {
        tracing::debug!(address = endpoint.address(), "the model server returned no model list");
    }
    models
}

fn parse(list: &[u8]) -> Option<BTreeMap<Box<str>, Value>> {
    #[derive(serde::Deserialize)]
    struct List {
        data: Vec<Map<String, Value>>,
    }
    let list: List = serde_json::from_slice(list).ok()?;
    let named = list.data.into_iter().filter_map(|entry| {
        let id = entry.get("id")?.as_str().filter(|id| !id.is_empty() && id.len() <= MAX_MODEL_ID_BYTES)?;
        Some((Box::from(id), Value::Object(entry)))
    });
    Some(named.take(MAX_LISTED_MODELS).collect())
}
