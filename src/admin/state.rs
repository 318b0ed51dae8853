//! State of the admin listener.

use std::sync::{Arc, atomic::AtomicBool};

use prometheus_client::registry::Registry;

use super::{View, live::Live};
use crate::coldstart::ColdStarts;

/// The admin listener's state.
#[derive(Clone)]
pub struct Admin {
    pub(super) view: Arc<dyn View>,
    pub(super) cold_starts: Arc<ColdStarts>,
    pub(super) draining: Arc<AtomicBool>,
    pub(super) registry: Arc<Registry>,
    pub(super) live: Arc<Live>,
}
