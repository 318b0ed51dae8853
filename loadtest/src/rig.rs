//! The measuring side: one event loop runs the clients and the backend.
//!
//! Clients and backend exchange messages without a wake-up, and the loop never sleeps while it measures, so the
//! contender never waits for it: proxies are compared by their own work, not by the time a virtual core takes to
//! leave its idle state.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mio::{Events, Poll, Registry};

use crate::backend::Backend;
use crate::clients::{Clients, MeasuredClients};
use crate::clock::Instant;
use crate::contender::StartedContender;
use crate::error::LoadtestError;
use crate::generator::ClosedLoop;
use crate::procfs::{CpuUsage, Meter};

/// Time to wait for responses at the end of a measurement, after the last request.
const LAST_RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time a contender may take to respond to its first request.
const FIRST_RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout of one attempt within [`FIRST_RESPONSE_TIMEOUT`]; long, because Anteroom holds the request until its own
/// health check has passed.
const START_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after a failed attempt.
const CONNECT_RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// The event loop and its backend.
#[derive(Debug)]
pub(crate) struct Rig {
    poll: Poll,
    events: Events,
    backend: Backend,
    stop: Arc<AtomicBool>,
}

/// Parameters of a measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MeasurementPlan {
    pub(crate) connections: usize,
    pub(crate) warm_up: Duration,
    pub(crate) duration: Duration,
}

/// An interval in which the event loop ran.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) elapsed: Duration,
    /// Time spent polling without any event or work.
    pub(crate) idle: Duration,
    pub(crate) spent: CpuUsage,
}

/// Result of a measurement.
#[derive(Debug)]
pub(crate) struct Measurement {
    pub(crate) elapsed: Duration,
    pub(crate) requests: u64,
    pub(crate) errors: u64,
    pub(crate) first_error: Option<String>,
    pub(crate) unanswered: usize,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    pub(crate) p999: Duration,
    pub(crate) spent: CpuUsage,
    /// Time spent polling without any event or work.
    pub(crate) idle: Duration,
    /// Connections accepted by the backend after the warm-up.
    pub(crate) reconnects: u64,
}

// === impl Rig ===

impl Rig {
    pub(crate) fn new(stop: Arc<AtomicBool>) -> Result<Self, LoadtestError> {
        let poll = Poll::new().map_err(|error| LoadtestError::io("make an event loop", error))?;
        let backend =
            Backend::bind(poll.registry()).map_err(|error| LoadtestError::io("start the backend", error))?;
        Ok(Self { poll, events: Events::with_capacity(1024), backend, stop })
    }

    pub(crate) fn backend(&self) -> SocketAddr {
        self.backend.address()
    }

    /// Returns `true` if a request to `address` succeeds within `patience`. Every attempt runs the event loop, so the
    /// backend responds to health checks of the contender even while attempts fail.
    pub(crate) fn responds_within(
        &mut self,
        address: SocketAddr,
        patience: Duration,
    ) -> Result<bool, LoadtestError> {
        let Ok(mut load) = ClosedLoop::connect(self.poll.registry(), address, 1) else {
            self.run(None, CONNECT_RETRY_INTERVAL)?;
            return Ok(false);
        };
        load.start(1);
        self.drain(&mut load, patience)?;
        let answered = load.waiting() == 0 && load.tally().errors == 0;
        if !answered {
            self.run(None, CONNECT_RETRY_INTERVAL)?;
        }
        Ok(answered)
    }

    /// Returns the backend, for scenarios that configure it.
    pub(crate) fn backend_mut(&mut self) -> &mut Backend {
        &mut self.backend
    }

    pub(crate) fn registry(&self) -> &Registry {
        self.poll.registry()
    }

    /// Measures [`PROMPT`](crate::generator::PROMPT) in a closed loop.
    pub(crate) fn measure(
        &mut self,
        address: SocketAddr,
        plan: MeasurementPlan,
        meter: Meter,
    ) -> Result<Measurement, LoadtestError> {
        let mut load = ClosedLoop::connect(self.registry(), address, plan.connections)
            .map_err(|error| LoadtestError::io("measure", error))?;
        load.start(u64::MAX);
        self.measure_load(&mut load, plan, meter)
    }

    /// Measures clients that are connected and started.
    pub(crate) fn measure_load(
        &mut self,
        load: &mut impl MeasuredClients,
        plan: MeasurementPlan,
        meter: Meter,
    ) -> Result<Measurement, LoadtestError> {
        self.run(Some(load), plan.warm_up)?;
        load.reset();
        let accepted = self.backend.accepted();
        let Window { elapsed, idle, spent } = self.window(load, plan.duration, meter)?;
        let reconnects = self.backend.accepted() - accepted;
        let requests = load.tally().completed;

        load.finish();
        self.drain(load, LAST_RESPONSE_TIMEOUT)?;
        // Includes the last responses, which may be the slowest.
        let tally = load.tally();
        let quantile = |q| Duration::from_nanos(tally.latency.value_at_quantile(q));
        Ok(Measurement {
            elapsed,
            requests,
            errors: tally.errors,
            first_error: tally.first_error.clone(),
            unanswered: load.waiting(),
            p50: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            spent,
            idle,
            reconnects,
        })
    }

    /// Runs the loop for `duration` and returns its times.
    pub(crate) fn window(
        &mut self,
        load: &mut dyn Clients,
        duration: Duration,
        meter: Meter,
    ) -> Result<Window, LoadtestError> {
        let failed = |error: io::Error| LoadtestError::io("measure", error);
        let before = meter.read().map_err(failed)?;
        let (elapsed, idle) = self.run(Some(load), duration)?;
        let after = meter.read().map_err(failed)?;
        Ok(Window { elapsed, idle, spent: before.until(&after) })
    }

