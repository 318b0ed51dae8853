//! Converts an InterceptorRoute to a route.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::api::core::v1::Service;

use super::{
    ConfigMapKey, Fallback, InterceptorRoute, InterceptorRouteSpec, InterceptorRule, Placeholder,
    ResponseSpec, ScalingMetric, ServiceRef,
};
use crate::{
    domain::{
        ClusterTarget, Counting, EndpointSource, Intercept, InterceptTimeouts, Matcher, Overflow, Period,
        Readiness, RequestRate, ResponseMode, Route, Scaling, ServicePort, StaticAnswer, StaticBody,
        StaticRoute, Target,
    },
    kube::{go_duration, model_route::service_port},
};

/// Access to the objects that an InterceptorRoute refers to.
pub(in crate::kube) trait References {
    /// Returns the content of a ConfigMap labelled as response bodies.
    fn config_map(&self, namespace: &str, name: &str) -> Option<BTreeMap<String, bytes::Bytes>>;
    /// Returns a Service, if it exists and may be listed.
    fn service(&self, namespace: &str, name: &str) -> Option<Arc<Service>>;
}

/// A converted route with warnings.
pub(in crate::kube) struct ConvertedRoute {
    pub(in crate::kube) route: Route,
    /// Warnings for the author of the object.
    pub(in crate::kube) remarks: Vec<String>,
}

/// Target value per replica that a single replica always meets, for objects that do not scale by concurrency.
const NO_TARGET: u32 = 1_000_000;
/// Annotation: path at which unready pods are probed. Without it they are not, as no default path is known for
/// applications other than model servers.
pub(in crate::kube) const PROBE_ANNOTATION: &str = "anteroom.dev/probe";

// === impl InterceptorRoute ===

impl InterceptorRoute {
    /// Converts the object.
    ///
    /// # Errors
    /// Returns the key and the reason if the object is invalid.
    pub(in crate::kube) fn to_route(&self, references: &impl References) -> Result<ConvertedRoute, String> {
        let namespace = self.metadata.namespace.as_deref().unwrap_or_default();
        let name = self.metadata.name.as_deref().unwrap_or_default();
        let spec = &self.spec;
        let mut remarks = Vec::new();
        if spec.rules.is_empty() {
            remarks.push("it has no rules, so no request is routed to it".to_owned());
        }
        let target = ClusterTarget {
            namespace: namespace.to_owned(),
            source: EndpointSource::Service {
                name: spec.target.service_name("spec.target")?.to_owned(),
                port: service_port(spec.target.port, spec.target.port_name.as_deref())
                    .map_err(|error| format!("spec.target: {error}"))?,
            },
            gateway: None,
            roles: <_>::default(),
        };
        let mut reader = Reader { namespace, references, remarks };
        let intercept = reader.intercept(spec)?;
        let probed = self.metadata.annotations.as_ref().and_then(|notes| notes.get(PROBE_ANNOTATION));
        let readiness = Readiness {
            probe: probed.is_some(),
            path: probed.cloned().unwrap_or_else(|| Readiness::default().path),
            ..Readiness::default()
        };
        let route = Route {
            name: format!("{namespace}/{name}").as_str().into(),
            matcher: Matcher::default(),
            target: Target::Cluster(target),
            readiness,
            hold: <_>::default(),
            keepalive: <_>::default(),
            concurrency: <_>::default(),
            upstream: <_>::default(),
            gateway: <_>::default(),
            scaling: spec.scaling_metric.to_scaling()?,
            scale_by: <_>::default(),
            workload: None,
            when_paused: <_>::default(),
            failure_grace: <_>::default(),
            failure: <_>::default(),
            intercept: Some(Arc::new(intercept)),
        };
        Ok(ConvertedRoute { route, remarks: reader.remarks })
    }
}

struct Reader<'a, R> {
    namespace: &'a str,
    references: &'a R,
    remarks: Vec<String>,
}

// === impl Reader ===

