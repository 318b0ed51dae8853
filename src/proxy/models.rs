//! `GET /v1/models`: the models that routes name, and what servers that are up say of theirs.
//!
//! Nothing is woken for it. A server is asked at most once a minute, and only when a client asks us; a client waits for
//! that only as long as [`PATIENCE`].

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{Proxy, catalog::Catalog};
use crate::{
    admission::Gate,
    error::ProxyError,
    probe::{self, Speaks},
    state::{Endpoint, Protocol},
};

/// How long a server may take to list its models.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a client waits for lists that are asked for on its behalf.
const PATIENCE: Duration = Duration::from_millis(1500);

/// How many servers are asked at the same time for one client, and how many in all.
const CONCURRENT_QUESTIONS: usize = 16;
const MAX_QUESTIONS: usize = 64;

/// How much of a server's list is taken.
const MAX_LIST_BYTES: usize = 256 << 10;
const MAX_LISTED_MODELS: usize = 1000;
const MAX_ID_BYTES: usize = 512;

// === impl Proxy ===

impl Proxy {
    /// The answer to `GET /v1/models`.
    pub(super) async fn model_list(&self) -> Bytes {
        self.catalog().await.list.clone()
    }

    /// The answer to `GET /v1/models/{id}`.
    pub(super) async fn model(&self, id: String) -> Result<Bytes, ProxyError> {
        let catalog = self.catalog().await;
        let entry = catalog.entries.get(&*id);
        entry.map(|entry| entry.to_string().into()).ok_or(ProxyError::ModelNotFound(id))
    }

    /// All models. They are put together when routes or what servers list have changed, and shared by all answers.
    async fn catalog(&self) -> Arc<Catalog> {
        self.refresh_models().await;
        let table = self.shared.table.load_full();
        let last = self.shared.catalog.load_full();
        if let Some(catalog) = last.filter(|catalog| catalog.is_of(&table)) {
            return catalog;
        }
        let catalog = Arc::new(Catalog::new(&table));
        self.shared.catalog.store(Some(catalog.clone()));
        catalog
    }

    /// Asks the servers that are up and whose lists are due.
    async fn refresh_models(&self) {
        let table = self.shared.table.load_full();
        let due = table.listing().map(|(gate, _)| gate);
        let due = due.filter(|gate| gate.target().models().due(&gate.target().endpoints()).is_some());
        let due: Vec<Arc<Gate>> = due.take(MAX_QUESTIONS).cloned().collect();
        if due.is_empty() {
            return;
        }
        let asking = stream::iter(due).for_each_concurrent(CONCURRENT_QUESTIONS, |gate| async move {
            let endpoints = gate.target().endpoints().clone();
            gate.target().models().refresh(&endpoints, ask).await;
        });
        // What is not there by then is asked for again by the next client.
        let _ = timeout(PATIENCE, asking).await;
    }
}

async fn ask(endpoint: &Endpoint) -> Option<BTreeMap<Box<str>, Value>> {
    let speaks = match endpoint.protocol() {
        Protocol::Http1 => Speaks::Http1,
        Protocol::H2c => Speaks::Http2,
    };
    let list = probe::fetch(endpoint.address(), speaks, "/v1/models", MAX_LIST_BYTES, ANSWER_TIMEOUT).await;
    let models = list.as_deref().and_then(read);
    if models.is_none() {
        tracing::debug!(address = endpoint.address(), "the model server gave no list of models");
    }
    models
}

fn read(list: &[u8]) -> Option<BTreeMap<Box<str>, Value>> {
    #[derive(serde::Deserialize)]
    struct List {
        data: Vec<Map<String, Value>>,
    }
    let list: List = serde_json::from_slice(list).ok()?;
    let named = list.data.into_iter().filter_map(|entry| {
        let id = entry.get("id")?.as_str().filter(|id| !id.is_empty() && id.len() <= MAX_ID_BYTES)?;
        Some((Box::from(id), Value::Object(entry)))
    });
    Some(named.take(MAX_LISTED_MODELS).collect())
}
