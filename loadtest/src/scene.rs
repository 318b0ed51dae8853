//! A crowd in front of Anteroom and behind it a model server that is down at first.

use std::io;
use std::time::Duration;

use mio::{Registry, Token};

use crate::admin::{AdminClient, OnlyRouteLoad};
use crate::backend::Backend;
use crate::clients::Clients;
use crate::clock::Instant;
use crate::contender::StartedContender;
use crate::crowd::Crowd;
use crate::error::LoadtestError;
use crate::footprint::{self, Footprint};
use crate::procfs::{CpuReading, Meter};
use crate::rig::Rig;
use crate::setup::Setup;
use crate::target::{RampSettings, TargetServer};

/// Timeout of any wait; on expiry the run fails.
const TESTBED_WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections opened before their acceptance is checked; they fit the accept queue.
const CONNECTIONS_PER_BATCH: usize = 1000;
/// Requests sent before other events are handled.
const REQUESTS_PER_TURN: usize = 64;

/// Settings of the only route.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RouteSettings {
    /// Maximum number of held requests.
    pub(crate) hold: usize,
    pub(crate) ramp: RampSettings,
    pub(crate) streamed: bool,
}

/// Anteroom, with the crowd in front of it and the model server behind it.
#[derive(Debug)]
pub(crate) struct Testbed {
    rig: Rig,
    pub(crate) admin: AdminClient,
    running: StartedContender,
    meter: Meter,
    pub(crate) sides: CrowdAndTarget,
}

/// The clients and their model server.
#[derive(Debug)]
pub(crate) struct CrowdAndTarget {
    pub(crate) crowd: Crowd,
    pub(crate) target: TargetServer,
}

/// Time passed during a wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitTime {
    pub(crate) elapsed: Duration,
    /// Time in which the rig polled without any event or work.
    pub(crate) idle: Duration,
}

// === impl Testbed ===

impl Testbed {
    /// Starts Anteroom in front of a model server that is down.
    pub(crate) fn start(setup: &Setup, bounds: RouteSettings) -> Result<Self, LoadtestError> {
        let rig = Rig::new(setup.stop.clone())?;
        let mut target = TargetServer::bind(rig.registry())
            .map_err(|error| LoadtestError::io("start the model server", error))?;
        target.ramp = bounds.ramp;
        let template = include_str!("../contenders/crowd.yaml")
            .replace("{hold}", &bounds.hold.to_string())
            .replace("{max}", &bounds.ramp.max.to_string())
            .replace("{start}", &bounds.ramp.start.to_string());
        let mut running = setup.anteroom()?.start_with(&template, target.address(), setup.cores)?;
        let admin = AdminClient::await_start(&mut running)?;
        let meter =
            Meter { cores: setup.cores, contender: running.process.as_ref().map(|process| process.id()) };
        let crowd = Crowd::new(running.address, bounds.streamed);
        Ok(Self { rig, admin, running, meter, sides: CrowdAndTarget { crowd, target } })
    }

    /// Connects `count` more clients and waits until all are accepted and read from.
    pub(crate) fn gather(&mut self, count: usize) -> Result<(), LoadtestError> {
        // Counts descriptors: nothing else in the process opens many.
        let before = self.descriptors()?;
        let deadline = Instant::now() + TESTBED_WAIT_TIMEOUT;
        let mut joined = 0;
        while joined < count {
            let batch = CONNECTIONS_PER_BATCH.min(count - joined);
            let crowd = &mut self.sides.crowd;
            crowd
                .join(self.rig.registry(), batch)
                .map_err(|error| LoadtestError::io(format!("connect {count} clients"), error))?;
            joined += batch;
            while self.descriptors()? < before + joined as u64 {
                self.turn()?;
                if Instant::now() >= deadline {
                    return Err(late(&format!("{count} connections were not accepted")));
                }
            }
        }
        // Accepted connections are not read from at once.
        self.run_for(Duration::from_millis(100)).map(drop)
    }

    /// Adds `count` more clients on shared connections; they send at once.
    pub(crate) fn gather_multiplexed(&mut self, count: usize) -> Result<(), LoadtestError> {
        let crowd = &mut self.sides.crowd;
        let joined = crowd.join_multiplexed(self.rig.registry(), count);
        joined.map(drop).map_err(|error| LoadtestError::io("connect over HTTP/2", error))
    }

