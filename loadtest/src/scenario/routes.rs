//! The routes scenario: 10,000 routes of a cluster, of which 1,000 change per second while requests go to others.
//!
//! The cluster is an API server in the rig. Requests arrive on a schedule, and measurements with and without changes
//! alternate to separate the effect of changes from the noise of the machine.

mod api;
mod clients;
mod findings;
mod objects;
mod probe;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use mio::{Registry, Token};

use api::ApiServer;
use clients::{RouteClients, request};
use findings::{InitialListResults, IntervalResults, PropagationDelays, RoutesResults};
use objects::{CHANGES_PER_SEC, Objects, WARM_ROUTES};
use probe::Probe;

use crate::admin;
use crate::census::ProcessStats;
use crate::clock::Instant;
use crate::contender::StartedContender;
use crate::error::LoadtestError;
use crate::findings::Findings;
use crate::procfs::Meter;
use crate::rig::Rig;
use crate::setup::Setup;

/// Default number of routes.
pub(crate) const DEFAULT_ROUTES: usize = 10_000;
/// Requests per second: a fraction of a core's capacity, so that only the changes can cause delays.
const CLIENT_REQUESTS_PER_SEC: u32 = 5000;
const CLIENT_CONNECTIONS: usize = 64;
/// Number of last routes that change only in the measurement of the propagation delay.
const PROPAGATION_ROUTES: usize = 100;
/// Pause for work left from changes, which is not measured.
const CHANGES_SETTLE_PAUSE: Duration = Duration::from_millis(1500);
const WARM_UP: Duration = Duration::from_secs(2);
/// Time Anteroom may take to learn all routes.
const ROUTES_READY_TIMEOUT: Duration = Duration::from_secs(120);
/// Time a change may take to act before the run is abandoned.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval between requests that test a new model name.
const MODEL_POLL_INTERVAL: Duration = Duration::from_millis(5);

const CONFIGURATION: &str = "listen: 127.0.0.1:{listen}\nadmin: 127.0.0.1:{admin}\nworkers: 1\nroutes: []\nkubernetes: { \
                             interceptorRoutes: false }\n";

/// The rig's side: API server and clients in one loop.
struct ApiAndClients {
    api: ApiServer,
    clients: Option<RouteClients>,
    /// Due time of the next change; `None` while changes are off.
    due: Option<Instant>,
    changes: u64,
}

struct RoutesRun {
    rig: Rig,
    world: ApiAndClients,
    running: StartedContender,
    meter: Meter,
}

pub(crate) fn run(setup: &Setup, routes: usize) -> Result<Findings, LoadtestError> {
    let rig = Rig::new(setup.stop.clone())?;
    let objects = Objects::new(routes, rig.backend().port());
    let api = ApiServer::bind(rig.registry(), objects)
        .map_err(|error| LoadtestError::io("start an API server", error))?;
    let dir = tempfile::tempdir().map_err(|error| LoadtestError::io("make a folder", error))?;
    let kubeconfig = dir.path().join("kubeconfig");
    fs::write(&kubeconfig, self::kubeconfig(api.address()))
        .map_err(|error| LoadtestError::io("write a kubeconfig", error))?;
    let env = [("KUBECONFIG", kubeconfig.as_os_str())];
    eprintln!("routes: anteroom lists {routes} routes");
    let begin = Instant::now();
    let running = setup.anteroom()?.start_in(CONFIGURATION, rig.backend(), setup.cores, &env)?;
    let meter = Meter { cores: setup.cores, contender: running.process.as_ref().map(|process| process.id()) };
    let world = ApiAndClients { api, clients: None, due: None, changes: 0 };
    let mut stage = RoutesRun { rig, world, running, meter };
    let loaded = stage.load(begin)?;
    let seconds = setup.seconds(2, 5);
    let mut measured = Vec::new();
    for round in 1..=setup.rounds() {
        for changing in [false, true] {
            let which = if changing { "with changes" } else { "without changes" };
            eprintln!("routes, round {round} of {}: {which}", setup.rounds());
            stage.turn_for(CHANGES_SETTLE_PAUSE)?;
            stage.world.due = changing.then(Instant::now);
            let warm_up = if changing { CHANGES_SETTLE_PAUSE } else { Duration::ZERO };
            stage.turn_for(warm_up)?;
            measured.push(stage.measure(changing, Duration::from_secs(seconds.into()))?);
            stage.world.due = None;
        }
    }
    eprintln!("routes: measuring the propagation delay of changes");
    let lateness = stage.measure_propagation(if setup.quick { 4 } else { 20 })?;
    let census = stage.census()?;
    let how = format!("{} rounds of {seconds} s without changes and {seconds} s with", setup.rounds());
    Ok(RoutesResults { how, loaded, measured, lateness, census, counts: stage.world.api.counts.clone() }
        .findings())
}

