//! ScaledObjects that demand is pushed to.

use serde::Serialize;

/// A ScaledObject that names the route, and the state of KEDA's reaction to pushes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PushReceiver {
    /// Namespace of the ScaledObject.
    pub namespace: String,
    /// Name of the ScaledObject.
    pub name: String,
    /// True if the status lists a metric of the route's trigger; KEDA drops pushes before that (kedacore/keda#8168).
    pub is_listed: bool,
    /// True if the workload has replicas; `None` if unknown.
    pub is_scaled: Option<bool>,
}
