//! Builds the client of the API server.

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

/// Timeout per address.
const API_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// TCP keepalive: idle time before the first probe, interval of probes, and time without acknowledgement before the
/// kernel closes the connection. Relevant for log streams, which may be idle for long; watches have their own limits.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const API_TCP_USER_TIMEOUT: Duration = Duration::from_secs(25);
/// Idle time after which a pooled connection is not reused: it may be half open.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Builds a client that reports to `liveness`. Unlike the default client of kube, it does not retry on an overloaded
/// API server: callers retry, and report the failure.
pub(super) fn client(config: Config, liveness: &Arc<Liveness>) -> Result<Client, kube::Error> {
    if config.proxy_url.is_some() {
        // `try_from` returns the error: kube is built without proxy support.
        return Client::try_from(config);
    }
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_connect_timeout(Some(API_CONNECT_TIMEOUT));
    http.set_keepalive(Some(KEEPALIVE_IDLE));
    http.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    #[cfg(target_os = "linux")]
    http.set_tcp_user_timeout(Some(API_TCP_USER_TIMEOUT));
    let https = config.rustls_https_connector_with_connector(http)?;
    let sender = legacy::Client::builder(TokioExecutor::new())
        .pool_idle_timeout(POOL_IDLE_TIMEOUT)
        .pool_timer(TokioTimer::new())
        .build::<_, Body>(https);
    let namespace = config.default_namespace.clone();
    let builder = ClientBuilder::new(liveness.wrap_service(sender), namespace)
        .with_layer(&config.extra_headers_layer()?);
    let base = config.base_uri_layer();
    Ok(match config.auth_layer()? {
        Some(auth) => builder.with_layer(&auth).with_layer(&base).build(),
        None => builder.with_layer(&base).build(),
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;

    use super::*;

    #[tokio::test]
    async fn client_lists_over_a_connection() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = Config::new(format!("http://{}", listener.local_addr().unwrap()).parse().unwrap());
        let empty = r#"{ "kind": "List", "apiVersion": "v1", "metadata": {}, "items": [] }"#;
        let server = axum::Router::new().fallback(async move || empty);
        tokio::spawn(async move { axum::serve(listener, server).await });
        let pods = kube::Api::<Pod>::namespaced(client(config, &Arc::default()).unwrap(), "ml");
        assert!(pods.list(&Default::default()).await.unwrap().items.is_empty());
    }
}
