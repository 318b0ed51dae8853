//! A fake cluster whose pods are set by the test, behind the real proxy.

use std::{net::SocketAddr, sync::Arc};

use anteroom::{
    config::Config,
    domain::{ClusterTarget, EndpointSource, Intercept, Role, Roles, ServicePort, Target},
    scaler,
    state::{Discovered, DiscoveredEndpoint, Discovery, Protocol},
};
use tokio::sync::watch;

use super::{
    TestProxy,
    proxy::{options, parse},
    route, routes,
};

/// State of a pod.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum FakePodState {
    Ready,
    NotReady,
    Terminating,
    /// The pod has terminated.
    Dead,
}

#[derive(Clone)]
pub struct FakeCluster {
    pods: watch::Sender<Arc<Discovered>>,
    protocol: Protocol,
    roles: Roles,
}

impl FakeCluster {
    pub fn speaking(protocol: Protocol) -> Self {
        Self { pods: watch::Sender::default(), protocol, roles: Roles::default() }
    }

    /// Creates a cluster whose target has pods of several roles.
    pub fn with_roles(roles: Roles) -> Self {
        Self { roles, ..Self::speaking(Protocol::Http1) }
    }

    /// Starts the proxy in front of the cluster, with `tiny` as its only route.
    pub async fn proxy(&self, gateway: Option<String>, more: &str) -> TestProxy {
        self.proxy_with(gateway, more, "").await
    }

    /// Like [`Self::proxy`], with these keys at the top of the file.
    pub async fn proxy_with(&self, gateway: Option<String>, more: &str, top: &str) -> TestProxy {
        let file = routes(&[route("tiny", "http://replaced", more)]);
        self.start(parse(&format!("{top}{file}")), gateway).await
    }

    /// Starts the proxy in front of the cluster, with a route that serves anything.
    pub async fn intercepting(&self, intercept: Arc<Intercept>) -> TestProxy {
        let mut config = parse(&routes(&[route("tiny", "http://replaced", "match: {}")]));
        config.routes[0].intercept = Some(intercept);
        self.start(config, None).await
    }

    async fn start(&self, mut config: Config, gateway: Option<String>) -> TestProxy {
        config.routes[0].target = Target::Cluster(ClusterTarget {
            namespace: "ml".into(),
            source: EndpointSource::Service { name: "tiny".into(), port: ServicePort::Number(80) },
            gateway,
            roles: self.roles.clone(),
        });
        let options = scaler::Options { discovery: Arc::new(self.clone()), ..options() };
        TestProxy::start_with(config, options).await
    }

    pub fn publish_pods(&self, pods: &[(SocketAddr, FakePodState)]) {
        let pods: Vec<_> = pods.iter().map(|(address, pod)| (*address, *pod, Role::default())).collect();
        self.publish_pods_with_roles(&pods);
    }

    pub fn publish_pods_with_roles(&self, pods: &[(SocketAddr, FakePodState, Role)]) {
        let is_dead = |(_, pod, _): &&(SocketAddr, FakePodState, Role)| *pod == FakePodState::Dead;
        let dead = pods.iter().filter(is_dead).map(|(address, ..)| address.to_string().into()).collect();
        let endpoints =
            pods.iter().filter(|pod| !is_dead(pod)).map(|(address, pod, role)| DiscoveredEndpoint {
                address: address.to_string().into(),
                protocol: self.protocol,
                ready: *pod == FakePodState::Ready,
                terminating: *pod == FakePodState::Terminating,
                role: *role,
                ..DiscoveredEndpoint::default()
            });
        let endpoints = endpoints.collect();
        let discovered = Discovered { is_synced: true, endpoints, dead, ..Discovered::default() };
        self.pods.send_replace(Arc::new(discovered));
    }
}

impl Discovery for FakeCluster {
    fn watch(&self, _: &ClusterTarget) -> watch::Receiver<Arc<Discovered>> {
        self.pods.subscribe()
    }
}
