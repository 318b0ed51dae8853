//! What the configuration says of web pages of other origins.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Web pages of other origins. A request of one that is not listed is refused with 403, whether a browser asks first or
/// not; of one that is, preflights are answered here and the page may read the answers. While `listen` is a loopback
/// address this holds without the key, too, as for an empty list: any web page can send requests there. On another address
/// it holds once the key is there, `cors: {}` at least.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Cors {
    /// Origins whose pages may send requests, to `listen` and to `admin`: `https://chat.example.com`,
    /// `http://localhost:3000`; `*` for all. Pages that came from where they send to need no entry.
    pub origins: Vec<String>,
}
