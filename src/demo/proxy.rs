//! The proxy of the demo.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinHandle, time::interval};

use super::error::DemoError;
use crate::{
    admission::Gate,
    app::{Account, BoundProxy, Command, StartError},
    coldstart::{ColdStart, ColdStarts},
    config::Config,
    domain::{Period, RouteKey, Target},
    drain::StopSignal,
    error::Outcome,
    scaler,
};

/// A running proxy with one route.
pub(super) struct DemoProxy {
    pub(super) address: SocketAddr,
    pub(super) admin_address: SocketAddr,
    pub(super) gate: Arc<Gate>,
    pub(super) cold_starts: Arc<ColdStarts>,
    pub(super) idle_timeout: Period,
    commands: mpsc::Sender<Command>,
    running: JoinHandle<Account>,
}

/// Interval of polls for events that are imminent.
const SETTLE_POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Time limit for the last requests to be counted.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(2);

/// Name of the route in [`CONFIG`].
const DEMO_ROUTE: &str = "demo";

const CONFIG: &str = include_str!("config.yaml");

impl DemoProxy {
    /// Starts the proxy on its default ports, or on free ones if those are in use.
    pub(super) async fn start(load_time: Period) -> Result<Self, DemoError> {
        let mut config = config(load_time)?;
        let idle_timeout = match &config.routes[0].target {
            Target::Process(process) => process.idle_timeout,
            Target::Url(_) | Target::Cluster(_) => Period::from_secs(0),
        };
        let bound = loop {
            match BoundProxy::new(config.clone(), scaler::Options::default()).await {
                Ok(bound) => break bound,
                Err(StartError::Listen { key, address, source })
                    if source.kind() == io::ErrorKind::AddrInUse && address.port() != 0 =>
                {
                    if key == "admin" { &mut config.admin } else { &mut config.listen }.set_port(0);
                }
                Err(error) => return Err(error.into()),
            }
        };
        let (address, admin_address) = (bound.address, bound.admin_address);
        let (shared, cold_starts) = (bound.shared().clone(), bound.cold_starts().clone());
        let (commands, received) = mpsc::channel(4);
        let running = tokio::spawn(bound.run(received));
        // The route table is filled when the proxy starts to run.
        let mut ticks = interval(SETTLE_POLL_INTERVAL);
        let gate = loop {
            ticks.tick().await;
            if let Some(gate) = shared.table.load().gate(&RouteKey::from(DEMO_ROUTE)) {
                break gate.clone();
            }
            if running.is_finished() {
                return Err(DemoError::Stopped);
            }
        };
        Ok(Self { address, admin_address, gate, cold_starts, idle_timeout, commands, running })
    }

    /// Returns the current cold start, or else the last one.
    pub(super) fn cold_start(&self) -> Option<ColdStart> {
        self.gate.cold_starts().current().or_else(|| self.last_cold_start())
    }

    /// Returns the last finished cold start.
    pub(super) fn last_cold_start(&self) -> Option<ColdStart> {
        self.cold_starts.recent(Some(DEMO_ROUTE), 1).pop()
    }

    /// Returns the current request counts.
    pub(super) fn account(&self) -> Account {
        let counters = self.gate.counters();
        Account {
            admitted: counters.admitted(),
            outcomes: Outcome::ALL.map(|outcome| (outcome.name(), counters.ended_as(outcome))).into(),
            held: self.gate.held() as u64,
            in_flight: self.gate.in_flight(),
        }
    }

    /// Waits until no request is open, for at most [`SETTLE_TIMEOUT`], since other clients may send requests. A client may
    /// read the last byte before its request is counted.
    pub(super) async fn settled(&self) -> Account {
        let is_settled = |account: &Account| account.balances() && account.held + account.in_flight == 0;
        let settling = async {
            let mut ticks = interval(SETTLE_POLL_INTERVAL);
            while !is_settled(&self.account()) {
                ticks.tick().await;
            }
        };
        let _ = tokio::time::timeout(SETTLE_TIMEOUT, settling).await;
        self.account()
    }

    /// Stops the proxy and the model server gracefully, or immediately once `cancelled` completes.
    pub(super) async fn stop(self, cancelled: impl Future<Output = ()>) -> Account {
        let Self { commands, mut running, .. } = self;
        let send_stop = async || commands.send(Command::Stop(StopSignal::Interrupt)).await;
        let _ = send_stop().await;
        tokio::select! {
            // Biased: the proxy may already have ended.
            biased;
            account = &mut running => return resume_panic(account),
            () = cancelled => {}
        }
        let _ = send_stop().await;
        resume_panic(running.await)
    }
}

/// Resumes a panic of the proxy task.
fn resume_panic(account: Result<Account, tokio::task::JoinError>) -> Account {
    account.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// Returns the embedded configuration with its placeholders replaced.
fn config(load_time: Period) -> Result<Config, DemoError> {
    let program = std::env::current_exe().map_err(DemoError::Program)?;
    let program = program
        .to_str()
        .ok_or_else(|| DemoError::Program(io::Error::other(format!("{} is not UTF-8", program.display()))))?;
    let mut config = Config::parse(CONFIG, "the demo's configuration")?;
    for route in &mut config.routes {
        if let Target::Process(process) = &mut route.target {
            for argument in &mut process.command {
                *argument = argument
                    .replace("{anteroom}", program)
                    .replace("{loadTime}", &load_time.to_string().replace(' ', ""));
            }
        }
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_configuration_is_complete() {
        let config = config(Period::from_millis(1500)).unwrap();
        let Target::Process(process) = &config.routes[0].target else { panic!("a process") };
        let open: Vec<_> = process.command.iter().filter(|argument| argument.contains('{')).collect();
        assert_eq!(open, ["--port={port}"]);
        assert!(process.command.contains(&"--load-time=1s500ms".to_owned()), "{:?}", process.command);
        assert_eq!(config.routes[0].name.as_str(), DEMO_ROUTE);
    }
}
