//! The client of the API server.

use std::{sync::Arc, time::Duration};

use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder, ConfigExt as _},
};

use super::Liveness;

/// How long an address may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may be silent before the kernel asks whether the peer is there, how often it asks, and after how
/// much time without an answer it gives up. Meant for logs, which may be silent for long; watches have bounds of their own.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const UNACKNOWLEDGED: Duration = Duration::from_secs(25);
/// How long a connection is kept for the next request: an older one may be half open.
const KEPT: Duration = Duration::from_secs(5);

/// A client that reports to `liveness`. Unlike kube's own, it does not wait out an API server that is overloaded: who asks
/// tries again, and says so.
pub(super) fn client(config: Config, liveness: &Arc<Liveness>) -> Result<Client, kube::Error> {
    if config.proxy_url.is_some() {
        // Which fails: kube is built without proxies.
        return Client::try_from(config);
    }
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_connect_timeout(Some(CONNECT_TIMEOUT));
    http.set_keepalive(Some(KEEPALIVE));
    http.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    #[cfg(target_os = "linux")]
    http.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let https = config.rustls_https_connector_with_connector(http)?;
    let sender = legacy::Client::builder(TokioExecutor::new())
        .pool_idle_timeout(KEPT)
        .pool_timer(TokioTimer::new())
        .build::<_, Body>(https);
    let namespace = config.default_namespace.clone();
    let builder =
        ClientBuilder::new(liveness.over(sender), namespace).with_layer(&config.extra_headers_layer()?);
    let base = config.base_uri_layer();
    Ok(match config.auth_layer()? {
        Some(auth) => builder.with_layer(&auth).with_layer(&base).build(),
        None => builder.with_layer(&base).build(),
    })
}
