//! The complete proxy in this process: on free ports, with its threads.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anteroom::{
    admission::Gate,
    app::{Account, BoundProxy, Command},
    config::Config,
    domain::{Intercept, Matcher},
    drain::StopSignal,
    proxy::Shared,
    scaler,
};
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    soon, until,
    wire::{Wire, WireResponse},
};

pub struct TestProxy {
    pub address: SocketAddr,
    pub admin: SocketAddr,
    pub scaler: Option<SocketAddr>,
    pub peers: Option<SocketAddr>,
    pub commands: mpsc::Sender<Command>,
    pub shared: Arc<Shared>,
    running: JoinHandle<Account>,
}

/// Returns the YAML of a route `name` for the model of the same name, with further keys in flow style.
pub fn route(name: &str, url: &str, more: &str) -> String {
    let more =
        if more.contains("match:") { more.into() } else { format!("match: {{ models: [{name}] }}, {more}") };
    let more =
        if more.contains("readiness:") { more } else { format!("readiness: {{ interval: 10ms }}, {more}") };
    format!("  - {{ name: {name}, target: {{ url: \"{url}\" }}, {more} }}\n")
}

/// Returns a configuration of these routes, on free ports, for requests to any host.
pub fn routes(routes: &[String]) -> String {
    format!(
        "listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\nallowedHosts: [\"*\"]\nworkers: 1\nroutes:\n{}",
        routes.concat()
    )
}

pub fn parse(yaml: &str) -> Config {
    Config::parse(yaml, "test.yaml").unwrap_or_else(|error| panic!("{}\n{yaml}", error.report()))
}

pub fn options() -> scaler::Options {
    scaler::Options { guardian: env!("CARGO_BIN_EXE_anteroom").into(), ..scaler::Options::default() }
}

// === impl TestProxy ===

impl TestProxy {
    pub async fn start(yaml: &str) -> Self {
        Self::start_with(parse(yaml), options()).await
    }

    pub async fn start_with(config: Config, options: scaler::Options) -> Self {
        let bound = BoundProxy::new(config, options).await.unwrap();
        let (commands, received) = mpsc::channel(4);
        let (address, admin) = (bound.address, bound.admin_address);
        let (scaler, peers) = (bound.scaler_address, bound.peers_address);
        let shared = bound.shared().clone();
        Self { address, admin, scaler, peers, commands, shared, running: tokio::spawn(bound.run(received)) }
    }

    /// Starts a proxy with `tiny` as its only route.
    pub async fn tiny(url: &str, more: &str) -> Self {
        Self::start(&routes(&[route("tiny", url, more)])).await
    }

    /// Like [`Self::tiny`], with more keys in the file.
    pub async fn tiny_with(url: &str, more: &str, file: &str) -> Self {
        Self::start(&format!("{file}\n{}", routes(&[route("tiny", url, more)]))).await
    }

    /// Starts a proxy whose cluster has a route `tiny` to this URL, as defined by an `InterceptorRoute`. The file has
    /// a route `models` for other models, to an address without a listener.
    pub async fn intercepting(url: &str, intercept: Intercept) -> Self {
        let proxy = Self::start(&routes(&[route("models", "http://127.0.0.1:1", "")])).await;
        proxy.intercept(url, intercept).await;
        proxy
    }

    /// Adds this route to the cluster, for every request if it has no rules, and waits until it is active by means of
    /// a second route.
    pub async fn intercept(&self, url: &str, mut intercept: Intercept) {
        if intercept.rules.is_empty() {
            intercept.rules.push(Matcher::default());
        }
        static SEEN: AtomicUsize = AtomicUsize::new(0);
        let seen = format!("seen-{}", SEEN.fetch_add(1, Ordering::Relaxed));
        let mut routes = parse(&routes(&[route("tiny", url, "match: {}"), route(&seen, url, "")])).routes;
        routes[0].intercept = Some(Arc::new(intercept));
        let routes = routes.into_iter().map(Arc::new).collect();
        self.commands.send(Command::ClusterRoutes(Arc::new(routes))).await.unwrap();
        until("the routes of the cluster", async || self.route(&seen).await.is_object()).await;
    }

