//! Route lookup, compared with an implementation that checks every route and sorts.

use std::{cmp::Reverse, sync::Arc};

use anteroom::{
    admission::Gate,
    coldstart::ColdStarts,
    domain::{Intercept, Matcher, Policy, Route, Target},
    proxy::{RequestModel, RouteMatch, RouteTable},
};
use http::{HeaderMap, HeaderName, HeaderValue};

const MAX_WORDS: usize = 12;

/// Checks an input with a line for each route and each request, in words of the form `key=value,value`:
///
/// ```text
/// route models=tiny,big hosts=*.example.com paths=/team headers=x-team:red
/// front hosts=app.example.com present=x-any
/// ask host=a.example.com:80 path=/team/v1/completions headers=x-team:red model=tiny
/// ```
///
/// A `front` is the route of an `InterceptorRoute`.
pub fn holds(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let lines = |kinds: &'static [&'static str]| {
        let words = text.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        words.filter(move |words| words.first().is_some_and(|first| kinds.contains(first))).take(MAX_WORDS)
    };
    let routes: Vec<ExpectedRule> =
        lines(&["route", "front"]).map(|words| ExpectedRule::of(&words)).collect();
    let cold_starts = ColdStarts::new(|_| {});
    let table = RouteTable::new(routes.iter().enumerate().map(|(number, rule)| {
        let route = rule.route(number);
        let gate = Gate::new(route.name.clone(), Policy::default(), cold_starts.clone());
        (route, gate)
    }));
    for words in lines(&["ask"]) {
        let ask = RouteQuery::of(&words);
        let find = |model| match table.find(ask.host, ask.path, &ask.headers, model) {
            RouteMatch::Route(gate) => MatchResult::Route(gate.key().as_str().parse().expect("a number")),
            RouteMatch::Interceptor(found) => MatchResult::Front(found.key().parse().expect("a number")),
            RouteMatch::NeedsModel => MatchResult::NeedsModel,
            RouteMatch::Nothing => MatchResult::Nothing,
        };
        let models = || table.models().iter().map(|model| Some(&**model)).chain([ask.model, None]);
        for model in models() {
            assert_eq!(find(RequestModel::Read(model)), expected(&routes, &ask, model), "{ask:?} {model:?}");
        }
        let unread = find(RequestModel::Unread);
        let same = models().all(|model| find(RequestModel::Read(model)) == unread);
        assert!(
            same || unread == MatchResult::NeedsModel,
            "{ask:?} is decided, though it depends on the model"
        );
        if unread == MatchResult::NeedsModel {
            let some = models()
                .flatten()
                .any(|model| matches!(find(RequestModel::Read(Some(model))), MatchResult::Route(_)));
            assert!(some, "the body of {ask:?} is read although its model does not matter");
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MatchResult {
    Route(usize),
    Front(usize),
    NeedsModel,
    Nothing,
}

struct ExpectedRule {
    matcher: Matcher,
    front: bool,
}

#[derive(Debug)]
struct RouteQuery<'a> {
    host: &'a str,
    path: &'a str,
    headers: HeaderMap,
    model: Option<&'a str>,
}

/// Returns the first match after sorting: by host, path and headers, then a route for this model before one for any
/// model before a front, then in the order of the routes.
fn expected(routes: &[ExpectedRule], ask: &RouteQuery<'_>, model: Option<&str>) -> MatchResult {
    let mut matching = Vec::new();
    for (number, rule) in routes.iter().enumerate() {
        let Some(kind) = rule.kind(model) else { continue };
        for (host, path) in rule.host_path_pairs() {
            if !is_host(ask.host, host) || !is_below(ask.path, path) || !rule.has(&ask.headers) {
                continue;
            }
            let exact = rule.matcher.headers.len();
            let names = exact + rule.matcher.present.len();
            // Different headers of equal weight: in the order of the first route with these headers at this host and
            // path.
            let is_same = |other: &ExpectedRule| {
                other.matcher.headers == rule.matcher.headers
                    && other.matcher.present == rule.matcher.present
                    && other
                        .host_path_pairs()
                        .any(|(one, two)| plain_host(one) == plain_host(host) && prefix(two) == prefix(path))
            };
            let first = routes.iter().position(is_same);
            let weight = Reverse((host_weight(host), prefix(path).len(), names, exact));
            matching.push((weight, first, kind, number));
        }
    }
    matching.sort();
    match matching.first() {
        None => MatchResult::Nothing,
        Some((_, _, RuleKind::Front, number)) => MatchResult::Front(*number),
        Some((_, _, _, number)) => MatchResult::Route(*number),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum RuleKind {
    ThisModel,
    AnyModel,
    Front,
}

// === impl ExpectedRule ===

impl ExpectedRule {
    fn of(words: &[&str]) -> Self {
        let mut matcher = Matcher::default();
        let front = words[0] == "front";
        for (key, value) in pairs(words) {
            let values = || value.split(',').take(4).map(str::to_owned);
            match key {
                "models" if !front => matcher.models = values().collect(),
                "hosts" => matcher.hosts = values().collect(),
                "paths" => matcher.paths = values().collect(),
                // As in the configuration: only valid header names and values.
                "headers" => {
                    matcher.headers = values().filter_map(|field| parse_header_field(&field)).collect()
                }
                "present" if front => {
                    let names = values().filter_map(|name| parse_header_field(&format!("{name}:")));
                    matcher.present = names.map(|(name, _)| name).collect();
                }
                _ => {}
            }
        }
        Self { matcher, front }
    }

    fn route(&self, number: usize) -> Route {
        let target = Target::Url("http://127.0.0.1:1".into());
        let route: Route = serde_json::from_value(serde_json::json!({
            "name": number.to_string(), "target": target,
        }))
        .expect("a route");
        if self.front {
            let rules = vec![self.matcher.clone()];
            Route { intercept: Some(Arc::new(Intercept { rules, ..Intercept::default() })), ..route }
        } else {
            Route { matcher: self.matcher.clone(), ..route }
        }
    }

    fn kind(&self, model: Option<&str>) -> Option<RuleKind> {
        match () {
            () if self.front => Some(RuleKind::Front),
            () if self.matcher.models.is_empty() => Some(RuleKind::AnyModel),
            () => {
                self.matcher.models.iter().any(|known| Some(&**known) == model).then_some(RuleKind::ThisModel)
            }
        }
    }

    /// Returns all pairs of host and path; `*` is any host and the empty path any path.
    fn host_path_pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        let hosts = choices(&self.matcher.hosts, "*");
        hosts.flat_map(|host| choices(&self.matcher.paths, "").map(move |path| (host, path)))
    }

    fn has(&self, headers: &HeaderMap) -> bool {
        let has = |name: &str, value: Option<&str>| {
            headers.iter().any(|(known, given)| known == name && value.is_none_or(|value| given == value))
        };
        self.matcher.headers.iter().all(|(name, value)| has(name, Some(value)))
            && self.matcher.present.iter().all(|name| has(name, None))
    }
}

fn choices<'a>(texts: &'a [String], any: &'static str) -> impl Iterator<Item = &'a str> {
    let any = texts.is_empty().then_some(any);
    any.into_iter().chain(texts.iter().map(String::as_str))
}

// === impl RouteQuery ===

impl<'a> RouteQuery<'a> {
    fn of(words: &[&'a str]) -> Self {
        let mut ask = Self { host: "", path: "/", headers: HeaderMap::new(), model: None };
        for (key, value) in pairs(words) {
            match key {
                "host" => ask.host = value,
                "path" => ask.path = value,
                "model" => ask.model = Some(value),
                "headers" => {
                    for (name, value) in value.split(',').filter_map(parse_header_field) {
                        let name = name.parse::<HeaderName>().expect("it is one");
                        ask.headers.append(name, value.parse().expect("it is one"));
                    }
                }
                _ => {}
            }
        }
        ask
    }
}

fn pairs<'a>(words: &[&'a str]) -> impl Iterator<Item = (&'a str, &'a str)> {
    words.iter().skip(1).filter_map(|word| word.split_once('='))
}

/// Parses a header field, if valid; its name in lower case, as names are case-insensitive.
fn parse_header_field(field: &str) -> Option<(String, String)> {
    let (name, value) = field.split_once(':')?;
    let name: HeaderName = name.parse().ok()?;
    value.parse::<HeaderValue>().ok()?;
    Some((name.as_str().to_owned(), value.to_owned()))
}

fn plain_host(host: &str) -> String {
    host.to_ascii_lowercase()
}

fn is_host(given: &str, wanted: &str) -> bool {
    // The port follows the last colon, unless that is inside brackets.
    let given = match given.rfind(':') {
        Some(colon) if !given[colon..].contains(']') => &given[..colon],
        _ => given,
    };
    let (given, wanted) = (given.to_ascii_lowercase(), wanted.to_ascii_lowercase());
    match wanted.strip_prefix('*') {
        Some("") => true,
        Some(suffix) => given != suffix && given.ends_with(suffix),
        None => given == wanted,
    }
}

/// Returns the weight of a host pattern: exact hosts, then suffixes by length, then any host.
fn host_weight(host: &str) -> usize {
    match host.strip_prefix('*') {
        Some(suffix) => suffix.len(),
        None => usize::MAX,
    }
}

fn prefix(path: &str) -> &str {
    path.trim_end_matches('/')
}

fn is_below(path: &str, wanted: &str) -> bool {
    path == prefix(wanted) || path.starts_with(&format!("{}/", prefix(wanted)))
}
