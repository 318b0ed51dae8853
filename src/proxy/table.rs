//! Which route a request belongs to: host, path, headers, then model; the more specific first.

use std::{cmp::Reverse, collections::HashMap, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Method};

use crate::{
    admission::Gate,
    domain::{Matcher, Route, RouteKey},
    openai::Api,
};

/// The routes, arranged for looking up. Rebuilt on reload, read by every request.
#[derive(Default)]
pub struct RouteTable {
    exact: HashMap<Box<str>, Vec<Class>>,
    /// Suffixes with their leading dot, the longest first.
    wildcard: Vec<(Box<str>, Vec<Class>)>,
    any: Vec<Class>,
    /// Path prefixes under which the API may be mounted.
    prefixes: Vec<Box<str>>,
    models: Vec<Box<str>>,
    gates: Vec<Arc<Gate>>,
}

/// The routes that differ in nothing but their models.
#[derive(Default)]
struct Class {
    path: Box<str>,
    headers: Vec<(HeaderName, HeaderValue)>,
    by_model: HashMap<Box<str>, Arc<Gate>>,
    any_model: Option<Arc<Gate>>,
}

/// What is known of the model that a request names.
#[derive(Clone, Copy, Debug)]
pub enum Model<'a> {
    /// The body has not been read.
    Unread,
    /// The body names this one, or none.
    Read(Option<&'a str>),
}

/// What a look-up finds.
pub enum Match<'a> {
    /// The route.
    Route(&'a Arc<Gate>),
    /// That depends on the model: read the body and ask again.
    NeedsModel,
    /// No route.
    Nothing,
}

// === impl RouteTable ===

impl RouteTable {
    /// Arranges routes. Of two that match the same, the first wins; the configuration has refused that before.
    pub fn new(routes: impl IntoIterator<Item = (Route, Arc<Gate>)>) -> Self {
        let mut table = Self::default();
        for (route, gate) in routes {
            for matcher in route.matchers() {
                table.models.extend(matcher.models.iter().map(|model| model.as_str().into()));
                table.prefixes.extend(matcher.paths.iter().map(|path| prefix(path).into()));
                table.insert(matcher, &gate);
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
            classes.sort_by_key(|class| (Reverse(class.path.len()), Reverse(class.headers.len())));
        }
        table
    }

    fn insert(&mut self, matcher: &Matcher, gate: &Arc<Gate>) {
        let hosts: Vec<_> = matcher.hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        if hosts.is_empty() {
            insert_class(&mut self.any, matcher, gate);
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
            insert_class(classes, matcher, gate);
        }
    }

    /// Which route a request belongs to.
    pub fn find(&self, host: &str, path: &str, headers: &HeaderMap, model: Model<'_>) -> Match<'_> {
        let host = host_name(host);
        let exact = self.exact_host(host).into_iter();
        let wildcard =
            self.wildcard.iter().filter(|(suffix, _)| ends_with(host, suffix)).map(|(_, classes)| classes);
        let classes = exact.chain(wildcard).chain([&self.any]).flatten();
        for class in classes.filter(|class| class.holds(path, headers)) {
            if class.by_model.is_empty() {
                if let Some(gate) = &class.any_model {
                    return Match::Route(gate);
                }
                continue;
            }
            let Model::Read(model) = model else { return Match::NeedsModel };
            if let Some(gate) = model.and_then(|model| class.by_model.get(model)).or(class.any_model.as_ref())
            {
                return Match::Route(gate);
            }
        }
        Match::Nothing
    }

    fn exact_host(&self, host: &str) -> Option<&Vec<Class>> {
        if self.exact.is_empty() {
            return None;
        }
        self.exact.get(host).or_else(|| self.exact.get(host.to_ascii_lowercase().as_str()))
    }

    /// What a request asks for, also where the API is mounted below a route's path prefix.
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

    /// Every model that a route names, sorted.
    pub fn models(&self) -> &[Box<str>] {
        &self.models
    }

    /// Every route.
    pub fn gates(&self) -> &[Arc<Gate>] {
        &self.gates
    }

    /// The route of this name.
    pub fn gate(&self, key: &RouteKey) -> Option<&Arc<Gate>> {
        self.gates.iter().find(|gate| gate.key() == key)
    }
}

fn insert_class(classes: &mut Vec<Class>, matcher: &Matcher, gate: &Arc<Gate>) {
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (name, value) in &matcher.headers {
        // The configuration has checked both.
        if let (Ok(name), Ok(value)) = (name.parse(), value.parse()) {
            headers.push((name, value));
        }
    }
    headers.sort_by(|a, b| a.0.as_str().cmp(b.0.as_str()));
    let none = vec![String::new()];
    for path in if matcher.paths.is_empty() { &none } else { &matcher.paths } {
        let path = prefix(path);
        let place = classes.iter().position(|class| *class.path == *path && class.headers == headers);
        let place = place.unwrap_or_else(|| {
            classes.push(Class { path: path.into(), headers: headers.clone(), ..Class::default() });
            classes.len() - 1
        });
        let class = &mut classes[place];
        if matcher.models.is_empty() {
            class.any_model.get_or_insert_with(|| gate.clone());
        }
        for model in &matcher.models {
            class.by_model.entry(model.as_str().into()).or_insert_with(|| gate.clone());
        }
    }
}

/// `/a/` and `/a` are the same prefix, and `/` is none.
fn prefix(path: &str) -> &str {
    path.trim_end_matches('/')
}

/// The host without its port.
fn host_name(host: &str) -> &str {
    match host.rfind([':', ']']) {
        Some(at) if host.as_bytes()[at] == b':' => &host[..at],
        _ => host,
    }
}

fn ends_with(host: &str, suffix: &str) -> bool {
    host.len() > suffix.len()
        && host.get(host.len() - suffix.len()..).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
}

// === impl Class ===

impl Class {
    fn holds(&self, path: &str, headers: &HeaderMap) -> bool {
        let rest = path.strip_prefix(&*self.path);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            && self
                .headers
                .iter()
                .all(|(name, value)| headers.get_all(name).iter().any(|given| given == value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{coldstart::ColdStarts, domain::Policy};

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
            Match::NeedsModel => "model?".into(),
            Match::Nothing => "-".into(),
        }
    }

    #[tokio::test]
    async fn the_more_specific_route_goes_first_and_a_foreign_model_falls_through() {
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
    async fn a_body_is_read_only_where_a_route_asks_for_the_model() {
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
}
