//! Route matching by host, path, headers, then model. More specific routes take precedence.

use std::{borrow::Borrow, cmp::Reverse, collections::HashMap, sync::Arc};

use http::{HeaderMap, Method};

use super::{
    interceptor::Interceptor,
    rule::{self, Headers, ends_with, host_name, is_address, is_below, prefix},
};
use crate::{
    admission::Gate,
    domain::{Matcher, Route, RouteKey},
    openai::Api,
};

/// Routes, indexed for lookup. Immutable; rebuilt by each reload.
#[derive(Default)]
pub struct RouteTable {
    exact: HashMap<Box<str>, Vec<Class>>,
    /// By suffix including its leading dot, longest first.
    wildcard: Vec<(Box<str>, Vec<Class>)>,
    any: Vec<Class>,
    /// Path prefixes that the API may be mounted under.
    prefixes: Vec<Box<str>>,
    models: Vec<Box<str>>,
    gates: Vec<Arc<Gate>>,
    /// Model routes, with the models that each names.
    listing: Vec<(Arc<Gate>, Vec<Box<str>>)>,
    /// There is an [`Interceptor`].
    intercepts: bool,
}

/// Routes with the same host, path and headers.
#[derive(Default)]
struct Class {
    path: Box<str>,
    headers: Headers,
    by_model: HashMap<Box<str>, Arc<Gate>>,
    any_model: Option<Arc<Gate>>,
    /// Gets requests that the model routes of the class do not serve.
    interceptor: Option<Arc<Interceptor>>,
}

/// The model of a request, as far as it is known.
#[derive(Clone, Copy, Debug)]
pub enum Model<'a> {
    /// The body has not been read.
    UnreadBody,
    /// The body has been read; `None` if it has no model.
    Read(Option<&'a str>),
}

