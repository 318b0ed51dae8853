//! Settings for KEDA, the Kubernetes cluster and other replicas.

use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::Period;

/// TLS of the scaler: PEM files, reloaded when they change.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScalerTls {
    /// Certificate chain of the server.
    pub cert: String,
    /// Private key of the certificate.
    pub key: String,
    /// Certificate authorities of client certificates. Default: clients are not authenticated, so anything that reaches
    /// the port may query it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<String>,
}

/// Other replicas of this proxy. Each reports the demand of all of them to the scaler.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Peers {
    /// Address from which other replicas read the demand of this one. Keep it from others.
    #[schemars(extend("format" = "ip:port"))]
    pub listen: SocketAddr,
    /// `name:port` that resolves to every replica, such as a headless Service.
    pub service: String,
    /// File with the token shared by all replicas; reloaded when it changes. Without it, anything that reaches `listen`
    /// may read the demand. In this release, a replica without a token is accepted with a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<String>,
    /// Time that the last report of a silent replica counts.
    #[serde(default = "Peers::default_timeout")]
    pub timeout: Period,
    /// Time that the last known requests of a silent replica count while `service` still lists it.
    #[serde(default = "Peers::default_unreachable_timeout")]
    pub unreachable_timeout: Period,
}

/// The cluster to watch; `kubernetes: {}` is enough.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Kubernetes {
    /// Namespaces whose routes are served. Empty: all.
    pub namespaces: Vec<String>,
    /// Serve `ModelRoute` objects.
    pub model_routes: bool,
    /// Serve `InterceptorRoute` objects of KEDA's HTTP Add-on.
    pub interceptor_routes: bool,
    /// Hosts that `url` and `gateway` of cluster routes may name: names, addresses, or `*.example.com` for all
    /// subdomains; with `:port`, only that port. Empty: none.
    pub allowed_hosts: Vec<String>,
    /// Read the logs of starting pods until they are ready, for vLLM's loading progress. Needs permission to get
    /// `pods/log`.
    pub pod_logs: bool,
    /// End expired sessions (`anteroom session`). Needs permission to patch ScaledObjects; if false, nothing pauses
    /// them again.
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
