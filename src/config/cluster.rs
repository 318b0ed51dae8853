//! What the configuration says of KEDA, of a Kubernetes cluster, and of other replicas.

use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::Period;

/// TLS for the scaler: PEM files, read again when they change.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScalerTls {
    /// The certificate chain that we show.
    pub cert: String,
    /// Its private key.
    pub key: String,
    /// The authorities whose certificates clients must show. Without it, anybody who reaches the port may ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<String>,
}

/// Other replicas of this proxy. Each answers a scaler for all of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Peers {
    /// The address at which other replicas ask for our demand. For them alone: it tells what is asked of which route.
    #[schemars(extend("format" = "ip:port"))]
    pub listen: SocketAddr,
    /// `name:port` that resolves to every replica, such as a headless Service. Asked again every few seconds.
    pub service: String,
    /// A file with the token that replicas show each other, the same for all; read again as it changes. Without it, anybody who
    /// reaches `listen` may follow us. In this release, a replica that shows none is accepted, with a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<String>,
    /// How long the last word of a silent replica counts.
    #[serde(default = "Peers::default_timeout")]
    pub timeout: Period,
    /// How long the requests that a silent replica had last still count while `service` lists it: it may be up with them, and
    /// only be out of reach.
    #[serde(default = "Peers::default_unreachable_timeout")]
    pub unreachable_timeout: Period,
}

/// The cluster that is watched. An empty mapping, `kubernetes: {}`, is enough.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Kubernetes {
    /// The namespaces whose routes are served. Empty: all.
    pub namespaces: Vec<String>,
    /// Whether `ModelRoute` objects are served.
    pub model_routes: bool,
    /// Whether `InterceptorRoute` objects of KEDA's HTTP Add-on are served.
    pub interceptor_routes: bool,
    /// Hosts that `url` and `gateway` of cluster routes may name: names, `*.example.com` for every name below it,
    /// addresses; with `:port`, that port alone. Empty: none, since who may write routes could send requests anywhere.
    pub allowed_hosts: Vec<String>,
    /// Whether the logs of pods that start are read until they are ready: vLLM writes there what it is at. Takes the
    /// right to get `pods/log`.
    pub pod_logs: bool,
    /// Whether sessions are ended (`anteroom session`). Takes the right to patch ScaledObjects; without it, nobody pauses them
    /// again.
    pub sessions: bool,
}

// === impl Peers ===

impl Peers {
    fn default_timeout() -> Period {
        Period::from_secs(10)
    }

    fn default_unreachable_timeout() -> Period {
        Period::from_secs(5 * 60)
    }
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            namespaces: Vec::new(),
            model_routes: true,
            interceptor_routes: true,
            allowed_hosts: Vec::new(),
            pod_logs: false,
            sessions: true,
        }
    }
}
