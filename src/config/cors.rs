//! Settings for web pages of other origins.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Web pages of other origins. Requests from origins that are not listed get 403; pages of listed ones may read
/// responses. Enforced while `listen` is a loopback address, and on other addresses once the key is set, at least as
/// `cors: {}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Cors {
    /// Origins whose pages may send requests to `listen` and `admin`: `https://chat.example.com`,
    /// `http://localhost:3000`; `*` for all. Same-origin pages need no entry.
    pub origins: Vec<String>,
}
