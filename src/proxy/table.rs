//! Route matching by host, path, headers, then model. More specific routes take precedence.

use std::{borrow::Borrow, cmp::Reverse, collections::HashMap, sync::Arc};

use http::{HeaderMap, Method};

use super::{
    interceptor::route::Interceptor,
    rule::{self, Headers, ends_with, host_name, is_address, is_below, normalize_prefix},
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
    /// True if any route is an [`Interceptor`].
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
pub enum RequestModel<'a> {
    /// The body has not been read.
    Unread,
    /// The body has been read; `None` if it has no model.
    Read(Option<&'a str>),
}

/// Result of a lookup.
pub enum RouteMatch<'a> {
    /// A model route.
    Route(&'a Arc<Gate>),
    /// A route that proxies any HTTP application.
    Interceptor(&'a Arc<Interceptor>),
    /// The route depends on the model: read the body and look up again.
    NeedsModel,
    /// No route.
    Nothing,
}

/// Result of a lookup for a request without a model.
pub enum NoModelMatch<'a> {
    /// A model route.
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
                table.prefixes.extend(route.matcher.paths.iter().map(|path| normalize_prefix(path).into()));
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
    pub fn find(
        &self,
        host: &str,
        path: &str,
        headers: &HeaderMap,
        model: RequestModel<'_>,
    ) -> RouteMatch<'_> {
        for class in self.classes(host, path, headers) {
            if !class.by_model.is_empty() {
                let RequestModel::Read(model) = model else { return RouteMatch::NeedsModel };
                if let Some(gate) = model.and_then(|model| class.by_model.get(model)) {
                    return RouteMatch::Route(gate);
                }
            }
            if let Some(gate) = &class.any_model {
                return RouteMatch::Route(gate);
            }
            if let Some(interceptor) = &class.interceptor {
                return RouteMatch::Interceptor(interceptor);
            }
        }
        RouteMatch::Nothing
    }

    /// Finds the route of a request that is for a model server but has no model. Of the most specific routes, takes the
    /// only one, else the only one that is up, else the one for any model if it is up.
    pub fn unnamed(&self, host: &str, path: &str, headers: &HeaderMap) -> NoModelMatch<'_> {
        let Some(class) = self.class_for_models(host, path, headers) else { return NoModelMatch::Nothing };
        let gates = class.gates();
        if let [gate] = gates[..] {
            return NoModelMatch::Route(gate);
        }
        let mut up = gates.iter().filter(|gate| gate.target().is_up());
        match (up.next(), up.next()) {
            (None, _) => NoModelMatch::NothingUp,
            (Some(gate), None) => NoModelMatch::Route(gate),
            _ => match class.any_model.as_ref().filter(|gate| gate.target().is_up()) {
                Some(gate) => NoModelMatch::Route(gate),
                None => NoModelMatch::Several,
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
        self.of_host(host_name(host)).filter(move |class| {
            is_below(path, &class.path) && rule::has_required_headers(headers, &class.headers)
        })
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
    let headers = rule::required_headers(matcher);
    let none = vec![String::new()];
    for path in if matcher.paths.is_empty() { &none } else { &matcher.paths } {
        let path = normalize_prefix(path);
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
mod tests;
