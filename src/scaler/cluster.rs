//! The keeper: knows which pods of a target take requests, sooner than the cluster does.

use std::sync::Arc;

use super::Stops;
use crate::{admission::Gate, domain::ClusterTarget, state::Discovery};

/// Looks after the pods of `target` until it is told to end.
pub(super) async fn run(
    gate: Arc<Gate>,
    target: &ClusterTarget,
    discovery: Arc<dyn Discovery>,
    stops: Stops,
) {
    let _ = (gate, discovery.watch(target));
    stops.retire.cancelled().await;
}
