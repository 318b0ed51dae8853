//! `InterceptorRoute` of KEDA's HTTP Add-on. The definition is not ours: unknown fields are ignored, and absent ones
//! have the default of the Add-on.
//!
//! Source: the reference of `http.keda.sh/v1beta1` (0.16 and 1.0) and the code of the Add-on.

mod read;

use std::collections::BTreeMap;

use kube::CustomResource;
pub(super) use read::{BODY_LABEL, PROBE_ANNOTATION, References};
use serde::Deserialize;

use super::report::InterceptorRouteStatus;

/// Spec of an `InterceptorRoute`.
#[derive(Clone, Debug, Default, PartialEq, CustomResource, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
#[kube(
    group = "http.keda.sh",
    version = "v1beta1",
    kind = "InterceptorRoute",
    namespaced,
    status = "InterceptorRouteStatus",
    schema = "disabled",
    doc = "A route of KEDA's HTTP Add-on."
)]
pub struct InterceptorRouteSpec {
    /// Service that receives requests.
    pub target: ServiceRef,
    /// Matching rules; any of them suffices.
    pub rules: Vec<InterceptorRule>,
    /// Metrics for scaling.
    pub scaling_metric: ScalingMetric,
    /// Behaviour while no endpoint is ready.
    pub cold_start: Option<ColdStartSpec>,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// Responses that need no endpoint.
    pub static_routes: Vec<StaticRouteSpec>,
}

/// A Service and its port. The target names the Service in `service`, other references in `name`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceRef {
    /// Name of the Service.
    #[serde(alias = "name")]
    pub service: String,
    /// Port number.
    pub port: Option<u16>,
    /// Port name, as an alternative.
    pub port_name: Option<String>,
}

/// Matching rule: all conditions must hold; of several hosts or paths, any one.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InterceptorRule {
    hosts: Vec<String>,
    paths: Vec<PathMatch>,
    headers: Vec<HeaderMatch>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(default)]
struct PathMatch {
    value: String,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(default)]
struct HeaderMatch {
    name: String,
    /// `None` matches any value.
    value: Option<String>,
}

/// Metrics for scaling: one or both.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ScalingMetric {
    concurrency: Option<ConcurrencyTarget>,
    request_rate: Option<RateTarget>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
struct ConcurrencyTarget {
    target_value: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
struct RateTarget {
    target_value: Option<u32>,
    window: Option<String>,
}

/// Timeouts as Go durations.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Timeouts {
    readiness: Option<String>,
    request: Option<String>,
    response_header: Option<String>,
}

/// Behaviour while no endpoint is ready.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ColdStartSpec {
    fallback: Option<Fallback>,
    placeholder: Option<Placeholder>,
    max_pending_requests: Option<u32>,
    overflow: Option<String>,
}

/// Fallback Service, nested below `service`, or inline before 0.15.
#[derive(Clone, Debug, PartialEq, Deserialize, serde::Serialize)]
#[serde(untagged)]
enum Fallback {
    Nested { service: ServiceRef },
    Flat(ServiceRef),
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(default)]
struct Placeholder {
    response: ResponseSpec,
}

/// Requests answered without an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StaticRouteSpec {
    rules: Vec<InterceptorRule>,
    response: ResponseSpec,
    response_mode: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
struct ResponseSpec {
    status_code: Option<u16>,
    body: Option<String>,
    body_from_config_map: Option<ConfigMapKey>,
    headers: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(default)]
struct ConfigMapKey {
    name: String,
    key: Option<String>,
}

// === impl InterceptorRouteSpec ===

impl InterceptorRouteSpec {
    /// Returns the hosts of all rules.
    pub fn hosts(&self) -> Vec<String> {
        self.rules.iter().flat_map(|rule| rule.hosts.iter().cloned()).collect()
    }
}

// === impl ServiceRef ===

impl std::fmt::Display for ServiceRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.port, &self.port_name) {
            (Some(port), _) => write!(f, "{}:{port}", self.service),
            (None, Some(port)) => write!(f, "{}:{port}", self.service),
            (None, None) => f.write_str(&self.service),
        }
    }
}
