//! Directory of the current routes, by key.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::watch;

use super::Gate;
use crate::domain::RouteKey;

/// The gates of all routes.
#[derive(Default)]
pub struct Directory {
    gates: watch::Sender<Gates>,
    /// Shared by the demand of all routes.
    edges: Arc<watch::Sender<u64>>,
}

/// Gates by the key of their route.
pub type Gates = Arc<BTreeMap<RouteKey, Arc<Gate>>>;

// === impl Directory ===

impl Directory {
    /// Replaces the routes.
    pub fn publish(&self, gates: impl IntoIterator<Item = Arc<Gate>>) {
        let gates: BTreeMap<_, _> = gates.into_iter().map(|gate| (gate.key().clone(), gate)).collect();
        for gate in gates.values() {
            gate.demand().set_edges(self.edges.clone());
        }
        self.gates.send_replace(Arc::new(gates));
    }

    /// Returns the gate of a route.
    pub fn get(&self, key: &str) -> Option<Arc<Gate>> {
        self.gates.borrow().get(key).cloned()
    }

    /// Returns all gates.
    pub fn gates(&self) -> Gates {
        self.gates.borrow().clone()
    }

    /// Subscribes to changes of the routes.
    pub fn changes(&self) -> watch::Receiver<Gates> {
        self.gates.subscribe()
    }

    /// Subscribes to rising edges and pushes of any route.
    pub fn edges(&self) -> watch::Receiver<u64> {
        self.edges.subscribe()
    }
}
