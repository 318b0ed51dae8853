//! The running proxy that a demo looks at.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinHandle, time::interval};

use super::DemoError;
use crate::{
    admission::Gate,
    app::{Account, Bound, Command, StartError},
    coldstart::{ColdStart, ColdStarts},
    config::Config,
    domain::{Period, RouteKey, Target},
    drain::Request,
    error::Outcome,
    scaler,
};

/// A proxy with one route, which nothing runs for yet.
pub(super) struct Stage {
    pub(super) address: SocketAddr,
    pub(super) admin_address: SocketAddr,
    pub(super) gate: Arc<Gate>,
    pub(super) cold_starts: Arc<ColdStarts>,
    pub(super) idle_timeout: Period,
    commands: mpsc::Sender<Command>,
    running: JoinHandle<Account>,
}

/// How often it is looked whether something that is about to happen has happened.
const LOOK: Duration = Duration::from_millis(2);

/// The route of [`CONFIG`].
const ROUTE: &str = "demo";

const CONFIG: &str = include_str!("config.yaml");

impl Stage {
    /// Starts the proxy: at its usual ports, or where another program has those, at free ones.
    pub(super) async fn start(load_time: Period) -> Result<Self, DemoError> {
        let mut config = config(load_time)?;
        let idle_timeout = match &config.routes[0].target {
            Target::Process(process) => process.idle_timeout,
            Target::Url(_) | Target::Cluster(_) => Period::from_secs(0),
        };
        let bound = loop {
            match Bound::new(config.clone(), scaler::Options::default()).await {
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
        // The routes are there as soon as it runs.
        let mut looks = interval(LOOK);
        let gate = loop {
            looks.tick().await;
            if let Some(gate) = shared.table.load().gate(&RouteKey::from(ROUTE)) {
                break gate.clone();
            }
            if running.is_finished() {
                return Err(DemoError::Stopped);
            }
        };
        Ok(Self { address, admin_address, gate, cold_starts, idle_timeout, commands, running })
    }

    /// The cold start that runs, or else the last one that ended.
    pub(super) fn cold_start(&self) -> Option<ColdStart> {
        self.gate.cold_starts().current().or_else(|| self.last_cold_start())
    }

    /// The last cold start that has ended.
    pub(super) fn last_cold_start(&self) -> Option<ColdStart> {
        self.cold_starts.recent(Some(ROUTE), 1).pop()
    }

    /// The account of the requests so far.
    pub(super) fn account(&self) -> Account {
        let counters = self.gate.counters();
        Account {
            admitted: counters.admitted(),
            outcomes: Outcome::ALL.map(|outcome| (outcome.name(), counters.ended_as(outcome))).into(),
            held: self.gate.held() as u64,
            in_flight: self.gate.in_flight(),
        }
    }

    /// The account once nothing moves: a client may read the last byte before its request is counted as completed.
    /// Other clients may keep it moving, so this does not wait for ever.
    pub(super) async fn settled(&self) -> Account {
        let at_rest = |account: &Account| account.balances() && account.held + account.in_flight == 0;
        let settling = async {
            let mut looks = interval(LOOK);
            while !at_rest(&self.account()) {
                looks.tick().await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), settling).await;
        self.account()
    }

    /// Ends the proxy and the model server in order. Whatever is under way has a moment to finish; when `hurry` comes,
    /// it is cut off.
    pub(super) async fn stop(self, hurry: impl Future<Output = ()>) -> Account {
        let Self { commands, mut running, .. } = self;
        let ask = async || commands.send(Command::Stop(Request::Interrupt)).await;
        let _ = ask().await;
        tokio::select! {
            // It may have ended already.
            biased;
            account = &mut running => return ended(account),
            () = hurry => {}
        }
        let _ = ask().await;
        ended(running.await)
    }
}

fn ended(account: Result<Account, tokio::task::JoinError>) -> Account {
    // A panic of the proxy is a panic of the demo.
    account.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// The configuration, with its placeholders filled in.
fn config(load_time: Period) -> Result<Config, DemoError> {
    let program = std::env::current_exe().map_err(DemoError::Program)?;
    let program = program.to_str().ok_or_else(|| {
        DemoError::Program(io::Error::other(format!("{} is not a name in UTF-8", program.display())))
    })?;
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
    fn the_embedded_configuration_is_valid_and_complete() {
        let config = config(Period::from_millis(1500)).unwrap();
        let Target::Process(process) = &config.routes[0].target else { panic!("a process") };
        let open: Vec<_> = process.command.iter().filter(|argument| argument.contains('{')).collect();
        assert_eq!(open, ["--port={port}"]);
        assert!(process.command.contains(&"--load-time=1s500ms".to_owned()), "{:?}", process.command);
        assert_eq!(config.routes[0].name.as_str(), ROUTE);
    }
}