    /// Sends the request of every client with its own connection, one after another, so their order is known.
    pub(crate) fn send_all(&mut self) -> Result<(), LoadtestError> {
        for member in 0..self.sides.crowd.len() {
            self.sides.crowd.send(member, Instant::now());
            if member % REQUESTS_PER_TURN == REQUESTS_PER_TURN - 1 {
                self.turn()?;
            }
        }
        Ok(())
    }

    /// Waits until `count` requests are held.
    pub(crate) fn await_held(&mut self, count: usize) -> Result<(), LoadtestError> {
        let deadline = Instant::now() + TESTBED_WAIT_TIMEOUT;
        loop {
            let demand =
                self.admin.query_only_route_load().map_err(|error| self.running.explain("anteroom", error));
            let OnlyRouteLoad { held, .. } = demand?;
            if held == count as u64 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(late(&format!("{held} of {count} requests are held")));
            }
            self.run_for(Duration::from_millis(5))?;
        }
    }

    /// Runs the loop until `done`. Fails after [`TESTBED_WAIT_TIMEOUT`].
    pub(crate) fn until(
        &mut self,
        what: &str,
        done: impl Fn(&CrowdAndTarget) -> bool,
    ) -> Result<WaitTime, LoadtestError> {
        self.poll_until(TESTBED_WAIT_TIMEOUT, done)?.ok_or_else(|| late(&format!("not {what}")))
    }

    /// Runs the loop for `duration`.
    pub(crate) fn run_for(&mut self, duration: Duration) -> Result<WaitTime, LoadtestError> {
        let begin = Instant::now();
        let mut idle = Duration::ZERO;
        let mut elapsed = Duration::ZERO;
        while elapsed < duration {
            let events = self.turn()?;
            let before = std::mem::replace(&mut elapsed, begin.elapsed());
            if events == 0 {
                idle += elapsed - before;
            }
        }
        Ok(WaitTime { elapsed, idle })
    }

    /// Runs the loop until `done`; returns `None` if that takes longer than `patience`.
    fn poll_until(
        &mut self,
        patience: Duration,
        done: impl Fn(&CrowdAndTarget) -> bool,
    ) -> Result<Option<WaitTime>, LoadtestError> {
        let begin = Instant::now();
        let mut passed = WaitTime { elapsed: Duration::ZERO, idle: Duration::ZERO };
        while !done(&self.sides) {
            let events = self.turn()?;
            let before = std::mem::replace(&mut passed.elapsed, begin.elapsed());
            if events == 0 {
                passed.idle += passed.elapsed - before;
            }
            if passed.elapsed >= patience {
                return Ok(None);
            }
        }
        Ok(Some(passed))
    }

    /// Polls once, handles the events and returns their number. An unexpected observation of a client is an error.
    pub(crate) fn turn(&mut self) -> Result<usize, LoadtestError> {
        let error = match (self.rig.turn(Some(&mut self.sides)), &self.sides.crowd.tally.wrong) {
            (Ok(events), None) => return Ok(events),
            (Ok(_), Some(why)) => LoadtestError::Wrong(why.clone()),
            (Err(error), _) => error,
        };
        Err(self.running.explain("anteroom", error))
    }

    pub(crate) fn read(&self) -> Result<CpuReading, LoadtestError> {
        self.meter.read().map_err(|error| LoadtestError::io("measure", error))
    }

    pub(crate) fn footprint(&self) -> Result<Footprint, LoadtestError> {
        Footprint::of(self.pid()).map_err(|error| LoadtestError::io("read anteroom's footprint", error))
    }

    pub(crate) fn descriptors(&self) -> Result<u64, LoadtestError> {
        footprint::descriptors(self.pid()).map_err(|error| LoadtestError::io("count anteroom's files", error))
    }

    fn pid(&self) -> u32 {
        self.running.process.as_ref().map_or(0, |process| process.id())
    }
}

fn late(what: &str) -> LoadtestError {
    LoadtestError::Wrong(format!("{what} within {} s", TESTBED_WAIT_TIMEOUT.as_secs()))
}

// === impl CrowdAndTarget ===

impl Clients for CrowdAndTarget {
    fn on_event(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        if TargetServer::owns(token) {
            return self.target.on_event(registry, token);
        }
        self.crowd.on_event(token);
        Ok(())
    }

    fn on_turn(&mut self, _backend: &mut Backend) -> io::Result<usize> {
        self.target.on_turn()
    }
}

// === impl WaitTime ===

impl WaitTime {
    /// Returns the share of the rig's core used by the clients and the model server.
    pub(crate) fn busy(self) -> f64 {
        1.0 - self.idle.as_secs_f64() / self.elapsed.as_secs_f64()
    }
}