impl<R: References> Reader<'_, R> {
    fn intercept(&mut self, spec: &InterceptorRouteSpec) -> Result<Intercept, String> {
        let cold_start = spec.cold_start.clone().unwrap_or_default();
        let mut intercept = Intercept {
            rules: matchers(&spec.rules),
            timeouts: InterceptTimeouts {
                readiness: period(&spec.timeouts.readiness, "spec.timeouts.readiness")?,
                request: period(&spec.timeouts.request, "spec.timeouts.request")?,
                response_header: period(&spec.timeouts.response_header, "spec.timeouts.responseHeader")?,
            },
            // 0 means unlimited in the Add-on; the limit of objects without a value applies here.
            max_pending: cold_start.max_pending_requests.filter(|most| *most > 0),
            overflow: match cold_start.overflow.as_deref() {
                Some("Placeholder") => Overflow::Placeholder,
                Some("Reject") | None => Overflow::Reject,
                Some(other) => {
                    return Err(format!("spec.coldStart.overflow: \"{other}\" is not Reject or Placeholder"));
                }
            },
            ..Intercept::default()
        };
        if let Some(Fallback::Nested { service } | Fallback::Flat(service)) = &cold_start.fallback {
            intercept.fallback = self.fallback(service)?;
        }
        if let Some(Placeholder { response }) = &cold_start.placeholder {
            let path = "spec.coldStart.placeholder.response";
            intercept.placeholder = Some(self.answer(response, Intercept::PLACEHOLDER_STATUS, path)?);
        }
        for (index, route) in spec.static_routes.iter().enumerate() {
            let path = format!("spec.staticRoutes[{index}]");
            intercept.static_routes.push(StaticRoute {
                rules: matchers(&route.rules),
                answer: self.answer(
                    &route.response,
                    StaticRoute::DEFAULT_STATUS,
                    &format!("{path}.response"),
                )?,
                mode: match route.response_mode.as_deref() {
                    Some("Always") => ResponseMode::Always,
                    Some("WhenUnavailable") | None => ResponseMode::WhenUnavailable,
                    Some(other) => {
                        return Err(format!(
                            "{path}.responseMode: \"{other}\" is not WhenUnavailable or Always"
                        ));
                    }
                },
            });
        }
        Ok(intercept)
    }

    /// Returns the authority of the fallback. The Service must select pods: an ExternalName could lead to any host
    /// despite `kubernetes.allowedHosts`, and so could an unknown Service.
    fn fallback(&mut self, service: &ServiceRef) -> Result<Option<Arc<str>>, String> {
        let path = "spec.coldStart.fallback.service";
        let name = service.service_name(path)?;
        let port = service_port(service.port, service.port_name.as_deref());
        let port = port.map_err(|error| format!("{path}: {error}"))?;
        match self.port_of(name, &port) {
            Ok(port) => Ok(Some(format!("{name}.{}.svc:{port}", self.namespace).into())),
            Err(why) => {
                self.remarks.push(format!("{path}: {why}"));
                Ok(None)
            }
        }
    }

    fn port_of(&self, name: &str, port: &ServicePort) -> Result<u16, String> {
        let Some(service) = self.references.service(self.namespace, name) else {
            return Err(format!(
                "the Service {name} does not exist or cannot be listed, so there is no fallback: create it, or \
                 grant list and watch on services"
            ));
        };
        let spec = service.spec.as_ref();
        if spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName") {
            return Err(format!(
                "the Service {name} is an ExternalName, which may resolve to any host, so there is no fallback: use a \
                 Service that selects pods"
            ));
        }
        match port {
            ServicePort::Number(port) => Ok(*port),
            ServicePort::Name(port) => spec
                .and_then(|spec| spec.ports.iter().flatten().find(|known| known.name.as_ref() == Some(port)))
                .and_then(|known| u16::try_from(known.port).ok())
                .ok_or_else(|| format!("the Service {name} has no port {port}, so there is no fallback")),
        }
    }

    fn answer(&mut self, response: &ResponseSpec, status: u16, path: &str) -> Result<StaticAnswer, String> {
        let body = match (&response.body, &response.body_from_config_map) {
            (Some(_), Some(_)) => return Err(format!("{path}: give body or bodyFromConfigMap, not both")),
            (Some(text), None) => StaticBody::Text(text.clone().into()),
            (None, None) => StaticBody::Text(<_>::default()),
            (None, Some(from)) => self.file(from, path),
        };
        let headers = response.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let answer = StaticAnswer::new(response.status_code.unwrap_or(status), headers, body);
        answer.map_err(|error| format!("{path}: {error}"))
    }

    fn file(&mut self, from: &ConfigMapKey, path: &str) -> StaticBody {
        let Some(files) = self.references.config_map(self.namespace, &from.name) else {
            self.remarks.push(format!(
                "{path}.bodyFromConfigMap: no ConfigMap {} with the label {BODY_LABEL} exists, or ConfigMaps cannot be listed",
                from.name
            ));
            return StaticBody::Missing;
        };
        let Some(key) = &from.key else { return StaticBody::Files(files) };
        match files.get(key) {
            Some(content) => StaticBody::File { name: key.clone(), content: content.clone() },
            None => {
                self.remarks
                    .push(format!("{path}.bodyFromConfigMap: the ConfigMap {} has no key {key}", from.name));
                StaticBody::Missing
            }
        }
    }
}

