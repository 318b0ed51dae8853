//! The shapes of objects are those of the Add-on's documentation (Apache-2.0), with names of our own.

use std::collections::BTreeMap;

use super::*;
use crate::domain::Policy;

/// A namespace with one ConfigMap, a Service with pods, and an ExternalName Service.
struct TestReferences;

impl References for TestReferences {
    fn config_map(&self, namespace: &str, name: &str) -> Option<BTreeMap<String, bytes::Bytes>> {
        ((namespace, name) == ("shop", "pages")).then(|| {
            [("index.html".to_owned(), "<p>soon</p>".into()), ("wait.json".to_owned(), "{}".into())].into()
        })
    }

    fn service(&self, namespace: &str, name: &str) -> Option<Arc<Service>> {
        let kind = match (namespace, name) {
            ("shop", "spare") => "type: ClusterIP",
            ("shop", "outside") => "type: ExternalName, externalName: 169.254.169.254.nip.io",
            _ => return None,
        };
        let text = format!("spec: {{ {kind}, ports: [{{ name: http, port: 8090 }}] }}");
        Some(Arc::new(serde_saphyr::from_str(&text).unwrap()))
    }
}

fn object(spec: &str) -> InterceptorRoute {
    let text = format!(
        "apiVersion: http.keda.sh/v1beta1\nkind: InterceptorRoute\nmetadata: {{ name: front, namespace: shop }}\n{spec}"
    );
    serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn read(spec: &str) -> ConvertedRoute {
    object(spec).to_route(&TestReferences).unwrap_or_else(|error| panic!("{spec}: {error}"))
}

fn intercept(spec: &str) -> Intercept {
    Intercept::clone(read(spec).route.intercept.as_ref().unwrap())
}

const PLAIN: &str = "spec:
  target: { service: front-svc, port: 8080 }
  scalingMetric: { concurrency: { targetValue: 100 } }
";

#[test]
fn plain_object_routes_to_its_service() {
    let text = format!("{PLAIN}  rules:\n  - hosts: [app.example.com]\n    paths: [{{ value: /api }}]\n");
    let ConvertedRoute { route, remarks } = read(&text);
    assert_eq!(route.name.as_str(), "shop/front");
    let Target::Cluster(target) = &route.target else { panic!("{:?}", route.target) };
    assert_eq!((target.namespace.as_str(), target.to_string().as_str()), ("shop", "service front-svc:8080"));
    assert_eq!((route.scaling.target, route.scaling.counting), (100, Counting::Concurrency));
    assert_eq!(route.scaling.request_rate, None);
    assert!(!route.readiness.probe, "only its own probes say when an application takes requests");
    assert!(remarks.is_empty(), "{remarks:?}");
    let [matcher] = route.matchers() else { panic!("{:?}", route.matchers()) };
    assert_eq!(
        (&matcher.hosts[..], &matcher.paths[..]),
        (&["app.example.com".to_owned()][..], &["/api".to_owned()][..])
    );
    assert_eq!(crate::config::check_cluster_route(&route, &crate::config::Config::default()), Ok(Vec::new()));
}

#[test]
fn any_rule_matches_and_no_rules_match_nothing() {
    let text = format!(
        "{PLAIN}  rules:
  - hosts: [api.example.com, API.staging.example.com:8443, '*.example.com', '']
    paths: [{{ value: api/v1/ }}, {{ value: / }}]
    headers: [{{ name: X-Route, value: canary }}, {{ name: X-Any }}, {{ name: x-route }}]
  - hosts: [admin.example.com]
"
    );
    let matchers = intercept(&text).rules;
    let hosts = ["api.example.com", "api.staging.example.com", "*.example.com", "*"].map(str::to_owned);
    assert_eq!(matchers[0].hosts, hosts);
    assert_eq!(matchers[0].paths, ["/api/v1", "/"]);
    assert_eq!(matchers[0].headers, [("X-Route".to_owned(), "canary".to_owned())].into());
    assert_eq!(matchers[0].present, ["X-Any".to_owned()].into(), "a value says more than presence");
    assert_eq!(matchers[1].hosts, ["admin.example.com"]);
    assert_eq!(matchers.len(), 2);

    let ConvertedRoute { route, remarks } = read(PLAIN);
    assert!(route.matchers().is_empty() && route.claim_count() == 0);
    assert!(remarks[0].contains("no rules"), "{remarks:?}");
}

#[test]
fn scaling_metrics_are_converted() {
    let scaling = |metric: &str| {
        read(&format!("spec: {{ target: {{ service: a, port: 1 }}, scalingMetric: {metric} }}")).route.scaling
    };
    let rate = |target, seconds| Some(RequestRate { target, window: Period::from_secs(seconds) });
    for (metric, target, request_rate) in [
        ("{ concurrency: { targetValue: 7 } }", 7, None),
        ("{ concurrency: {} }", 100, None),
        ("{ requestRate: { targetValue: 50, window: 2m, granularity: 1s } }", NO_TARGET, rate(50, 120)),
        ("{ requestRate: {} }", NO_TARGET, rate(100, 60)),
        ("{ concurrency: { targetValue: 7 }, requestRate: { targetValue: 9, window: 90s } }", 7, rate(9, 90)),
        ("{}", 100, None),
    ] {
        let scaling = scaling(metric);
        assert_eq!((scaling.target, scaling.request_rate), (target, request_rate), "{metric}");
        assert_eq!(scaling.counting, Counting::Concurrency, "{metric}");
    }
}

#[test]
fn cold_start_settings_are_converted() {
    let bare = intercept(PLAIN);
    assert_eq!((bare.max_pending, bare.overflow), (None, Overflow::Reject));
    assert!(bare.placeholder.is_none() && bare.fallback.is_none() && bare.static_routes.is_empty());

    let text = format!(
        "{PLAIN}  coldStart:
    maxPendingRequests: 500
    overflow: Placeholder
    placeholder:
      response:
        body: <h1>Loading...</h1>
        headers: {{ Content-Type: text/html, Refresh: '5' }}
        statusCode: 503
    fallback: {{ service: {{ name: spare, port: 8080 }} }}
  timeouts: {{ readiness: 5s, request: 1m0s, responseHeader: 0s }}
"
    );
    let full = intercept(&text);
    assert_eq!((full.max_pending, full.overflow), (Some(500), Overflow::Placeholder));
    assert_eq!(full.fallback.as_deref(), Some("spare.shop.svc:8080"));
    let placeholder = full.placeholder.as_ref().unwrap();
    assert_eq!(
        (placeholder.status().as_u16(), &placeholder.headers()["refresh"]),
        (503, &"5".parse().unwrap())
    );
    assert_eq!(placeholder.body("/").unwrap().0, "<h1>Loading...</h1>");
    assert_eq!(full.timeouts.readiness, Some(Period::from_secs(5)));
    assert_eq!(full.timeouts.request, Some(Period::from_secs(60)));
    assert_eq!(full.timeouts.response_header, Some(Period::ZERO));
    let policy: Policy = read(&text).route.policy();
    assert_eq!((policy.hold.max_requests, policy.hold.timeout), (500, Period::from_secs(5)));

    // 0 pending requests means no limit. A fallback may name its port, or have the format from before 0.15.
    let fallback =
        |fallback: &str| intercept(&format!("{PLAIN}  coldStart: {{ fallback: {fallback} }}")).fallback;
    assert_eq!(intercept(&format!("{PLAIN}  coldStart: {{ maxPendingRequests: 0 }}")).max_pending, None);
    assert_eq!(
        fallback("{ service: { name: spare, portName: http } }").as_deref(),
        Some("spare.shop.svc:8090")
    );
    assert_eq!(fallback("{ service: spare, port: 80 }").as_deref(), Some("spare.shop.svc:80"));
}

#[test]
fn fallback_must_be_a_service_with_pods() {
    for (service, expected) in [
        ("name: spare, portName: admin", "the Service spare has no port admin"),
        ("name: outside, port: 80", "the Service outside is an ExternalName"),
        ("name: outside, portName: http", "the Service outside is an ExternalName"),
        ("name: nowhere, port: 80", "the Service nowhere does not exist or cannot be listed"),
        ("name: nowhere, portName: http", "the Service nowhere does not exist or cannot be listed"),
        ("name: 'example.com/#', port: 80", "the Service example.com/# does not exist"),
    ] {
        let ConvertedRoute { route, remarks } = read(&format!(
            "{PLAIN}  rules: [{{}}]\n  coldStart: {{ fallback: {{ service: {{ {service} }} }} }}"
        ));
        assert_eq!(route.intercept.unwrap().fallback, None, "{service}");
        assert!(remarks[0].contains(expected), "{service}: {remarks:?}");
    }
}

#[test]
fn static_routes_and_config_map_bodies_convert() {
    let text = format!(
        "{PLAIN}  rules: [{{ hosts: ['*'] }}]
  staticRoutes:
  - rules: [{{ paths: [{{ value: /healthz }}] }}]
    response: {{ statusCode: 200, body: OK }}
  - rules: [{{ paths: [{{ value: /old }}] }}]
    responseMode: Always
    response: {{ statusCode: 307, headers: {{ Location: /new }} }}
  - rules: [{{ paths: [{{ value: / }}] }}]
    responseMode: WhenUnavailable
    response: {{ bodyFromConfigMap: {{ name: pages, key: index.html }} }}
  - rules: []
    response: {{ bodyFromConfigMap: {{ name: pages }} }}
  coldStart: {{ placeholder: {{ response: {{ bodyFromConfigMap: {{ name: nowhere }} }} }} }}
"
    );
    let ConvertedRoute { route, remarks } = read(&text);
    let intercept = route.intercept.unwrap();
    let [health, moved, page, files] = &intercept.static_routes[..] else { panic!("{intercept:?}") };
    assert_eq!((health.mode, health.answer.status().as_u16()), (ResponseMode::WhenUnavailable, 200));
    assert_eq!((moved.mode, moved.answer.status().as_u16()), (ResponseMode::Always, 307));
    assert_eq!(page.answer.body("/").unwrap().0, "<p>soon</p>");
    assert_eq!(files.answer.body("/wait.json").unwrap().0, "{}");
    assert_eq!(intercept.placeholder.as_ref().unwrap().body("/"), None);
    assert_eq!(intercept.placeholder.as_ref().unwrap().status().as_u16(), 503);
    assert_eq!(remarks.len(), 1);
    assert!(remarks[0].contains("no ConfigMap nowhere with the label"), "{remarks:?}");
}

#[test]
fn unknown_fields_are_ignored_and_probe_is_opt_in() {
    let text =
        format!("{PLAIN}  proxyMode: Endpoint\n  tomorrow: {{ what: ever }}\nstatus: {{ more: [1] }}\n");
    read(&text);
    let mut probed = object(PLAIN);
    probed.metadata.annotations = Some([(PROBE_ANNOTATION.to_owned(), "/health".to_owned())].into());
    let readiness = probed.to_route(&TestReferences).unwrap().route.readiness;
    assert_eq!((readiness.probe, readiness.path.as_str()), (true, "/health"));
}

#[test]
fn invalid_object_reports_key_and_reason() {
    for (spec, expected) in [
        ("spec: {}", "spec.target: names no Service"),
        ("spec: { target: { service: a } }", "spec.target: give exactly one of port"),
        ("spec: { target: { service: a, port: 1, portName: b } }", "spec.target: give exactly one of port"),
        (
            "spec: { target: { service: a, port: 1 }, timeouts: { readiness: soon } }",
            "spec.timeouts.readiness: \"soon\" is not a duration",
        ),
        (
            "spec: { target: { service: a, port: 1 }, coldStart: { overflow: Queue } }",
            "spec.coldStart.overflow: \"Queue\" is not Reject or Placeholder",
        ),
        (
            "spec: { target: { service: a, port: 1 }, staticRoutes: [{ response: { statusCode: 99 } }] }",
            "spec.staticRoutes[0].response: 99 is not a valid status",
        ),
        (
            "spec: { target: { service: a, port: 1 }, staticRoutes: [{ responseMode: Never }] }",
            "spec.staticRoutes[0].responseMode: \"Never\"",
        ),
        (
            "spec: { target: { service: a, port: 1 }, coldStart: { placeholder: { response: { body: a, \
             bodyFromConfigMap: { name: b } } } } }",
            "spec.coldStart.placeholder.response: give body or bodyFromConfigMap",
        ),
    ] {
        let error = object(spec).to_route(&TestReferences).err().unwrap_or_else(|| panic!("{spec}"));
        assert!(error.contains(expected), "{spec}: {error}");
    }
}
