//! `GET /v1/models`: the models that routes name, and what servers that are up say of theirs.
//!
//! Nothing is woken for it. A server is asked at most once a minute, and only when a client asks us; a client waits for
//! that only as long as [`PATIENCE`].

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{Proxy, RouteTable};
use crate::{
    admission::Gate,
    error::ProxyError,
    openai,
    probe::{self, Speaks},
    state::{Endpoint, Listing, Protocol},
};

/// All models, as they were last put together.
pub(super) struct Catalog {
    /// The list of them.
    list: Bytes,
    entries: BTreeMap<Box<str>, Value>,
    /// The routes, and what their servers list: while these are the same the catalog is.
    table: Weak<RouteTable>,
    listings: Vec<Option<Arc<Listing>>>,
}

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

// === impl Catalog ===

impl Catalog {
    fn new(table: &Arc<RouteTable>) -> Self {
        let listings: Vec<_> = table.listing().map(|(gate, _)| gate.target().models().last()).collect();
        let entries = merged(table, &listings);
        let list = openai::model_list(entries.values());
        Self { list, entries, table: Arc::downgrade(table), listings }
    }

    fn is_of(&self, table: &Arc<RouteTable>) -> bool {
        let is_same = |(last, (gate, _)): (&Option<Arc<Listing>>, (&Arc<Gate>, _))| {
            last.as_ref().map(Arc::as_ptr) == gate.target().models().last().as_ref().map(Arc::as_ptr)
        };
        self.table.as_ptr() == Arc::as_ptr(table) && self.listings.iter().zip(table.listing()).all(is_same)
    }
}

/// The entries by id: of the models that routes name, as their servers have them or else made up; and of all models of
/// servers whose routes name none.
fn merged(table: &RouteTable, listings: &[Option<Arc<Listing>>]) -> BTreeMap<Box<str>, Value> {
    let mut entries: BTreeMap<Box<str>, Value> =
        table.models().iter().map(|model| (model.clone(), openai::model_entry(model))).collect();
    let mut any = Vec::new();
    for ((_, names), listing) in table.listing().zip(listings) {
        let Some(listing) = listing else { continue };
        if names.is_empty() {
            any.push(listing);
            continue;
        }
        for name in names {
            // Of several routes for a model the first one is the one that is listed.
            if let (Some(theirs), Some(entry)) = (listing.models.get(name), entries.get_mut(name))
                && entry["owned_by"] == openai::MADE_UP_OWNER
            {
                entry.clone_from(theirs);
            }
        }
    }
    for listing in any {
        for (id, entry) in listing.models.iter() {
            entries.entry(id.clone()).or_insert_with(|| entry.clone());
        }
    }
    entries
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
