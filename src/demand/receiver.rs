//! What the cluster shows of those that demand is pushed to.

use serde::Serialize;

/// A ScaledObject that names the route: whether KEDA can act on a push for it, and has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PushReceiver {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Whether its status lists a metric of our trigger. KEDA drops a push without (kedacore/keda#8168).
    pub is_listed: bool,
    /// Whether its workload has the replicas that a push asks for. `None`: not known.
    pub is_scaled: Option<bool>,
}
