//! ScaledObjects that demand is pushed to.

use serde::Serialize;

/// A ScaledObject that names the route, and the state of KEDA's reaction to pushes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PushReceiver {
    /// Namespace of the ScaledObject.
    pub namespace: String,
    /// Name of the ScaledObject.
    pub name: String,
    /// The status lists a metric of our trigger; KEDA drops pushes until then (kedacore/keda#8168).
    pub is_listed: bool,
    /// The workload has replicas; `None` if unknown.
    pub is_scaled: Option<bool>,
}