    /// Returns the gate of the only route.
    pub async fn gate(&self) -> Arc<Gate> {
        until("the route", async || !self.shared.table.load().gates().is_empty()).await;
        self.shared.table.load().gates()[0].clone()
    }

    /// Applies the cross-site rules of an address that other machines can reach.
    pub fn reachable(self) -> Self {
        self.shared.cross_site.set(&Config::default(), ([0, 0, 0, 0], 0).into());
        self
    }

    pub async fn client(&self) -> Wire {
        Wire::connect(self.address).await
    }

    /// Connects a client and sends `request`.
    pub async fn sent(&self, request: impl AsRef<[u8]>) -> Wire {
        let mut client = self.client().await;
        client.send(request).await;
        client
    }

    /// Returns the response to a request on a new connection.
    pub async fn ask(&self, request: impl AsRef<[u8]>) -> WireResponse {
        self.client().await.ask(request).await
    }

    pub async fn reload(&self, yaml: &str) {
        self.commands.send(Command::Reload(Box::new(parse(yaml)))).await.unwrap();
    }

    /// Returns a response of the admin listener.
    pub async fn admin(&self, path: &str) -> WireResponse {
        let request = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
        Wire::connect(self.admin).await.ask(request).await
    }

    /// Returns a route from the admin API; null if it does not exist.
    pub async fn route(&self, name: &str) -> Value {
        let routes = self.admin("/api/v1/routes").await.json();
        let routes = routes["routes"].as_array().unwrap();
        routes.iter().find(|route| route["name"] == name).cloned().unwrap_or_default()
    }

    /// Waits until a field of `tiny` in the admin API has this value.
    pub async fn await_tiny_field(&self, key: &str, number: u64) {
        until(&format!("{key} to be {number}"), async || self.route("tiny").await[key] == number).await;
    }

    pub async fn await_tiny_held(&self, number: u64) {
        self.await_tiny_field("held", number).await;
    }

    /// Waits until `tiny` was found not ready, so that the next request is a cold start.
    pub async fn await_tiny_starting(&self) {
        until("a cold start", async || self.route("tiny").await["state"] == "starting").await;
    }

    pub async fn await_tiny_in_flight(&self, number: u64) {
        self.await_tiny_field("in_flight", number).await;
    }

    pub async fn metrics(&self) -> String {
        self.admin("/metrics").await.text()
    }

    /// Sums the series of this name whose lines contain all of these labels.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> u64 {
        let text = self.metrics().await;
        let series = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|label| line.contains(label))
        });
        series.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// Waits until `number` requests to `tiny` have ended with this outcome. A request ends when its last byte is
    /// written, slightly later than the client may receive it.
    pub async fn await_outcome(&self, outcome: &str, code: u16, number: u64) {
        let labels = ["route=\"tiny\"", &format!("outcome=\"{outcome}\""), &format!("code=\"{code}\"")];
        until(&format!("{number} of {outcome} {code}"), async || {
            self.metric("anteroom_requests_total", &labels).await == number
        })
        .await;
    }

    /// Returns the number of requests rejected for this reason.
    pub async fn refused(&self, reason: &str) -> u64 {
        self.metric("anteroom_refused_requests_total", &[&format!("reason=\"{reason}\"")]).await
    }

    /// Stops as on Ctrl-C. The outcomes of all admitted requests must be exactly these.
    pub async fn stop(self, outcomes: &[(&str, u64)]) {
        let account = self.stopped(StopSignal::Interrupt).await;
        let ended: Vec<_> = account.outcomes.iter().copied().filter(|(_, count)| *count > 0).collect();
        let mut expected = outcomes.to_vec();
        expected.sort_by_key(|(name, _)| account.outcomes.iter().position(|(known, _)| known == name));
        assert_eq!(ended, expected, "{account:?}");
    }

    /// Stops, and checks the account.
    pub async fn stopped(self, request: StopSignal) -> Account {
        let _ = self.commands.send(Command::Stop(request)).await;
        let account = soon("the proxy to stop", self.running).await.unwrap();
        assert!(account.balances(), "{account:?}");
        assert_eq!((account.held, account.in_flight), (0, 0), "{account:?}");
        account
    }
}