    /// Runs the loop until `done` returns `true` or `patience` has passed; returns `true` if done.
    pub(crate) fn until<C: Clients>(
        &mut self,
        load: &mut C,
        patience: Duration,
        done: impl Fn(&C, &mut Backend) -> bool,
    ) -> Result<bool, LoadtestError> {
        let deadline = Instant::now() + patience;
        while !done(load, &mut self.backend) {
            if load.must_abandon() || Instant::now() >= deadline {
                return Ok(false);
            }
            self.turn(Some(load))?;
        }
        Ok(true)
    }

    /// Waits until `running` responds. Fails with its log if it exits or takes longer than [`FIRST_RESPONSE_TIMEOUT`].
    pub(crate) fn await_answer(
        &mut self,
        contender: &'static str,
        running: &mut StartedContender,
    ) -> Result<(), LoadtestError> {
        let deadline = Instant::now() + FIRST_RESPONSE_TIMEOUT;
        loop {
            if self.responds_within(running.address, START_ATTEMPT_TIMEOUT)? {
                return Ok(());
            }
            running.check_start(contender, deadline)?;
        }
    }

    /// Runs the loop without sleeping for `duration`, or until the load is hopeless. Returns the elapsed and the idle
    /// time.
    pub(crate) fn run(
        &mut self,
        mut load: Option<&mut dyn Clients>,
        duration: Duration,
    ) -> Result<(Duration, Duration), LoadtestError> {
        let start = Instant::now();
        let (mut elapsed, mut idle) = (Duration::ZERO, Duration::ZERO);
        loop {
            // Reborrowed explicitly: the lifetime of a `dyn` inside an `Option` is not shortened implicitly.
            let events = self.turn(match &mut load {
                Some(load) => Some(&mut **load),
                None => None,
            })?;
            let before = std::mem::replace(&mut elapsed, start.elapsed());
            if events == 0 {
                idle += elapsed - before;
            }
            if elapsed >= duration || load.as_ref().is_some_and(|load| load.must_abandon()) {
                return Ok((elapsed, idle));
            }
        }
    }

    /// Waits for the responses to all requests sent.
    fn drain(&mut self, load: &mut impl MeasuredClients, patience: Duration) -> Result<(), LoadtestError> {
        self.until(load, patience, |load, _| load.waiting() == 0).map(drop)
    }

    /// Polls once, handles the events and due work, and returns the amount of work done.
    pub(crate) fn turn(&mut self, mut load: Option<&mut dyn Clients>) -> Result<usize, LoadtestError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(LoadtestError::Interrupted);
        }
        match self.poll.poll(&mut self.events, Some(Duration::ZERO)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(0),
            Err(error) => return Err(LoadtestError::io("look for events", error)),
        }
        let mut events = 0;
        let registry = self.poll.registry();
        for event in &self.events {
            events += 1;
            let token = event.token();
            let handled = if Backend::owns(token) {
                self.backend.on_event(registry, token)
            } else if let Some(load) = &mut load {
                load.on_event(registry, token)
            } else {
                Ok(())
            };
            handled.map_err(|error| LoadtestError::io("exchange messages", error))?;
        }
        let due = self.backend.on_turn().and_then(|due| match &mut load {
            Some(load) => load.on_turn(&mut self.backend).map(|more| due + more),
            None => Ok(due),
        });
        Ok(events + due.map_err(|error| LoadtestError::io("exchange messages", error))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cores::Cores;

    fn rig() -> (Rig, Arc<AtomicBool>, Meter) {
        let stop = Arc::new(AtomicBool::new(false));
        let meter = Meter { cores: Cores::choose().unwrap(), contender: None };
        (Rig::new(Arc::clone(&stop)).unwrap(), stop, meter)
    }

    const PLAN: MeasurementPlan = MeasurementPlan {
        connections: 8,
        warm_up: Duration::from_millis(20),
        duration: Duration::from_millis(100),
    };

    #[test]
    fn clients_and_backend_exchange_messages() {
        let (mut rig, _stop, meter) = rig();
        let backend = rig.backend();
        assert!(rig.responds_within(backend, Duration::from_secs(5)).unwrap());

        let sample = rig.measure(backend, PLAN, meter).unwrap();

        assert_eq!((sample.errors, sample.unanswered, sample.reconnects), (0, 0, 0), "{sample:?}");
        assert!(sample.requests > 8, "{sample:?}");
        assert!(sample.elapsed >= PLAN.duration && sample.p50 <= sample.p99, "{sample:?}");
    }

    #[test]
    fn missing_server_does_not_respond() {
        let (mut rig, _stop, _meter) = rig();
        let gone = {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap()
        };
        assert!(!rig.responds_within(gone, Duration::from_millis(20)).unwrap());
    }

    #[test]
    fn closed_connection_is_an_error_and_ends_early() {
        let (mut rig, _stop, meter) = rig();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // The thread ends with the process.
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                drop(stream)
            }
        });

        let plan = MeasurementPlan { duration: Duration::from_secs(20), ..PLAN };
        let sample = rig.measure(address, plan, meter).unwrap();

        assert!(sample.errors >= 100, "{sample:?}");
        assert!(sample.elapsed < plan.duration, "{sample:?}");
    }

    #[test]
    fn signal_ends_the_measurement() {
        let (mut rig, stop, meter) = rig();
        stop.store(true, Ordering::Relaxed);
        let backend = rig.backend();
        assert!(matches!(rig.measure(backend, PLAN, meter), Err(LoadtestError::Interrupted)));
    }
}
