//! InferencePools: selector, ports and protocol.

use std::collections::BTreeMap;

use kube::CustomResource;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::state::Protocol;

/// Untyped spec, so that one malformed pool does not fail the watch of the others.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, Serialize)]
#[kube(
    group = "inference.networking.k8s.io",
    version = "v1",
    kind = "InferencePool",
    namespaced,
    schema = "disabled"
)]
#[serde(transparent)]
pub(super) struct InferencePoolSpec(Value);

#[derive(Debug, PartialEq, Eq)]
pub(super) struct PoolSelector {
    pub(super) selector: BTreeMap<String, String>,
    /// Every pod serves on each of these ports.
    pub(super) ports: Vec<u16>,
    pub(super) protocol: Protocol,
}

/// Parses the spec. The error is a predicate that follows the name of the pool.
pub(super) fn read(pool: &InferencePool) -> Result<PoolSelector, &'static str> {
    let spec = &pool.spec.0;
    let labels = spec["selector"]["matchLabels"].as_object().filter(|labels| !labels.is_empty());
    let selector = labels.ok_or("selects no pods: it has no spec.selector.matchLabels")?;
    let selector = selector.iter().map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())));
    let ports = spec["targetPorts"].as_array().map(|ports| {
        ports.iter().filter_map(|port| u16::try_from(port["number"].as_u64()?).ok().filter(|port| *port > 0))
    });
    let ports: Vec<_> = ports.into_iter().flatten().collect();
    if ports.is_empty() {
        return Err("has no spec.targetPorts with a number");
    }
    let protocol = super::protocol::protocol(spec["appProtocol"].as_str());
    let selector =
        selector.collect::<Option<_>>().ok_or("has a label in its selector that is not a string")?;
    Ok(PoolSelector { selector, ports, protocol })
}
