//! The `ModelRoute` resource: a route as a cluster object, with the keys of a route in the configuration file.

use std::collections::BTreeMap;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceValidation,
};
use kube::{CustomResource, CustomResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{report::ModelRouteStatus, schema};
use crate::domain::{
    ClusterTarget, Concurrency, EndpointSource, Failure, FailureGrace, Gateway, Hold, Keepalive, Matcher,
    Readiness, Roles, Route, ScaleBy, Scaling, ServicePort, Target, UpstreamTimeouts, WhenPaused, Workload,
};

/// Requests that belong to a target in this namespace, and the policies for them.
#[derive(Clone, Debug, PartialEq, Eq, CustomResource, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[kube(
    group = "anteroom.dev",
    version = "v1alpha1",
    kind = "ModelRoute",
    namespaced,
    shortname = "mr",
    category = "anteroom",
    status = "ModelRouteStatus",
    schema = "disabled",
    doc = "A route of Anteroom.",
    printcolumn = r#"{"name": "Models", "type": "string", "jsonPath": ".spec.match.models"}"#,
    printcolumn = r#"{"name": "Target", "type": "string", "jsonPath": ".status.target"}"#,
    printcolumn = r#"{"name": "State", "type": "string", "jsonPath": ".status.state"}"#,
    printcolumn = r#"{"name": "Endpoints", "type": "integer", "jsonPath": ".status.endpoints.ready"}"#,
    printcolumn = r#"{"name": "Held", "type": "integer", "jsonPath": ".status.held"}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "priority": 1, "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].reason"}"#,
    printcolumn = r#"{"name": "Scaled-By", "type": "string", "priority": 1, "jsonPath": ".status.scaledObject"}"#,
    printcolumn = r#"{"name": "Cold-Start", "type": "string", "priority": 1, "jsonPath": ".status.lastColdStart.duration"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
pub struct ModelRouteSpec {
    /// Requests that belong to the route. If absent, every API request does.
    #[serde(default, rename = "match")]
    pub matcher: Matcher,
    /// Target that scales from zero and receives the requests.
    pub target: RouteTarget,
    /// Readiness check of the target.
    #[serde(default)]
    pub readiness: Readiness,
    /// Limits of held requests in number and time.
    #[serde(default)]
    pub hold: Hold,
    /// Keepalives sent to waiting clients.
    #[serde(default)]
    pub keepalive: Keepalive,
    /// Concurrent requests per endpoint.
    #[serde(default)]
    pub concurrency: Concurrency,
    /// Timeouts of upstream requests.
    #[serde(default)]
    pub upstream: UpstreamTimeouts,
    /// Gateway responses that mean that the gateway has not discovered its servers yet.
    #[serde(default)]
    pub gateway: Gateway,
    /// Demand reported to the scaler.
    #[serde(default)]
    pub scaling: Scaling,
    /// Component that changes the number of replicas.
    #[serde(default)]
    pub scale_by: ScaleBy,
    /// Workload to scale. Required with `scaleBy: kubernetes`; otherwise taken from the ScaledObject.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
    /// Handling of requests at zero while the ScaledObject is paused.
    #[serde(default)]
    pub when_paused: WhenPaused,
    /// Time for which a start may be blocked before waiting clients are notified.
    #[serde(default)]
    pub failure_grace: FailureGrace,
    /// Details of failures shown to clients.
    #[serde(default)]
    pub failure: Failure,
}

/// Target that scales from zero: exactly one of `service`, `inferencePool` and `url`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouteTarget {
    /// A Service of this namespace; requests go to its pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceTarget>,
    /// An InferencePool of this namespace, by its selector; requests go to its pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inference_pool: Option<PoolTarget>,
    /// A server or gateway scaled by another component: `http://host:port`. The configuration of the proxy must allow
    /// the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// `http://host:port` that receives the requests instead of the pods, which then only determine readiness. Used
    /// with `service` or `inferencePool`. The configuration of the proxy must allow the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Labels of the pods that receive requests, if not all pods of the Service or pool serve: those of the decode
    /// role. If absent, all do.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub serve: BTreeMap<String, String>,
    /// Pods that must be ready for the target to be up, if one pod is not enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<ReadyRule>,
}

/// Pods that must be ready for the target to be up.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReadyRule {
    /// Groups of pods of the Service or pool by name, each with the labels of its pods. Every group needs a ready pod.
    pub all: BTreeMap<String, BTreeMap<String, String>>,
}

/// A Service and one of its ports.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceTarget {
    /// Name of the Service.
    pub name: String,
    /// Port number; alternative to `portName`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
    /// Port name; alternative to `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_name: Option<String>,
}

/// An InferencePool.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PoolTarget {
    /// Name of the InferencePool.
    pub name: String,
}

/// Stored object, for its schema.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is of use")]
struct Stored {
    spec: ModelRouteSpec,
    status: Option<ModelRouteStatus>,
}