/// Label required of ConfigMaps with response bodies.
pub(in crate::kube) const BODY_LABEL: &str = "http.keda.sh/response-body=true";

// === impl ServiceRef ===

impl ServiceRef {
    fn service_name(&self, path: &str) -> Result<&str, String> {
        if self.service.is_empty() { Err(format!("{path}: names no Service")) } else { Ok(&self.service) }
    }
}

// === impl ScalingMetric ===

impl ScalingMetric {
    fn to_scaling(&self) -> Result<Scaling, String> {
        let least = |value: Option<u32>| value.unwrap_or(Intercept::DEFAULT_TARGET).max(1);
        let request_rate = match &self.request_rate {
            None => None,
            Some(rate) => {
                let window = period(&rate.window, "spec.scalingMetric.requestRate.window")?;
                let window = window.filter(|window| *window > Period::ZERO);
                Some(RequestRate {
                    target: least(rate.target_value),
                    window: window.unwrap_or(Period::from_secs(60)),
                })
            }
        };
        let target = match (&self.concurrency, &request_rate) {
            (Some(concurrency), _) => least(concurrency.target_value),
            (None, Some(_)) => NO_TARGET,
            (None, None) => Intercept::DEFAULT_TARGET,
        };
        Ok(Scaling { target, counting: Counting::Concurrency, request_rate, ..Scaling::default() })
    }
}

fn matchers(rules: &[InterceptorRule]) -> Vec<Matcher> {
    rules.iter().map(InterceptorRule::to_matcher).collect()
}

// === impl InterceptorRule ===

impl InterceptorRule {
    fn to_matcher(&self) -> Matcher {
        // Semantics of the Add-on: hosts without port, empty for any; paths as segments, with or without a leading
        // slash.
        let host = |given: &String| match without_port(given) {
            "" => "*".to_owned(),
            name => name.to_ascii_lowercase(),
        };
        let headers =
            self.headers.iter().filter_map(|header| Some((header.name.clone(), header.value.clone()?)));
        let headers: BTreeMap<_, _> = headers.collect();
        let present =
            self.headers.iter().filter(|header| header.value.is_none()).map(|header| header.name.clone());
        let present: BTreeSet<_> =
            present.filter(|name| !headers.keys().any(|other| other.eq_ignore_ascii_case(name))).collect();
        Matcher {
            models: Vec::new(),
            hosts: self.hosts.iter().map(host).collect(),
            paths: self.paths.iter().map(|path| format!("/{}", path.value.trim_matches('/'))).collect(),
            headers,
            present,
        }
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') && port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

/// Upper bound of periods; longer ones are capped.
const MAX_OBJECT_PERIOD: Period = Period::from_secs(30 * 24 * 60 * 60);

fn period(text: &Option<String>, key: &str) -> Result<Option<Period>, String> {
    let Some(text) = text else { return Ok(None) };
    match go_duration::parse(text) {
        Some(duration) => Ok(Some(Period::from(duration).min(MAX_OBJECT_PERIOD))),
        None => Err(format!("{key}: \"{text}\" is not a duration, such as 300ms, 20s or 1h30m")),
    }
}

#[cfg(test)]
mod tests;
