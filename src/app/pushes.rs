//! From what the cluster shows of ScaledObjects to the streams that KEDA has open.

use crate::{demand::PushReceiver, kube::Facts};

/// The ScaledObjects that demand of a route is pushed to.
pub(super) fn receivers(facts: &Facts) -> Vec<PushReceiver> {
    let pushed = facts.scaled_objects.iter().filter(|scaled| scaled.trigger.pushes);
    let receivers = pushed.map(|scaled| PushReceiver {
        namespace: scaled.namespace.clone(),
        name: scaled.name.clone(),
        is_listed: scaled.is_listed,
        is_scaled: facts.has_replicas(scaled.floor),
    });
    receivers.collect()
}
