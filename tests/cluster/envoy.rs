//! Envoy as the gateway between Anteroom and the pods of a Service.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::process::Command;

use crate::{client, plane::daemon::Daemon, scenario::Scenario};

const HTTP: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";

/// Running Envoy. Dropping it stops it.
pub(crate) struct Envoy {
    pub(crate) address: SocketAddr,
    _daemon: Daemon,
}

// === impl Envoy ===

impl Envoy {
    /// Starts Envoy at an address of the scenario, port 10000, in front of port 8000 of the pods of a Service; waits
    /// until it is ready.
    pub(crate) async fn start(it: &Scenario, number: u8, service: &str) -> Self {
        let (address, admin) = (it.socket(number, 10000), it.socket(number, 9901));
        let name = format!("{}.envoy-{number}", it.namespace);
        let folders = &it.world.plane.folders;
        let file = folders.run.join(format!("{name}.json"));
        let host = format!("{service}.{}.svc.cluster.local", it.namespace);
        std::fs::write(&file, config(address, admin, &host).to_string()).unwrap();
        let program =
            it.world.ground.programs.get("envoy").expect("ANTEROOM_ENVOY says where Envoy is").clone();
        let mut daemon = Daemon::new(&name, &folders.logs, move || {
            let mut command = Command::new(&program);
            command.arg("--config-path").arg(&file).args(["--concurrency", "1", "--disable-hot-restart"]);
            command
        });
        daemon.start();
        daemon
            .ready(async || match client::get(admin, "/ready").await?.status.as_u16() {
                200 => Ok(()),
                status => Err(format!("/ready answers {status}")),
            })
            .await;
        Self { address, _daemon: daemon }
    }
}

/// Same settings as `deploy/examples/envoy.yaml`: no buffering, retries or timeouts.
fn config(address: SocketAddr, admin: SocketAddr, host: &str) -> Value {
    let at = |address: SocketAddr| json!({ "socket_address": { "address": address.ip(), "port_value": address.port() } });
    let endpoint = json!({ "socket_address": { "address": host, "port_value": 8000 } });
    json!({
        "admin": { "address": at(admin) },
        "static_resources": {
            "listeners": [{
                "name": "openai",
                "address": at(address),
                "filter_chains": [{ "filters": [{
                    "name": "envoy.filters.network.http_connection_manager",
                    "typed_config": {
                        "@type": HTTP,
                        "stat_prefix": "openai",
                        "route_config": { "virtual_hosts": [{
                            "name": "openai",
                            "domains": ["*"],
                            "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": "pods", "timeout": "0s" } }],
                        }] },
                        "http_filters": [{ "name": "envoy.filters.http.router", "typed_config": { "@type": ROUTER } }],
                    },
                }] }],
            }],
            "clusters": [{
                "name": "pods",
                "type": "STRICT_DNS",
                "dns_refresh_rate": "1s",
                "dns_failure_refresh_rate": { "base_interval": "0.5s", "max_interval": "1s" },
                "respect_dns_ttl": false,
                "dns_lookup_family": "V4_ONLY",
                "connect_timeout": "2s",
                "lb_policy": "LEAST_REQUEST",
                "common_lb_config": { "healthy_panic_threshold": { "value": 0 } },
                "health_checks": [{
                    "http_health_check": { "path": "/health" },
                    "timeout": "2s",
                    "interval": "2s",
                    "no_traffic_interval": "1s",
                    "healthy_threshold": 1,
                    "unhealthy_threshold": 3,
                }],
                "ignore_health_on_host_removal": true,
                "load_assignment": {
                    "cluster_name": "pods",
                    "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": endpoint } }] }],
                },
            }],
        },
    })
}
