use super::*;
use crate::{
    coldstart::ColdStarts,
    domain::{Intercept, Policy},
};

fn table(matchers: &[(&str, Matcher)]) -> RouteTable {
    let cold_starts = ColdStarts::new(|_| {});
    RouteTable::new(matchers.iter().map(|(name, matcher)| {
        let route: Route = serde_json::from_value(serde_json::json!({
            "name": name, "match": matcher, "target": {"url": "http://127.0.0.1:1"}
        }))
        .unwrap();
        let gate = Gate::new(route.name.clone(), Policy::default(), cold_starts.clone());
        (route, gate)
    }))
}

fn matcher(json: serde_json::Value) -> Matcher {
    serde_json::from_value(json).unwrap()
}

fn find(table: &RouteTable, host: &str, path: &str, headers: &[(&str, &str)], model: Option<&str>) -> String {
    let headers = headers.iter().map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap())).collect();
    match table.find(host, path, &headers, RequestModel::Read(model)) {
        RouteMatch::Route(gate) => gate.key().to_string(),
        RouteMatch::Interceptor(found) => found.key().to_owned(),
        RouteMatch::NeedsModel => "model?".into(),
        RouteMatch::Nothing => "-".into(),
    }
}

#[tokio::test]
async fn more_specific_route_goes_first() {
    let table = table(&[
        ("rest", Matcher::default()),
        ("tiny", matcher(serde_json::json!({"models": ["tiny", "tiny-lora"]}))),
        ("host", matcher(serde_json::json!({"hosts": ["a.example.com"], "models": ["tiny"]}))),
        ("wild", matcher(serde_json::json!({"hosts": ["*.example.com"]}))),
        ("path", matcher(serde_json::json!({"paths": ["/team"], "models": ["big"]}))),
        ("head", matcher(serde_json::json!({"headers": {"x-team": "red"}}))),
    ]);
    let v1 = "/v1/completions";
    for (host, path, headers, model, route) in [
        ("x", v1, &[][..], Some("tiny"), "tiny"),
        ("x", v1, &[], Some("tiny-lora"), "tiny"),
        ("x", v1, &[], Some("other"), "rest"),
        ("x", v1, &[], None, "rest"),
        ("A.example.com:8080", v1, &[], Some("tiny"), "host"),
        ("a.example.com", v1, &[], Some("other"), "wild"),
        ("b.EXAMPLE.com", v1, &[], Some("tiny"), "wild"),
        ("example.com", v1, &[], None, "rest"),
        ("x", "/team/v1/completions", &[], Some("big"), "path"),
        ("x", "/teams/v1/completions", &[], Some("big"), "rest"),
        ("x", v1, &[("x-team", "red")], Some("tiny"), "head"),
        ("x", v1, &[("x-team", "blue")], Some("tiny"), "tiny"),
        ("[::1]:80", v1, &[], Some("tiny"), "tiny"),
    ] {
        assert_eq!(find(&table, host, path, headers, model), route, "{host} {path} {headers:?} {model:?}");
    }
    assert_eq!(table.models().iter().map(|model| &**model).collect::<Vec<_>>(), ["big", "tiny", "tiny-lora"]);
    assert!(matches!(table.api(&Method::POST, "/team/v1/embeddings"), Api::Work(_)));
    assert_eq!(table.api(&Method::POST, "/other/v1/embeddings"), Api::Unknown);
}

#[tokio::test]
async fn unclaimed_hosts_get_no_local_answer() {
    let claiming = |hosts: &[&str]| table(&[("tiny", matcher(serde_json::json!({"hosts": hosts})))]);
    let apis = [Api::Models, Api::Model("tiny".into()), Api::Probe, Api::WrongMethod("POST"), Api::Root];
    for (routes, host, answers) in [
        (claiming(&["a.test", "*.b.test"]), "a.test:80", [true; 5]),
        (claiming(&["a.test", "*.b.test"]), "X.b.test", [true; 5]),
        (claiming(&["a.test", "*.b.test"]), "c.test", [false; 5]),
        // Addresses reach the proxy itself.
        (claiming(&["a.test"]), "10.0.0.7:8080", [true; 5]),
        (claiming(&["a.test"]), "[fd00::1]:8080", [true; 5]),
        (claiming(&["a.test"]), "localhost:8080", [true; 5]),
        (claiming(&[]), "c.test", [true; 5]),
        // After the last route was removed.
        (table(&[]), "c.test", [true, true, true, true, false]),
        (table(&[]), "10.0.0.7", [true; 5]),
    ] {
        assert_eq!([0, 1, 2, 3, 4].map(|at| routes.answers(host, &apis[at])), answers, "{host}");
    }
}