// === impl ModelRouteSpec ===

impl ModelRouteSpec {
    /// Converts the object to a route.
    ///
    /// # Errors
    /// Returns an error unless exactly one target is given; the API server rejects such objects with our definition.
    pub fn to_route(&self, namespace: &str, name: &str) -> Result<Route, String> {
        let mut concurrency = self.concurrency;
        // Lowering `max` alone also lowers the start of the ramp.
        concurrency.ramp_start = concurrency.ramp_start.min(concurrency.max);
        Ok(Route {
            name: format!("{namespace}/{name}").as_str().into(),
            matcher: self.matcher.clone(),
            target: self.target.to_target(namespace)?,
            readiness: self.readiness.clone(),
            hold: self.hold,
            keepalive: self.keepalive,
            concurrency,
            upstream: self.upstream,
            gateway: self.gateway.clone(),
            scaling: self.scaling,
            scale_by: self.scale_by,
            workload: self.workload.clone(),
            when_paused: self.when_paused,
            failure_grace: self.failure_grace,
            failure: self.failure,
            intercept: None,
        })
    }
}

// === impl RouteTarget ===

impl RouteTarget {
    fn to_target(&self, namespace: &str) -> Result<Target, String> {
        let source = match (&self.service, &self.inference_pool, &self.url) {
            (Some(service), None, None) => EndpointSource::Service {
                name: service.name.clone(),
                port: service_port(service.port, service.port_name.as_deref())
                    .map_err(|error| format!("spec.target.service: {error}"))?,
            },
            (None, Some(pool), None) => EndpointSource::InferencePool { name: pool.name.clone() },
            (None, None, Some(_)) if self.gateway.is_some() => {
                return Err(format!("spec.target: {GATEWAY_WITH_URL}"));
            }
            (None, None, Some(_)) if self.ready.is_some() || !self.serve.is_empty() => {
                return Err(format!("spec.target: {ROLES_WITH_URL}"));
            }
            (None, None, Some(url)) => return Ok(Target::Url(url.clone())),
            _ => return Err(format!("spec.target: {ONE_TARGET}")),
        };
        Ok(Target::Cluster(ClusterTarget {
            namespace: namespace.to_owned(),
            source,
            gateway: self.gateway.clone(),
            roles: self.roles()?,
        }))
    }
}

impl RouteTarget {
    fn roles(&self) -> Result<Roles, String> {
        let groups = self.ready.as_ref().map(|ready| ready.all.clone()).unwrap_or_default();
        if groups.len() > Roles::MAX_GROUPS {
            return Err(format!("spec.target.ready.all: at most {} groups are allowed", Roles::MAX_GROUPS));
        }
        if let Some((name, _)) = groups.iter().find(|(_, labels)| labels.is_empty()) {
            return Err(format!("spec.target.ready.all.{name}: {EMPTY_GROUP}"));
        }
        Ok(Roles { serve: self.serve.clone(), groups })
    }
}

/// Returns the port of a Service, given by number or name.
pub(super) fn service_port(port: Option<u16>, name: Option<&str>) -> Result<ServicePort, &'static str> {
    match (port, name) {
        (Some(0), None) => Err("0 is not a port; use 1 to 65535"),
        (Some(port), None) => Ok(ServicePort::Number(port)),
        (None, Some(name)) if !name.is_empty() => Ok(ServicePort::Name(name.to_owned())),
        _ => Err(ONE_PORT),
    }
}

const ONE_TARGET: &str = "give exactly one of service, inferencePool and url; with a gateway in front of the pods, name \
                          it with gateway beside service or inferencePool";
const GATEWAY_WITH_URL: &str = "gateway goes with service or inferencePool, whose pods determine readiness; a url is already where \
                          requests go, so leave one of the two out";
const ROLES_WITH_URL: &str = "serve and ready go with service or inferencePool, whose pods they are about; a url says by its \
                        readiness path whether it is up";
const EMPTY_GROUP: &str = "name at least one label that the pods of the group have";
const ONE_PORT: &str = "give exactly one of port, a number, and portName";
const URL_FORMAT: &str = "write http://host:port; requests keep their own path, and https is not supported yet: put a \
                          gateway that speaks TLS in between";

/// Returns the CustomResourceDefinition.
pub fn definition() -> CustomResourceDefinition {
    let mut definition = ModelRoute::crd();
    for version in &mut definition.spec.versions {
        // A test checks that the schema deserializes without loss.
        let open_api_v3_schema = serde_json::from_value(schema_with_rules()).ok();
        version.schema = Some(CustomResourceValidation { open_api_v3_schema });
    }
    definition
}

/// Returns the CustomResourceDefinition as YAML for `kubectl apply -f -`.
pub fn definition_yaml() -> String {
    let definition = serde_json::to_value(definition()).unwrap_or_default();
    serde_saphyr::to_string(&definition).unwrap_or_default()
}

