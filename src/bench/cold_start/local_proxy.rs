//! A proxy in this process, to be measured.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::{
    app::{Account, BoundProxy, Command},
    bench::http::BaseUrl,
    config::{Config, ConfigError, LoadedConfig, Overrides},
    domain::{Period, Route, Target},
    drain::StopSignal,
    scaler,
};

/// Configuration and route of a proxy to start.
#[derive(Clone)]
pub(super) struct ProxySpec {
    config: Config,
    route: Route,
}

/// A running proxy.
pub(super) struct LocalProxy {
    address: SocketAddr,
    admin_address: SocketAddr,
    commands: mpsc::Sender<Command>,
    running: JoinHandle<Account>,
}

/// Configuration used without `--config` and `--url`.
const STAND_IN_CONFIG: &str = include_str!("default.yaml");

// === impl ProxySpec ===

impl ProxySpec {
    /// Builds the embedded default: a stand-in for vLLM with this load time.
    ///
    /// # Errors
    /// If the path of this executable is unknown or not UTF-8.
    pub(super) fn stand_in(load_time: Period) -> Result<Self, String> {
        let unknown =
            "cannot determine the path of this executable, which is the stand-in for the model server";
        let program = std::env::current_exe().map_err(|error| format!("{unknown}: {error}"))?;
        let program =
            program.to_str().ok_or_else(|| format!("{unknown}: {} is not UTF-8", program.display()))?;
        let mut config = Config::parse(STAND_IN_CONFIG, "the embedded configuration")
            .map_err(|error| error.to_string())?;
        for route in &mut config.routes {
            if let Target::Process(process) = &mut route.target {
                for argument in &mut process.command {
                    *argument = argument
                        .replace("{anteroom}", program)
                        .replace("{loadTime}", &load_time.to_string().replace(' ', ""));
                }
            }
        }
        Self::new(config, None)
    }

    /// Loads a configuration file and selects a route.
    ///
    /// # Errors
    /// If the file is invalid or has no such route.
    pub(super) fn read(file: &Path, route: Option<&str>) -> Result<Self, String> {
        let text = |error: ConfigError| {
            // The caller adds the same prefix.
            let report = error.report();
            report.strip_prefix("error: ").unwrap_or(&report).to_owned()
        };
        let loaded = LoadedConfig::load(file, &Overrides::default()).map_err(text)?;
        Self::new(loaded.config, route)
    }

    fn new(config: Config, name: Option<&str>) -> Result<Self, String> {
        let names = || config.routes.iter().map(|route| route.name.as_str()).collect::<Vec<_>>().join(", ");
        let route = match (name, config.routes.as_slice()) {
            (None, [only]) => only,
            (None, []) => {
                return Err(
                    "the file has no route; to measure a route of a cluster, use --url, --admin and --route"
                        .to_owned(),
                );
            }
            (None, _) => {
                return Err(format!("the file has several routes; choose one with --route: {}", names()));
            }
            (Some(name), routes) => routes
                .iter()
                .find(|route| route.name.as_str() == name)
                .ok_or_else(|| format!("the file has no route {name}; it has: {}", names()))?,
        };
        let route = route.clone();
        Ok(Self { config, route })
    }

    /// Returns whether the target is a process, which stops when idle.
    pub(super) const fn is_process(&self) -> bool {
        matches!(self.route.target, Target::Process(_))
    }

    pub(super) fn route(&self) -> &str {
        self.route.name.as_str()
    }

    /// Returns the first model that the route matches.
    pub(super) fn model(&self) -> Option<&str> {
        self.route.matcher.models.first().map(String::as_str)
    }

    /// Returns the headers that the route matches, including `Host`.
    pub(super) fn headers(&self) -> HeaderMap {
        let matcher = &self.route.matcher;
        let given = matcher.headers.iter().filter_map(|(name, value)| {
            Some((name.parse::<HeaderName>().ok()?, HeaderValue::from_str(value).ok()?))
        });
        let host = matcher.hosts.iter().find_map(|host| {
            HeaderValue::from_str(&host.replace('*', "bench")).ok().map(|host| (header::HOST, host))
        });
        given.chain(host).collect()
    }