#[tokio::test]
async fn body_is_read_only_if_routing_needs_the_model() {
    let one = table(&[("all", Matcher::default())]);
    assert!(matches!(
        one.find("", "/v1/completions", &HeaderMap::new(), RequestModel::Unread),
        RouteMatch::Route(_)
    ));
    let two =
        table(&[("tiny", matcher(serde_json::json!({"models": ["tiny"]}))), ("all", Matcher::default())]);
    assert!(matches!(
        two.find("", "/v1/completions", &HeaderMap::new(), RequestModel::Unread),
        RouteMatch::NeedsModel
    ));
    assert!(matches!(
        two.find("", "/v1/completions", &HeaderMap::new(), RequestModel::Read(Some("x"))),
        RouteMatch::Route(gate) if gate.key().as_str() == "all"
    ));
}
#[tokio::test]
async fn application_route_gets_unmatched_requests() {
    let cold_starts = ColdStarts::new(|_| {});
    let parsed = |name: &str, matching: serde_json::Value| -> Route {
        serde_json::from_value(serde_json::json!({
            "name": name, "match": matching, "target": {"url": "http://127.0.0.1:1"}
        }))
        .unwrap()
    };
    let front = |name: &str, rules: &[serde_json::Value]| {
        let rules = rules.iter().map(|rule| matcher(rule.clone())).collect();
        let intercept = Some(Arc::new(Intercept { rules, ..Intercept::default() }));
        Route { intercept, ..parsed(name, serde_json::json!({})) }
    };
    let routes = [
        parsed("tiny", serde_json::json!({"models": ["tiny"]})),
        parsed("host", serde_json::json!({"hosts": ["llm.example.com"]})),
        front("all", &[serde_json::json!({})]),
        front("nothing", &[]),
        front(
            "app",
            &[
                serde_json::json!({"hosts": ["app.example.com"]}),
                serde_json::json!({"hosts": ["*.example.com"], "paths": ["/shop"]}),
            ],
        ),
    ];
    let table = RouteTable::new(routes.map(|route| {
        let gate = Gate::new(route.name.clone(), route.policy(), cold_starts.clone());
        (route, gate)
    }));
    let (get, post, none) = (Method::GET, Method::POST, HeaderMap::new());
    let key = |found: Option<&Arc<Interceptor>>| found.map_or("-", |found| found.key()).to_owned();
    for (host, method, path, route) in [
        ("app.example.com", &get, "/v1/models", "app"),
        ("app.example.com", &get, "/", "app"),
        ("APP.example.com:8080", &Method::OPTIONS, "/anything", "app"),
        ("shop.example.com", &get, "/shop/", "app"),
        ("shop.example.com", &get, "/shopping", "all"),
        // Answered by the proxy, as a model route matches too.
        ("other", &get, "/v1/models", "-"),
        ("other", &get, "/health", "all"),
        ("other", &get, "/v1/chat/completions", "-"),
        ("other", &get, "/favicon.ico", "all"),
        ("llm.example.com", &get, "/health", "-"),
        ("llm.example.com", &get, "/favicon.ico", "all"),
    ] {
        let found = table.interceptor(host, path, &none, &table.api(method, path));
        assert_eq!(key(found), route, "{host} {method} {path}");
    }
    // `/v1/models` and health checks never go to an application.
    for (host, is_ours) in [
        ("llm.example.com", true),
        ("10.0.0.7:8080", true),
        ("[::1]:8080", true),
        ("localhost", true),
        // `tiny` matches any host.
        ("other", true),
        ("app.example.com", true),
    ] {
        assert_eq!(table.answers(host, &Api::Probe), is_ours, "{host}");
    }
    let chat = "/v1/chat/completions";
    assert!(matches!(table.api(&post, chat), Api::Work(_)));
    for (host, model, route) in [
        ("app.example.com", RequestModel::Unread, "app"),
        ("llm.example.com", RequestModel::Unread, "host"),
        ("other", RequestModel::Unread, "model?"),
        ("other", RequestModel::Read(Some("tiny")), "tiny"),
        ("other", RequestModel::Read(Some("foreign")), "all"),
    ] {
        let found = match table.find(host, chat, &none, model) {
            RouteMatch::Route(gate) => gate.key().as_str(),
            RouteMatch::Interceptor(found) => found.key(),
            RouteMatch::NeedsModel => "model?",
            RouteMatch::Nothing => "-",
        };
        assert_eq!(found, route, "{host} {model:?}");
    }
    assert_eq!(table.models().len(), 1);
}
