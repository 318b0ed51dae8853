//! A proxy of our own to measure, in this process.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::{
    app::{Account, Bound, Command},
    bench::http::Base,
    config::{Config, ConfigError, Loaded, Overrides},
    domain::{Period, Route, Target},
    drain::Request,
    scaler,
};

/// What is to be measured, before it runs.
#[derive(Clone)]
pub(super) struct Script {
    config: Config,
    route: Route,
}

/// The proxy, running.
pub(super) struct Stage {
    address: SocketAddr,
    admin_address: SocketAddr,
    commands: mpsc::Sender<Command>,
    running: JoinHandle<Account>,
}

/// What is measured where nothing else was named.
const CONFIG: &str = include_str!("default.yaml");

// === impl Script ===

impl Script {
    /// The embedded default: a stand-in for vLLM that loads for so long.
    ///
    /// # Errors
    /// When this program does not know its own file.
    pub(super) fn stand_in(load_time: Period) -> Result<Self, String> {
        let unknown = "cannot find this program's own file, which is to play the model server";
        let program = std::env::current_exe().map_err(|error| format!("{unknown}: {error}"))?;
        let program =
            program.to_str().ok_or_else(|| format!("{unknown}: {} is not UTF-8", program.display()))?;
        let mut config =
            Config::parse(CONFIG, "the embedded configuration").map_err(|error| error.to_string())?;
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

    /// A configuration of the user's, and which of its routes.
    ///
    /// # Errors
    /// What is wrong with the file, or that it has no such route.
    pub(super) fn read(file: &Path, route: Option<&str>) -> Result<Self, String> {
        let told = |error: ConfigError| {
            // Whoever prints this says that it is an error.
            let report = error.report();
            report.strip_prefix("error: ").unwrap_or(&report).to_owned()
        };
        let loaded = Loaded::load(file, &Overrides::default()).map_err(told)?;
        Self::new(loaded.config, route)
    }

    fn new(config: Config, name: Option<&str>) -> Result<Self, String> {
        let names = || config.routes.iter().map(|route| route.name.as_str()).collect::<Vec<_>>().join(", ");
        let route = match (name, config.routes.as_slice()) {
            (None, [only]) => only,
            (None, []) => {
                return Err("the file has no route; one of the cluster is measured where it runs: --url, --admin and \
                            --route"
                    .to_owned());
            }
            (None, _) => {
                return Err(format!("the file has several routes: say which with --route: {}", names()));
            }
            (Some(name), routes) => routes
                .iter()
                .find(|route| route.name.as_str() == name)
                .ok_or_else(|| format!("the file has no route {name}; it has: {}", names()))?,
        };
        let route = route.clone();
        Ok(Self { config, route })
    }

    /// Whether its target is a process, which we stop when it is idle.
    pub(super) const fn stops(&self) -> bool {
        matches!(self.route.target, Target::Process(_))
    }

    pub(super) fn route(&self) -> &str {
        self.route.name.as_str()
    }

    /// The model that the route is found by.
    pub(super) fn model(&self) -> Option<&str> {
        self.route.matcher.models.first().map(String::as_str)
    }

    /// What else the route is found by: headers, the host among them.
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

    /// Starts the proxy at free ports of this machine, so that it meets neither a running one nor others' requests.
    /// Nothing outside is told of its demand.
    ///
    /// # Errors
    /// When it cannot start.
    pub(super) async fn start(mut self, idle: Period) -> Result<Stage, String> {
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        (self.config.listen, self.config.admin) = (anywhere, anywhere);
        (self.config.scaler, self.config.peers, self.config.kubernetes) = (None, None, None);
        self.config.drain_delay = Period::ZERO;
        for route in self.config.routes.iter_mut().filter(|route| route.name == self.route.name) {
            if let Target::Process(process) = &mut route.target {
                process.idle_timeout = idle;
            }
        }
        let bound = Bound::new(self.config, scaler::Options::default()).await;
        let bound = bound.map_err(|error| error.to_string())?;
        let (address, admin_address) = (bound.address, bound.admin_address);
        let (commands, received) = mpsc::channel(4);
        let running = tokio::spawn(bound.run(received));
        Ok(Stage { address, admin_address, commands, running })
    }
}

// === impl Stage ===

impl Stage {
    pub(super) fn base(&self) -> Base {
        self.address.into()
    }

    pub(super) fn admin(&self) -> Base {
        self.admin_address.into()
    }

    /// Ends the proxy and the model server in order; when `hurry` comes, what is under way is cut off.
    pub(super) async fn stop(self, hurry: impl Future<Output = ()>) {
        let Self { commands, mut running, .. } = self;
        let ask = async || commands.send(Command::Stop(Request::Interrupt)).await;
        let _ = ask().await;
        tokio::select! {
            // It may have ended already.
            biased;
            ended = &mut running => return passed_on(ended),
            () = hurry => {}
        }
        let _ = ask().await;
        passed_on(running.await);
    }
}

/// A panic of the proxy is a panic of ours.
fn passed_on(ended: Result<Account, tokio::task::JoinError>) {
    if let Err(error) = ended {
        std::panic::resume_unwind(error.into_panic());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_configuration_is_valid_and_complete() {
        let script = Script::stand_in(Period::from_millis(1500)).unwrap();
        let Target::Process(process) = &script.route.target else { panic!("a process") };
        let open: Vec<_> = process.command.iter().filter(|argument| argument.contains('{')).collect();
        assert_eq!(open, ["--port={port}"]);
        assert!(process.command.contains(&"--load-time=1s500ms".to_owned()), "{:?}", process.command);
        assert!(script.stops());
        assert_eq!((script.route(), script.model()), ("stand-in", Some("stand-in")));
    }

    #[test]
    fn a_request_has_what_its_route_is_found_by() {
        let config = "routes:
  - name: tiny
    match: { models: [a, b], hosts: ['*.example.com'], headers: { x-tier: gold } }
    target: { url: http://127.0.0.1:1 }
  - name: other
    match: { models: [c] }
    target: { url: http://127.0.0.1:2 }
";
        let config = Config::parse(config, "a test").unwrap();
        let script = Script::new(config.clone(), Some("tiny")).unwrap();
        assert_eq!((script.model(), script.stops()), (Some("a"), false));
        assert_eq!(script.headers()["host"], "bench.example.com");
        assert_eq!(script.headers()["x-tier"], "gold");
        let error = |name| Script::new(config.clone(), name).err().unwrap();
        assert!(error(None).contains("--route: tiny, other"));
        assert!(error(Some("big")).contains("no route big; it has: tiny, other"));
    }
}
