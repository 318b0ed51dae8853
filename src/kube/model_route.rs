//! `ModelRoute`: a route as an object of the cluster. Its keys are those of a route in the file.

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

/// Which requests belong to a target of this namespace, and under which policies.
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
    /// Which requests belong to the route. Without it, every API request does.
    #[serde(default, rename = "match")]
    pub matcher: Matcher,
    /// What scales from zero, and where to send requests.
    pub target: RouteTarget,
    /// How it is known that the target answers.
    #[serde(default)]
    pub readiness: Readiness,
    /// How many requests wait while nothing is ready, and for how long.
    #[serde(default)]
    pub hold: Hold,
    /// What a waiting client is sent.
    #[serde(default)]
    pub keepalive: Keepalive,
    /// How many requests one endpoint gets at a time.
    #[serde(default)]
    pub concurrency: Concurrency,
    /// How long an endpoint may take.
    #[serde(default)]
    pub upstream: UpstreamTimeouts,
    /// What of a gateway's answers says that it has not noticed its servers yet.
    #[serde(default)]
    pub gateway: Gateway,
    /// What a scaler is told of the demand.
    #[serde(default)]
    pub scaling: Scaling,
    /// Who changes the number of replicas.
    #[serde(default)]
    pub scale_by: ScaleBy,
    /// What is scaled. Needed with `scaleBy: kubernetes`; otherwise it is found through the ScaledObject.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
    /// What becomes of requests at zero while the ScaledObject is paused.
    #[serde(default)]
    pub when_paused: WhenPaused,
    /// How long something may stand in the way of a start before the requests that wait are told.
    #[serde(default)]
    pub failure_grace: FailureGrace,
    /// What clients read of a failure.
    #[serde(default)]
    pub failure: Failure,
}

/// What scales from zero: exactly one of `service`, `inferencePool` and `url`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouteTarget {
    /// A Service of this namespace; requests go to its pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceTarget>,
    /// An InferencePool of this namespace, by its selector; requests go to its pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inference_pool: Option<PoolTarget>,
    /// A server or gateway that someone else scales: `http://host:port`. The proxy's configuration must allow the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// `http://host:port` that requests go to instead of the pods, which then only tell readiness. Beside `service` or
    /// `inferencePool`. The proxy's configuration must allow the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Labels of the pods that requests go to, where not all of the Service or pool serve: those of the decode role.
    /// Without it, all do.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub serve: BTreeMap<String, String>,
    /// What must be ready for the target to be up, where one pod is not enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<ReadyRule>,
}

/// What must be ready for the target to be up.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReadyRule {
    /// Groups of pods of the Service or pool: names, each with the labels of its pods. Every group needs a ready pod.
    pub all: BTreeMap<String, BTreeMap<String, String>>,
}

/// A Service, and which of its ports.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceTarget {
    /// Its name.
    pub name: String,
    /// The number of its port, or else `portName`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
    /// The name of its port, or else `port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_name: Option<String>,
}

/// An InferencePool.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PoolTarget {
    /// Its name.
    pub name: String,
}

/// An object as it is stored, for its schema.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is of use")]
struct Stored {
    spec: ModelRouteSpec,
    status: Option<ModelRouteStatus>,
}

// === impl ModelRouteSpec ===

impl ModelRouteSpec {
    /// The route of the object with this name.
    ///
    /// # Errors
    /// When the target is none, or several. An API server with our definition refuses such objects.
    pub fn to_route(&self, namespace: &str, name: &str) -> Result<Route, String> {
        let mut concurrency = self.concurrency;
        // Who lowers `max` alone means the ramp to end there.
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
                return Err(format!("spec.target: {NO_GATEWAY}"));
            }
            (None, None, Some(_)) if self.ready.is_some() || !self.serve.is_empty() => {
                return Err(format!("spec.target: {NO_ROLES}"));
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
            return Err(format!("spec.target.ready.all: {} groups are the most", Roles::MAX_GROUPS));
        }
        if let Some((name, _)) = groups.iter().find(|(_, labels)| labels.is_empty()) {
            return Err(format!("spec.target.ready.all.{name}: {NO_LABELS}"));
        }
        Ok(Roles { serve: self.serve.clone(), groups })
    }
}

