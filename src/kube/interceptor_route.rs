//! `InterceptorRoute` of KEDA's HTTP Add-on, read as it is: the definition is not ours, so what we do not know is
//! ignored, and what is not there has the Add-on's default.
//!
//! Facts are from the Add-on's reference of `http.keda.sh/v1beta1` (0.16 and 1.0) and its code.

mod read;

use std::collections::BTreeMap;

use kube::CustomResource;
pub(super) use read::{BODIES, PROBE, References};
use serde::Deserialize;

use super::report::InterceptorRouteStatus;

/// What an `InterceptorRoute` says.
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
    /// Where requests go.
    pub target: ServiceRef,
    /// Which requests: those that any of these matches.
    pub rules: Vec<Rule>,
    /// What is scaled by.
    pub scaling_metric: ScalingMetric,
    /// What happens while nothing is ready.
    pub cold_start: Option<ColdStart>,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// What is answered without demand.
    pub static_routes: Vec<StaticRouteSpec>,
}

/// A Service and its port. The target names it `service`, others `name`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceRef {
    /// Its name.
    #[serde(alias = "name")]
    pub service: String,
    /// The number of its port.
    pub port: Option<u16>,
    /// Or its name.
    pub port_name: Option<String>,
}

/// Conditions that must all hold; of hosts and of paths, any.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
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
    /// None: any.
    value: Option<String>,
}

/// What is scaled by: one of these, or both.
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

/// How long things may take, as Go writes it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Timeouts {
    readiness: Option<String>,
    request: Option<String>,
    response_header: Option<String>,
}

/// What happens while nothing is ready.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ColdStart {
    fallback: Option<Fallback>,
    placeholder: Option<Placeholder>,
    max_pending_requests: Option<u32>,
    overflow: Option<String>,
}

/// The Service stands below `service`, or, before 0.15, here.
#[derive(Clone, Debug, PartialEq, Deserialize, serde::Serialize)]
#[serde(untagged)]
enum Fallback {
    Nested { service: ServiceRef },
    Flat(ServiceRef),
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(default)]
struct Placeholder {
    response: Response,
}

/// Requests that are answered without demand.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StaticRouteSpec {
    rules: Vec<Rule>,
    response: Response,
    response_mode: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
struct Response {
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
    /// The hosts of all its rules.
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
