//! The routes as they are now, for those who answer questions about them by name.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::watch;

use super::Gate;
use crate::domain::RouteKey;

/// The gates of all routes.
#[derive(Default)]
pub struct Directory {
    gates: watch::Sender<Gates>,
    /// Rises whenever a request makes the demand of any route true.
    edges: Arc<watch::Sender<u64>>,
}

/// By the key of their route.
pub type Gates = Arc<BTreeMap<RouteKey, Arc<Gate>>>;

// === impl Directory ===

impl Directory {
    /// These are the routes from now on.
    pub fn publish(&self, gates: impl IntoIterator<Item = Arc<Gate>>) {
        let gates: BTreeMap<_, _> = gates.into_iter().map(|gate| (gate.key().clone(), gate)).collect();
        for gate in gates.values() {
            let edges = self.edges.clone();
            gate.demand().subscribe(move || edges.send_modify(|edges| *edges += 1));
        }
        self.gates.send_replace(Arc::new(gates));
    }

    /// The gate of the route with this key.
    pub fn get(&self, key: &str) -> Option<Arc<Gate>> {
        self.gates.borrow().get(key).cloned()
    }

    /// All of them.
    pub fn gates(&self) -> Gates {
        self.gates.borrow().clone()
    }

    /// Changes with every reload.
    pub fn changes(&self) -> watch::Receiver<Gates> {
        self.gates.subscribe()
    }

    /// Changes when a request makes the demand of any route true.
    pub fn edges(&self) -> watch::Receiver<u64> {
        self.edges.subscribe()
    }
}