/// The port of a Service, given in one way or the other.
pub(super) fn service_port(port: Option<u16>, name: Option<&str>) -> Result<ServicePort, &'static str> {
    match (port, name) {
        (Some(0), None) => Err("0 is no port; choose 1 to 65535"),
        (Some(port), None) => Ok(ServicePort::Number(port)),
        (None, Some(name)) if !name.is_empty() => Ok(ServicePort::Name(name.to_owned())),
        _ => Err(ONE_PORT),
    }
}

const ONE_TARGET: &str = "give exactly one of service, inferencePool and url; with a gateway in front of the pods, name \
                          it with gateway beside service or inferencePool";
const NO_GATEWAY: &str = "gateway goes with service or inferencePool, whose pods tell readiness; a url is already where \
                          requests go, so leave one of the two out";
const NO_ROLES: &str = "serve and ready go with service or inferencePool, whose pods they are about; a url says by its \
                        readiness path whether it is up";
const NO_LABELS: &str = "name at least one label that the pods of the group have";
const ONE_PORT: &str = "give exactly one of port, a number, and portName";
const PLAIN_HTTP: &str = "write http://host:port; requests keep their own path, and https is not supported yet: put a \
                          gateway that speaks TLS in between";

/// The definition of the kind, ready to be applied.
pub fn definition() -> CustomResourceDefinition {
    let mut definition = ModelRoute::crd();
    for version in &mut definition.spec.versions {
        // What we write is what it reads: a test does.
        let open_api_v3_schema = serde_json::from_value(openapi()).ok();
        version.schema = Some(CustomResourceValidation { open_api_v3_schema });
    }
    definition
}

/// The definition of the kind in YAML, ready for `kubectl apply -f -`.
pub fn definition_yaml() -> String {
    let definition = serde_json::to_value(definition()).unwrap_or_default();
    serde_saphyr::to_string(&definition).unwrap_or_default()
}

fn openapi() -> Value {
    let mut root = schema::structural::<Stored>();
    root["description"] =
        "A route of Anteroom: which requests belong to a target, and under which policies.".into();
    for (path, rule, message) in RULES {
        let rules = &mut at(&mut root, path)["x-kubernetes-validations"];
        match rules {
            Value::Array(rules) => rules.push(json!({"rule": rule, "message": message})),
            _ => *rules = json!([{"rule": rule, "message": message}]),
        }
    }
    for (path, key, most) in BOUNDS {
        at(&mut root, path)[*key] = json!(most);
    }
    root
}

/// What goes beyond types, where the API server can tell at once. All of it is checked again by the proxy.
const RULES: &[(&str, &str, &str)] = &[
    (
        "spec/target",
        "[has(self.service), has(self.inferencePool), has(self.url)].filter(given, given).size() == 1",
        ONE_TARGET,
    ),
    ("spec/target", "!has(self.gateway) || !has(self.url)", NO_GATEWAY),
    ("spec/target", "!has(self.url) || (!has(self.serve) && !has(self.ready))", NO_ROLES),
    ("spec/target/ready/all/{}", "self.size() > 0", NO_LABELS),
    ("spec/target/service", "has(self.port) != has(self.portName)", ONE_PORT),
    ("spec/target/url", "self.matches('^http://[^/?#@]+/?$')", PLAIN_HTTP),
    ("spec/target/gateway", "self.matches('^http://[^/?#@]+/?$')", PLAIN_HTTP),
    (
        "spec",
        "!has(self.scaleBy) || self.scaleBy != 'kubernetes' || has(self.workload)",
        "scaleBy is kubernetes, and nothing says what to scale; add workload with its kind and name",
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

/// How much there may be: rules have a price that an API server estimates before it takes them, and routes are looked at
/// by everybody.
const BOUNDS: &[(&str, &str, u64)] = &[
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

/// The part of a schema at a path of keys; `[]` stands for the items of a list, `{}` for the values of a map.
fn at<'a>(root: &'a mut Value, path: &str) -> &'a mut Value {
    path.split('/').fold(root, |schema, step| match step {
        "[]" => &mut schema["items"],
        "{}" => &mut schema["additionalProperties"],
        name => &mut schema["properties"][name],
    })
}

#[cfg(test)]
mod tests;
