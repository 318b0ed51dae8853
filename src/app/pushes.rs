//! ScaledObjects that receive pushes of demand.

use crate::{demand::PushReceiver, kube::Facts};

/// Returns the ScaledObjects to which the demand of a route is pushed.
pub(super) fn receivers(facts: &Facts) -> Vec<PushReceiver> {
    let pushed = facts.scaled_objects.iter().filter(|scaled| scaled.trigger.pushes);
    let receivers = pushed.map(|scaled| PushReceiver {
        namespace: scaled.namespace.clone(),
        name: scaled.name.clone(),
        is_listed: scaled.is_listed,
        is_scaled: facts.has_replicas(scaled.pushed_replicas),
    });
    receivers.collect()
}
