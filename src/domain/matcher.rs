//! Conditions of a route.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Conditions that a request must meet; all of those given must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Matcher {
    /// Model names, including LoRA adapters and aliases. Empty: any model, and the body is not parsed.
    pub models: Vec<String>,
    /// Host names without a port; `*.example.com` matches all of its subdomains. Empty: any host.
    pub hosts: Vec<String>,
    /// Path prefixes in whole segments: `/a` matches `/a/v1/models`, not `/ab`. Empty: any path.
    pub paths: Vec<String>,
    /// Header names, each with the exact value required.
    pub headers: BTreeMap<String, String>,
    /// Headers required with any value; only rules of an `InterceptorRoute` have them.
    #[serde(skip)]
    pub present: BTreeSet<String>,
}