/// Result of a lookup.
pub enum Match<'a> {
    /// The route.
    Route(&'a Arc<Gate>),
    /// A route that proxies any HTTP application.
    Interceptor(&'a Arc<Interceptor>),
    /// The route depends on the model: read the body and look up again.
    NeedsModel,
    /// No route.
    Nothing,
}

/// Result of a lookup for a request without a model.
pub enum Unnamed<'a> {
    /// The route.
    Route(&'a Arc<Gate>),
    /// Several routes, all of whose targets are down.
    NothingUp,
    /// Several routes with running targets.
    Several,
    /// No model route.
    Nothing,
}

// === impl RouteTable ===

impl RouteTable {
    /// Indexes routes. The first of two equal routes wins: configuration files with equal routes are rejected, and
    /// cluster routes are ordered by age.
    pub fn new(routes: impl IntoIterator<Item = (impl Borrow<Route>, Arc<Gate>)>) -> Self {
        let mut table = Self::default();
        for (route, gate) in routes {
            let route: &Route = route.borrow();
            let interceptor = route.intercept.as_ref().map(|asks| Interceptor::new(&gate, asks));
            table.intercepts |= interceptor.is_some();
            if interceptor.is_none() {
                let names: Vec<Box<str>> =
                    route.matcher.models.iter().map(|model| model.as_str().into()).collect();
                table.models.extend_from_slice(&names);
                table.listing.push((gate.clone(), names));
                table.prefixes.extend(route.matcher.paths.iter().map(|path| prefix(path).into()));
            }
            for matcher in route.matchers() {
                table.insert(matcher, &gate, interceptor.as_ref());
            }
            table.gates.push(gate);
        }
        table.models.sort();
        table.models.dedup();
        table.prefixes.sort_by_key(|prefix| Reverse(prefix.len()));
        table.prefixes.dedup();
        table.wildcard.sort_by_key(|(suffix, _)| Reverse(suffix.len()));
        let wildcard = table.wildcard.iter_mut().map(|(_, classes)| classes);
        for classes in table.exact.values_mut().chain(wildcard).chain([&mut table.any]) {
            // Stable sort: the first of equal routes stays first.
            classes.sort_by_key(|class| {
                let exact = class.headers.iter().filter(|(_, value)| value.is_some()).count();
                Reverse((class.path.len(), class.headers.len(), exact))
            });
        }
        table
    }

    fn insert(&mut self, matcher: &Matcher, gate: &Arc<Gate>, interceptor: Option<&Arc<Interceptor>>) {
        let hosts: Vec<_> = matcher.hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        if hosts.is_empty() {
            insert_class(&mut self.any, matcher, gate, interceptor);
        }
        for host in hosts {
            let classes = match host.strip_prefix('*') {
                Some("") => &mut self.any,
                Some(suffix) => match self.wildcard.iter().position(|(known, _)| **known == *suffix) {
                    Some(place) => &mut self.wildcard[place].1,
                    None => {
                        self.wildcard.push((suffix.into(), Vec::new()));
                        let last = self.wildcard.len() - 1;
                        &mut self.wildcard[last].1
                    }
                },
                None => self.exact.entry(host.into()).or_default(),
            };
            insert_class(classes, matcher, gate, interceptor);
        }
    }

    /// Finds the route of an inference request.
    pub fn find(&self, host: &str, path: &str, headers: &HeaderMap, model: Model<'_>) -> Match<'_> {
        for class in self.classes(host, path, headers) {
            if !class.by_model.is_empty() {
                let Model::Read(model) = model else { return Match::NeedsModel };
                if let Some(gate) = model.and_then(|model| class.by_model.get(model)) {
                    return Match::Route(gate);
                }
            }
            if let Some(gate) = &class.any_model {
                return Match::Route(gate);
            }
            if let Some(interceptor) = &class.interceptor {
                return Match::Interceptor(interceptor);
            }
        }
        Match::Nothing
    }

    /// Finds the route of a request that is for a model server but has no model. Of the most specific routes, takes the
    /// only one, else the only one that is up, else the one for any model if it is up.
    pub fn unnamed(&self, host: &str, path: &str, headers: &HeaderMap) -> Unnamed<'_> {
        let Some(class) = self.class_for_models(host, path, headers) else { return Unnamed::Nothing };
        let gates = class.gates();
        if let [gate] = gates[..] {
            return Unnamed::Route(gate);
        }
        let mut up = gates.iter().filter(|gate| gate.target().is_up());
        match (up.next(), up.next()) {
            (None, _) => Unnamed::NothingUp,
            (Some(gate), None) => Unnamed::Route(gate),
            _ => match class.any_model.as_ref().filter(|gate| gate.target().is_up()) {
                Some(gate) => Unnamed::Route(gate),
                None => Unnamed::Several,
            },
        }
    }

    /// Returns all candidates of [`Self::unnamed`].
    pub fn unnamed_gates(&self, host: &str, path: &str, headers: &HeaderMap) -> Vec<&Arc<Gate>> {
        self.class_for_models(host, path, headers).map(Class::gates).unwrap_or_default()
    }

    fn class_for_models(&self, host: &str, path: &str, headers: &HeaderMap) -> Option<&Class> {
        self.classes(host, path, headers).find(|class| class.is_for_models())
    }

    /// Finds the application route of a request that is no inference request. A model route that matches first keeps
    /// the paths of the API; health checks and `/` only if it is more specific than the application route.
    pub fn interceptor(
        &self,
        host: &str,
        path: &str,
        headers: &HeaderMap,
        api: &Api,
    ) -> Option<&Arc<Interceptor>> {
        if !self.intercepts {
            return None;
        }
        let has_priority = |class: &Class| match api {
            Api::Unknown => false,
            Api::Probe | Api::Root => class.is_for_models() && class.interceptor.is_none(),
            _ => class.is_for_models(),
        };
        let mut classes = self.classes(host, path, headers);
        let first = classes.find(|class| has_priority(class) || class.interceptor.is_some());
        first.filter(|class| !has_priority(class))?.interceptor.as_ref()
    }

    /// Returns `true` if the proxy itself may answer requests without a route for this host: for addresses, which load
    /// balancers and kubelets use, and for hosts of model routes. For other names only while no route has a host, and
    /// not at `/`, where a client expects an application.
    pub fn answers(&self, host: &str, api: &Api) -> bool {
        let name = host_name(host);
        let claims_names = !self.exact.is_empty() || !self.wildcard.is_empty();
        is_address(name)
            || self.of_host(name).any(Class::is_for_models)
            || !(claims_names || *api == Api::Root)
    }

    /// Returns `true` if a route has this host, given without a port.
    pub fn names_host(&self, host: &str) -> bool {
        self.exact_host(host).is_some() || self.wildcard.iter().any(|(suffix, _)| ends_with(host, suffix))
    }

    /// Returns the classes that match a request, most specific first.
    fn classes(&self, host: &str, path: &str, headers: &HeaderMap) -> impl Iterator<Item = &Class> {
        self.of_host(host_name(host))
            .filter(move |class| is_below(path, &class.path) && rule::have(headers, &class.headers))
    }

    /// Returns the classes that match a host without its port, most specific first.
    fn of_host(&self, host: &str) -> impl Iterator<Item = &Class> {
        let exact = self.exact_host(host).into_iter();
        let wildcard = self
            .wildcard
            .iter()
            .filter(move |(suffix, _)| ends_with(host, suffix))
            .map(|(_, classes)| classes);
        exact.chain(wildcard).chain([&self.any]).flatten()
    }

    fn exact_host(&self, host: &str) -> Option<&Vec<Class>> {
        if self.exact.is_empty() {
            return None;
        }
        self.exact.get(host).or_else(|| self.exact.get(host.to_ascii_lowercase().as_str()))
    }

    /// Classifies a request path, including paths below a route's prefix.
    pub fn api(&self, method: &Method, path: &str) -> Api {
        match Api::of(method, path) {
            Api::Unknown => {
                let mounted = self.prefixes.iter().filter_map(|prefix| path.strip_prefix(&**prefix));
                mounted
                    .map(|rest| Api::of(method, rest))
                    .find(|api| *api != Api::Unknown)
                    .unwrap_or(Api::Unknown)
            }
            api => api,
        }
    }

    /// Returns all models that routes name, sorted.
    pub fn models(&self) -> &[Box<str>] {
        &self.models
    }

    /// Returns the model routes with their models; an empty list for routes that serve any model.
    pub fn listing(&self) -> impl Iterator<Item = (&Arc<Gate>, &[Box<str>])> {
        self.listing.iter().map(|(gate, names)| (gate, &**names))
    }

    /// Returns all routes.
    pub fn gates(&self) -> &[Arc<Gate>] {
        &self.gates
    }

    /// Returns the route that serves all models at this host, path and headers.
    pub fn only_route_at(&self, host: &str, path: &str, headers: &HeaderMap) -> Option<&Arc<Gate>> {
        match self.classes(host, path, headers).find(|class| class.is_for_models())?.gates()[..] {
            [gate] => Some(gate),
            _ => None,
        }
    }

    /// Returns a route by name.
    pub fn gate(&self, key: &RouteKey) -> Option<&Arc<Gate>> {
        self.gates.iter().find(|gate| gate.key() == key)
    }
}

fn insert_class(
    classes: &mut Vec<Class>,
    matcher: &Matcher,
    gate: &Arc<Gate>,
    interceptor: Option<&Arc<Interceptor>>,
) {
    let headers = rule::headers(matcher);
    let none = vec![String::new()];
    for path in if matcher.paths.is_empty() { &none } else { &matcher.paths } {
        let path = prefix(path);
        let place = classes.iter().position(|class| *class.path == *path && class.headers == headers);
        let place = place.unwrap_or_else(|| {
            classes.push(Class { path: path.into(), headers: headers.clone(), ..Class::default() });
            classes.len() - 1
        });
        let class = &mut classes[place];
        if let Some(interceptor) = interceptor {
            class.interceptor.get_or_insert_with(|| interceptor.clone());
            continue;
        }
        if matcher.models.is_empty() {
            class.any_model.get_or_insert_with(|| gate.clone());
        }
        for model in &matcher.models {
            class.by_model.entry(model.as_str().into()).or_insert_with(|| gate.clone());
        }
    }
}

// === impl Class ===

impl Class {
    fn is_for_models(&self) -> bool {
        self.any_model.is_some() || !self.by_model.is_empty()
    }

    /// Returns the distinct model routes.
    fn gates(&self) -> Vec<&Arc<Gate>> {
        let mut gates: Vec<_> = self.by_model.values().chain(&self.any_model).collect();
        gates.sort_by_key(|gate| Arc::as_ptr(gate));
        gates.dedup_by_key(|gate| Arc::as_ptr(gate));
        gates
    }
}

#[cfg(test)]
mod tests {
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

    fn find(
        table: &RouteTable,
        host: &str,
        path: &str,
        headers: &[(&str, &str)],
        model: Option<&str>,
    ) -> String {
        let headers = headers.iter().map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap())).collect();
        match table.find(host, path, &headers, Model::Read(model)) {
            Match::Route(gate) => gate.key().to_string(),
            Match::Interceptor(found) => found.key().to_owned(),
            Match::NeedsModel => "model?".into(),
            Match::Nothing => "-".into(),
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
            assert_eq!(
                find(&table, host, path, headers, model),
                route,
                "{host} {path} {headers:?} {model:?}"
            );
        }
        assert_eq!(
            table.models().iter().map(|model| &**model).collect::<Vec<_>>(),
            ["big", "tiny", "tiny-lora"]
        );
        assert!(matches!(table.api(&Method::POST, "/team/v1/embeddings"), Api::Work(_)));
        assert_eq!(table.api(&Method::POST, "/other/v1/embeddings"), Api::Unknown);
    }

    #[tokio::test]
    async fn names_that_no_route_claims_get_no_answer_of_ours() {
        let claiming = |hosts: &[&str]| table(&[("tiny", matcher(serde_json::json!({"hosts": hosts})))]);
        let apis = [Api::Models, Api::Model("tiny".into()), Api::Probe, Api::WrongMethod("POST"), Api::Root];
        for (routes, host, answers) in [
            (claiming(&["a.test", "*.b.test"]), "a.test:80", [true; 5]),
            (claiming(&["a.test", "*.b.test"]), "X.b.test", [true; 5]),
            (claiming(&["a.test", "*.b.test"]), "c.test", [false; 5]),
            // The proxy itself.
            (claiming(&["a.test"]), "10.0.0.7:8080", [true; 5]),
            (claiming(&["a.test"]), "[fd00::1]:8080", [true; 5]),
            (claiming(&["a.test"]), "localhost:8080", [true; 5]),
            (claiming(&[]), "c.test", [true; 5]),
            // The last route has gone.
            (table(&[]), "c.test", [true, true, true, true, false]),
            (table(&[]), "10.0.0.7", [true; 5]),
        ] {
            assert_eq!([0, 1, 2, 3, 4].map(|at| routes.answers(host, &apis[at])), answers, "{host}");
        }
    }

    #[tokio::test]
    async fn body_is_read_only_if_routing_needs_the_model() {
        let one = table(&[("all", Matcher::default())]);
        assert!(matches!(one.find("", "/v1/completions", &HeaderMap::new(), Model::Unread), Match::Route(_)));
        let two =
            table(&[("tiny", matcher(serde_json::json!({"models": ["tiny"]}))), ("all", Matcher::default())]);
        assert!(matches!(
            two.find("", "/v1/completions", &HeaderMap::new(), Model::Unread),
            Match::NeedsModel
        ));
        assert!(matches!(
            two.find("", "/v1/completions", &HeaderMap::new(), Model::Read(Some("x"))),
            Match::Route(gate) if gate.key().as_str() == "all"
        ));
    }
    #[tokio::test]
    async fn catch_all_gets_what_no_model_route_takes() {
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
            // Ours to answer, for a route for models that matches as well.
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
        // `/v1/models` and health checks that no application gets.
        for (host, is_ours) in [
            ("llm.example.com", true),
            ("10.0.0.7:8080", true),
            ("[::1]:8080", true),
            ("localhost", true),
            // There `tiny` matches any host.
            ("other", true),
            ("app.example.com", true),
        ] {
            assert_eq!(table.answers(host, &Api::Probe), is_ours, "{host}");
        }
        let chat = "/v1/chat/completions";
        assert!(matches!(table.api(&post, chat), Api::Work(_)));
        for (host, model, route) in [
            ("app.example.com", Model::Unread, "app"),
            ("llm.example.com", Model::Unread, "host"),
            ("other", Model::Unread, "model?"),
            ("other", Model::Read(Some("tiny")), "tiny"),
            ("other", Model::Read(Some("foreign")), "all"),
        ] {
            let found = match table.find(host, chat, &none, model) {
                Match::Route(gate) => gate.key().as_str(),
                Match::Interceptor(found) => found.key(),
                Match::NeedsModel => "model?",
                Match::Nothing => "-",
            };
            assert_eq!(found, route, "{host} {model:?}");
        }
        assert_eq!(table.models().len(), 1);
    }
}
