//! A route that proxies any HTTP application, and its static responses.

use std::sync::Arc;

use http::HeaderMap;

use crate::{
    admission::Gate,
    domain::{Intercept, StaticRoute},
    proxy::rule::Rule,
};

/// A route that proxies any HTTP application.
pub struct Interceptor {
    pub(super) gate: Arc<Gate>,
    pub(super) config: Arc<Intercept>,
    /// Rules of `config.static_routes`, in the same order.
    statics: Vec<Vec<Rule>>,
}

// === impl Interceptor ===

impl Interceptor {
    pub(in crate::proxy) fn new(gate: &Arc<Gate>, config: &Arc<Intercept>) -> Arc<Self> {
        let rules = |route: &StaticRoute| route.rules.iter().map(Rule::new).collect();
        let statics = config.static_routes.iter().map(rules).collect();
        Arc::new(Self { gate: gate.clone(), config: config.clone(), statics })
    }

    /// Returns the name of the route.
    pub fn key(&self) -> &str {
        self.gate.key().as_str()
    }

    pub(super) fn static_route(&self, host: &str, path: &str, headers: &HeaderMap) -> Option<&StaticRoute> {
        let holds = |rules: &Vec<Rule>| rules.iter().any(|rule| rule.matches_request(host, path, headers));
        self.statics.iter().position(holds).and_then(|place| self.config.static_routes.get(place))
    }
}