fn schema_with_rules() -> Value {
    let mut root = schema::structural::<Stored>();
    root["description"] =
        "A route of Anteroom: which requests belong to a target, and under which policies.".into();
    for (path, rule, message) in SCHEMA_RULES {
        let rules = &mut at(&mut root, path)["x-kubernetes-validations"];
        match rules {
            Value::Array(rules) => rules.push(json!({"rule": rule, "message": message})),
            _ => *rules = json!([{"rule": rule, "message": message}]),
        }
    }
    for (path, key, most) in SCHEMA_SIZE_LIMITS {
        at(&mut root, path)[*key] = json!(most);
    }
    root
}

/// Validation rules beyond types, evaluated by the API server. The proxy checks all of them again.
const SCHEMA_RULES: &[(&str, &str, &str)] = &[
    (
        "spec/target",
        "[has(self.service), has(self.inferencePool), has(self.url)].filter(given, given).size() == 1",
        ONE_TARGET,
    ),
    ("spec/target", "!has(self.gateway) || !has(self.url)", GATEWAY_WITH_URL),
    ("spec/target", "!has(self.url) || (!has(self.serve) && !has(self.ready))", ROLES_WITH_URL),
    ("spec/target/ready/all/{}", "self.size() > 0", EMPTY_GROUP),
    ("spec/target/service", "has(self.port) != has(self.portName)", ONE_PORT),
    ("spec/target/url", "self.matches('^http://[^/?#@]+/?$')", URL_FORMAT),
    ("spec/target/gateway", "self.matches('^http://[^/?#@]+/?$')", URL_FORMAT),
    (
        "spec",
        "!has(self.scaleBy) || self.scaleBy != 'kubernetes' || has(self.workload)",
        "scaleBy: kubernetes needs a workload; add it with its kind and name",
    ),
    (
        "spec/concurrency",
        "!has(self.max) || !has(self.rampStart) || self.rampStart <= self.max",
        "rampStart is more than max; the ramp starts below it, or at it",
    ),
    (
        "spec/match/hosts/[]",
        "self == '*' || (!self.contains('/') && self.lastIndexOf('*') <= 0 && (!self.startsWith('*') || self.startsWith('*.')))",
        "write the name of a host without scheme and path, or *.example.com for every name below it",
    ),
    (
        "spec/match/paths/[]",
        "self.startsWith('/') && !self.contains('*')",
        "write a path prefix that starts with a slash; it matches everything below it as it is, without a wildcard",
    ),
    (
        "spec/match/headers",
        "self.all(name, name.lowerAscii() != 'host')",
        "match the host with hosts: HTTP/2 has no such header",
    ),
    ("spec/readiness/path", "self.startsWith('/')", "write a path that starts with a slash, such as /health"),
];

/// Size limits. The API server estimates the cost of the rules from them before it accepts the definition.
const SCHEMA_SIZE_LIMITS: &[(&str, &str, u64)] = &[
    ("spec/match/models", "maxItems", 256),
    ("spec/match/models/[]", "maxLength", 253),
    ("spec/match/models/[]", "minLength", 1),
    ("spec/match/hosts", "maxItems", 64),
    ("spec/match/hosts/[]", "maxLength", 255),
    ("spec/match/paths", "maxItems", 64),
    ("spec/match/paths/[]", "maxLength", 1024),
    ("spec/match/headers", "maxProperties", 32),
    ("spec/match/headers/{}", "maxLength", 4096),
    ("spec/target/service/name", "minLength", 1),
    ("spec/target/service/name", "maxLength", 63),
    ("spec/target/service/portName", "minLength", 1),
    ("spec/target/service/portName", "maxLength", 63),
    ("spec/target/inferencePool/name", "minLength", 1),
    ("spec/target/inferencePool/name", "maxLength", 253),
    ("spec/target/url", "maxLength", 512),
    ("spec/target/gateway", "maxLength", 512),
    ("spec/target/serve", "maxProperties", 16),
    ("spec/target/serve/{}", "maxLength", 63),
    ("spec/target/ready/all", "maxProperties", Roles::MAX_GROUPS as u64),
    ("spec/target/ready/all/{}", "maxProperties", 16),
    ("spec/target/ready/all/{}/{}", "maxLength", 63),
    ("spec/readiness/path", "maxLength", 1024),
    ("spec/gateway/notYet/status", "maxItems", 64),
    ("spec/workload/name", "minLength", 1),
    ("spec/workload/name", "maxLength", 253),
];

/// Returns the part of a schema at a path of keys; `[]` stands for the items of a list, `{}` for the values of a map.
fn at<'a>(root: &'a mut Value, path: &str) -> &'a mut Value {
    path.split('/').fold(root, |schema, step| match step {
        "[]" => &mut schema["items"],
        "{}" => &mut schema["additionalProperties"],
        name => &mut schema["properties"][name],
    })
}

#[cfg(test)]
mod tests;
