//! The model list: models that routes name, and models that running servers list.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use serde_json::Value;

use super::RouteTable;
use crate::{admission::Gate, openai, state::Listing};

/// All models, as they were last put together.
pub(super) struct Catalog {
    /// The list of them.
    pub(super) list: Bytes,
    pub(super) entries: BTreeMap<Box<str>, Value>,
    /// The routes, and what their servers list: while these are the same the catalog is.
    table: Weak<RouteTable>,
    listings: Vec<Option<Arc<Listing>>>,
}

// === impl Catalog ===

impl Catalog {
    pub(super) fn new(table: &Arc<RouteTable>) -> Self {
        let listings: Vec<_> = table.listing().map(|(gate, _)| gate.target().models().last()).collect();
        let entries = merged(table, &listings);
        let list = openai::model_list(entries.values());
        Self { list, entries, table: Arc::downgrade(table), listings }
    }

    pub(super) fn is_of(&self, table: &Arc<RouteTable>) -> bool {
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
