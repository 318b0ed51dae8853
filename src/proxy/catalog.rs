//! The model list: models that routes name, and models that running servers list.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use serde_json::Value;

use super::table::RouteTable;
use crate::{admission::Gate, openai, state::ModelList};

/// A model list, shared by all responses until its sources change.
pub(super) struct Catalog {
    /// Body of `GET /v1/models`.
    pub(super) list: Bytes,
    pub(super) entries: BTreeMap<Box<str>, Value>,
    /// The sources of this catalog, to detect changes.
    table: Weak<RouteTable>,
    listings: Vec<Option<Arc<ModelList>>>,
}

// === impl Catalog ===

impl Catalog {
    /// Merges the models of all routes.
    pub(super) fn new(table: &Arc<RouteTable>) -> Self {
        let listings: Vec<_> = table.listing().map(|(gate, _)| gate.target().models().last()).collect();
        let entries = merged(table, &listings);
        let list = openai::model_list(entries.values());
        Self { list, entries, table: Arc::downgrade(table), listings }
    }

    /// Returns `true` if the routes and their lists are still those of this catalog.
    pub(super) fn is_current(&self, table: &Arc<RouteTable>) -> bool {
        let is_same = |(last, (gate, _)): (&Option<Arc<ModelList>>, (&Arc<Gate>, _))| {
            last.as_ref().map(Arc::as_ptr) == gate.target().models().last().as_ref().map(Arc::as_ptr)
        };
        self.table.as_ptr() == Arc::as_ptr(table) && self.listings.iter().zip(table.listing()).all(is_same)
    }
}

/// Merges entries by id: models that routes name, with the entry of their server if it has one, and all models of servers
/// whose routes name none.
fn merged(table: &RouteTable, listings: &[Option<Arc<ModelList>>]) -> BTreeMap<Box<str>, Value> {
    let mut entries: BTreeMap<Box<str>, Value> =
        table.models().iter().map(|model| (model.clone(), openai::model_entry(model))).collect();
    let mut of_any_model = Vec::new();
    for ((_, names), listing) in table.listing().zip(listings) {
        let Some(listing) = listing else { continue };
        if names.is_empty() {
            of_any_model.push(listing);
            continue;
        }
        for name in names {
            // The first of several routes for a model wins.
            if let (Some(theirs), Some(entry)) = (listing.models.get(name), entries.get_mut(name))
                && entry["owned_by"] == openai::MADE_UP_OWNER
            {
                entry.clone_from(theirs);
            }
        }
    }
    for listing in of_any_model {
        for (id, entry) in listing.models.iter() {
            entries.entry(id.clone()).or_insert_with(|| entry.clone());
        }
    }
    entries
}