    /// Starts the proxy on free loopback ports, isolated from a running one: without scaler, peers and Kubernetes.
    ///
    /// # Errors
    /// If the proxy cannot start.
    pub(super) async fn start(mut self, idle_timeout: Period) -> Result<LocalProxy, String> {
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        (self.config.listen, self.config.admin) = (anywhere, anywhere);
        (self.config.scaler, self.config.peers, self.config.kubernetes) = (None, None, None);
        self.config.drain_delay = Period::ZERO;
        for route in self.config.routes.iter_mut().filter(|route| route.name == self.route.name) {
            if let Target::Process(process) = &mut route.target {
                process.idle_timeout = idle_timeout;
            }
        }
        let bound = BoundProxy::new(self.config, scaler::Options::default()).await;
        let bound = bound.map_err(|error| error.to_string())?;
        let (address, admin_address) = (bound.address, bound.admin_address);
        let (commands, received) = mpsc::channel(4);
        let running = tokio::spawn(bound.run(received));
        Ok(LocalProxy { address, admin_address, commands, running })
    }
}

// === impl LocalProxy ===

impl LocalProxy {
    pub(super) fn base(&self) -> BaseUrl {
        self.address.into()
    }

    pub(super) fn admin(&self) -> BaseUrl {
        self.admin_address.into()
    }

    /// Stops the proxy and the model server gracefully, or immediately once `cancelled` completes.
    pub(super) async fn stop(self, cancelled: impl Future<Output = ()>) {
        let Self { commands, mut running, .. } = self;
        let stop = async || commands.send(Command::Stop(StopSignal::Interrupt)).await;
        let _ = stop().await;
        tokio::select! {
            // Biased: the proxy may already have ended.
            biased;
            ended = &mut running => return propagate_panic(ended),
            () = cancelled => {}
        }
        let _ = stop().await;
        propagate_panic(running.await);
    }
}

/// Resumes a panic of the proxy task.
fn propagate_panic(ended: Result<Account, tokio::task::JoinError>) {
    if let Err(error) = ended {
        std::panic::resume_unwind(error.into_panic());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stand_in_configuration_is_complete() {
        let spec = ProxySpec::stand_in(Period::from_millis(1500)).unwrap();
        let Target::Process(process) = &spec.route.target else { panic!("a process") };
        let open: Vec<_> = process.command.iter().filter(|argument| argument.contains('{')).collect();
        assert_eq!(open, ["--port={port}"]);
        assert!(process.command.contains(&"--load-time=1s500ms".to_owned()), "{:?}", process.command);
        assert!(spec.is_process());
        assert_eq!((spec.route(), spec.model()), ("stand-in", Some("stand-in")));
    }

    #[test]
    fn requests_carry_model_and_headers_of_the_route() {
        let config = "routes:
  - name: tiny
    match: { models: [a, b], hosts: ['*.example.com'], headers: { x-tier: gold } }
    target: { url: http://127.0.0.1:1 }
  - name: other
    match: { models: [c] }
    target: { url: http://127.0.0.1:2 }
";
        let config = Config::parse(config, "a test").unwrap();
        let spec = ProxySpec::new(config.clone(), Some("tiny")).unwrap();
        assert_eq!((spec.model(), spec.is_process()), (Some("a"), false));
        assert_eq!(spec.headers()["host"], "bench.example.com");
        assert_eq!(spec.headers()["x-tier"], "gold");
        let error = |name| ProxySpec::new(config.clone(), name).err().unwrap();
        assert!(error(None).contains("--route: tiny, other"));
        assert!(error(Some("big")).contains("no route big; it has: tiny, other"));
    }
}
