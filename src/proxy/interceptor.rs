//! Routes that proxy any HTTP application, as the KEDA HTTP Add-on's interceptor does.

mod handler;
mod request;

use std::sync::Arc;

use http::HeaderMap;

pub(super) use self::request::InterceptedRequest;
use super::rule::Rule;
use crate::{
    admission::Gate,
    domain::{Intercept, StaticRoute},
};

/// A route that serves anything, prepared for requests.
pub struct Interceptor {
    gate: Arc<Gate>,
    asks: Arc<Intercept>,
    /// Of the static routes, in their order.
    statics: Vec<Vec<Rule>>,
}

// === impl Interceptor ===

impl Interceptor {
    pub(super) fn new(gate: &Arc<Gate>, asks: &Arc<Intercept>) -> Arc<Self> {
        let rules = |route: &StaticRoute| route.rules.iter().map(Rule::new).collect();
        let statics = asks.static_routes.iter().map(rules).collect();
        Arc::new(Self { gate: gate.clone(), asks: asks.clone(), statics })
    }

    /// The name of its route.
    pub fn key(&self) -> &str {
        self.gate.key().as_str()
    }

    fn static_route(&self, host: &str, path: &str, headers: &HeaderMap) -> Option<&StaticRoute> {
        let holds = |rules: &Vec<Rule>| rules.iter().any(|rule| rule.holds(host, path, headers));
        self.statics.iter().position(holds).and_then(|place| self.asks.static_routes.get(place))
    }
}