fn kubeconfig(api: SocketAddr) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{ name: c, context: {{ cluster: c, user: u }} }}]\n\
         clusters: [{{ name: c, cluster: {{ server: \"http://{api}\" }} }}]\nusers: [{{ name: u, user: {{}} }}]\n"
    )
}

// === impl ApiAndClients ===

impl crate::clients::Clients for ApiAndClients {
    fn on_event(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        if ApiServer::owns(token) {
            return self.api.on_event(registry, token);
        }
        if let Some(clients) = &mut self.clients {
            clients.on_event(token);
        }
        Ok(())
    }
}

impl ApiAndClients {
    /// Sends due requests, then makes due changes.
    fn tick(&mut self, now: Instant) {
        if let Some(clients) = &mut self.clients {
            clients.send_due(now);
        }
        while let Some(due) = self.due.filter(|due| *due <= now) {
            self.due = Some(due + Duration::from_secs(1) / CHANGES_PER_SEC);
            self.change();
        }
        self.api.send_changes();
    }

    /// Makes the next change, to a route outside the last [`PROPAGATION_ROUTES`]. Consecutive changes are to distant routes.
    fn change(&mut self) {
        self.changes += 1;
        let spread = |changes: u64, most: usize| (changes.wrapping_mul(7919) % most as u64) as usize;
        let changing = self.api.objects.len() - PROPAGATION_ROUTES;
        if self.changes.is_multiple_of(2) {
            self.api.objects.change_policy(spread(self.changes, changing));
        } else {
            self.api.objects.change_endpoints(WARM_ROUTES + spread(self.changes, changing - WARM_ROUTES));
        }
    }
}

// === impl RoutesRun ===

impl RoutesRun {
    fn turn(&mut self) -> Result<usize, LoadtestError> {
        let turned = self.rig.turn(Some(&mut self.world));
        let events = turned.map_err(|error| self.running.explain("anteroom", error))?;
        self.world.tick(Instant::now());
        if let Some(why) = self.world.clients.as_ref().and_then(|clients| clients.first_error.clone()) {
            return Err(self.unsound(why));
        }
        Ok(events)
    }

    /// Runs the loop for `duration` and returns the time spent idle.
    fn turn_for(&mut self, duration: Duration) -> Result<Duration, LoadtestError> {
        let begin = Instant::now();
        let (mut elapsed, mut idle) = (Duration::ZERO, Duration::ZERO);
        while elapsed < duration {
            let events = self.turn()?;
            let before = std::mem::replace(&mut elapsed, begin.elapsed());
            if events == 0 {
                idle += elapsed - before;
            }
        }
        Ok(idle)
    }

    fn unsound(&mut self, why: String) -> LoadtestError {
        let log = self.running.process.as_ref().map(|process| process.log()).unwrap_or_default();
        let why = format!("{why}; the API server: {:?}\n{log}", self.world.api.counts);
        self.running.explain("anteroom", LoadtestError::unsound("routes", why))
    }

    fn census(&self) -> Result<ProcessStats, LoadtestError> {
        let pid = self.running.process.as_ref().map(|process| process.id());
        ProcessStats::of(pid.unwrap_or_else(std::process::id))
            .map_err(|error| LoadtestError::io("look at anteroom", error))
    }

    /// Waits until Anteroom serves all routes, then starts to send.
    fn load(&mut self, begin: Instant) -> Result<InitialListResults, LoadtestError> {
        let mut ready = None;
        while ready.is_none() {
            self.turn_for(Duration::from_millis(20))?;
            self.running.check_start("anteroom", begin + ROUTES_READY_TIMEOUT)?;
            ready = admin::is_ready(self.running.admin).then(|| begin.elapsed());
        }
        let requests = (0..WARM_ROUTES).map(|number| request(&format!("m{number}"))).collect();
        let clients = RouteClients::connect(
            self.rig.registry(),
            self.running.address,
            CLIENT_CONNECTIONS,
            CLIENT_REQUESTS_PER_SEC,
            requests,
        );
        self.world.clients = Some(clients.map_err(|error| LoadtestError::io("connect to anteroom", error))?);
        // The requests wait until the pods of their routes are known.
        while !self.world.clients.as_ref().is_some_and(RouteClients::are_answered) {
            self.turn()?;
            if begin.elapsed() > ROUTES_READY_TIMEOUT {
                return Err(
                    self.unsound(format!("no pods are known within {} s", ROUTES_READY_TIMEOUT.as_secs()))
                );
            }
        }
        let served_s = begin.elapsed().as_secs_f64();
        self.turn_for(WARM_UP)?;
        let census = self.census()?;
        let counts = self.world.api.counts.clone();
        let ready_s = ready.unwrap_or_default().as_secs_f64();
        let routes = self.world.api.objects.len();
        Ok(InitialListResults { routes, ready_s, served_s, census, counts })
    }

    fn measure(&mut self, changing: bool, duration: Duration) -> Result<IntervalResults, LoadtestError> {
        let failed = |error| LoadtestError::io("read the times of processes", error);
        if let Some(clients) = &mut self.world.clients {
            clients.latency.reset();
        }
        let (changes, told) = (self.world.changes, self.world.api.counts.told);
        let (begin, before) = (Instant::now(), self.meter.read().map_err(failed)?);
        let idle = self.turn_for(duration)?;
        let spent = before.until(&self.meter.read().map_err(failed)?);
        let elapsed = begin.elapsed().as_secs_f64();
        let latency = self.world.clients.as_ref().map(|clients| &clients.latency);
        let us = |quantile| latency.map_or(0, |latency| latency.value_at_quantile(quantile)) as f64 / 1e3;
        Ok(IntervalResults {
            changing,
            requests: latency.map_or(0, |latency| latency.len()),
            changes_per_s: (self.world.changes - changes) as f64 / elapsed,
            told_per_s: (self.world.api.counts.told - told) as f64 / elapsed,
            p50_us: us(0.5),
            p99_us: us(0.99),
            p999_us: us(0.999),
            max_us: us(1.0),
            busy: spent.contender.as_secs_f64() / elapsed,
            rig_busy: 1.0 - idle.as_secs_f64() / elapsed,
            others: spent.others.as_secs_f64() / elapsed,
        })
    }

    /// Measures the time until changes act while all other changes continue.
    fn measure_propagation(&mut self, times: usize) -> Result<PropagationDelays, LoadtestError> {
        self.world.due = Some(Instant::now());
        self.turn_for(CHANGES_SETTLE_PAUSE)?;
        let (mut matches, mut endpoints) = (Vec::new(), Vec::new());
        for time in 0..times {
            let alias = format!("alias-{time}");
            let begin = Instant::now();
            self.world.api.objects.set_alias(time, alias.clone());
            self.probe_until_served(&alias)?;
            matches.push(begin.elapsed().as_secs_f64() * 1e3);

            // A route without a pod: the request waits for one.
            let number = self.world.api.objects.len() - 1 - 2 * (time % (PROPAGATION_ROUTES / 2));
            let waiting = Probe::send(self.running.address, &format!("m{number}"));
            let mut waiting = waiting.map_err(|error| LoadtestError::io("send a request", error))?;
            self.turn_for(Duration::from_millis(100))?;
            let begin = Instant::now();
            self.world.api.objects.point_to_backend(number);
            while waiting
                .poll_status()
                .map_err(|error| LoadtestError::io("wait for an answer", error))?
                .is_none()
            {
                self.turn()?;
                if begin.elapsed() > CHANGE_TIMEOUT {
                    let why = format!("a pod of route r{number} was not found");
                    return Err(self.unsound(why));
                }
            }
            endpoints.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        self.world.due = None;
        Ok(PropagationDelays { matches, endpoints })
    }

    /// Requests a model until it is served.
    fn probe_until_served(&mut self, model: &str) -> Result<(), LoadtestError> {
        let begin = Instant::now();
        let failed = |error| LoadtestError::io("ask for a model", error);
        loop {
            let mut probe = Probe::send(self.running.address, model).map_err(failed)?;
            let status = loop {
                self.turn()?;
                match probe.poll_status().map_err(failed)? {
                    Some(status) => break status,
                    None if begin.elapsed() > CHANGE_TIMEOUT => {
                        return Err(self.unsound(format!("no answer for model {model}")));
                    }
                    None => {}
                }
            };
            match status {
                200 => return Ok(()),
                404 if begin.elapsed() < CHANGE_TIMEOUT => {}
                _ => return Err(self.unsound(format!("model {model} returned {status}"))),
            }
            self.turn_for(MODEL_POLL_INTERVAL)?;
        }
    }
}
