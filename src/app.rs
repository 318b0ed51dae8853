//! Wiring: binds all ports, then runs, reloads and stops the components in order.

mod account;
mod background;
mod cluster;
mod cold_start_report;
mod control;
mod exporting;
mod files;
mod obstacles;
mod pushes;
mod routes;
mod start_error;
mod workers;

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admin::{Admin, ColdStartMetrics},
    admission::Directory,
    coldstart::{ColdStart, ColdStartOutcome, ColdStarts, Journal},
    config::Config,
    domain::{Phase, Route},
    drain::{Drain, DrainTimes, StopSignal},
    kube::{Cluster, Endpoints, PodWatches},
    proxy::{self, Shared},
    scaler,
    telemetry::traces::{Export, SpanQueue},
};
pub use account::Account;
use background::BackgroundRuntime;
use cluster::ClusterWatch;
use control::BoundListeners;
use exporting::Exporting;
pub use files::raise_file_limit;
use obstacles::ObstacleSources;
use routes::Routes;
pub use start_error::StartError;
use workers::Workers;

/// The proxy with all ports bound, not running yet.
pub struct BoundProxy {
    /// Address of the API.
    pub address: SocketAddr,
    /// Address of the admin API and metrics.
    pub admin_address: SocketAddr,
    /// Address of the scaler for KEDA.
    pub scaler_address: Option<SocketAddr>,
    /// Address for other replicas.
    pub peers_address: Option<SocketAddr>,
    config: Config,
    listeners: Vec<std::net::TcpListener>,
    admin: TcpListener,
    control: BoundListeners,
    directory: Arc<Directory>,
    shared: Arc<Shared>,
    cold_starts: Arc<ColdStarts>,
    cold_start_metrics: ColdStartMetrics,
    journal: Option<Journal>,
    options: scaler::Options,
    /// Runtime for the cluster, if one is configured.
    background: Option<BackgroundRuntime>,
    cluster: Option<Cluster>,
    export: Option<Export>,
    obstacles: Option<ObstacleSources>,
    /// All routes, of the file and the cluster.
    routes: watch::Sender<Arc<Vec<Arc<Route>>>>,
}

/// Command to the running proxy.
#[derive(Debug)]
pub enum Command {
    /// Apply a new configuration.
    Reload(Box<Config>),
    /// Replace the routes of the cluster. They must be valid, and must not conflict with each other or with those of the
    /// file.
    ClusterRoutes(Arc<Vec<Arc<Route>>>),
    /// Drain and stop; a second one stops immediately.
    Stop(StopSignal),
}

// === impl BoundProxy ===

impl BoundProxy {
    /// Binds all ports.
    ///
    /// # Errors
    ///
    /// If a port cannot be bound; the others are released.
    pub async fn new(config: Config, mut options: scaler::Options) -> Result<Self, StartError> {
        let count = config.workers.map_or_else(cores, std::num::NonZero::get);
        let failed = |key, address| move |source| StartError::Listen { key, address, source };
        let listeners = proxy::bind(config.listen, count).map_err(failed("listen", config.listen))?;
        let admin = TcpListener::bind(config.admin).await.map_err(failed("admin", config.admin))?;
        let address = listeners[0].local_addr().map_err(failed("listen", config.listen))?;
        // The name is unique among running proxies, and stays the same after a restart.
        options.instance.get_or_insert_with(|| address.to_string().into());
        let admin_address = admin.local_addr().map_err(failed("admin", config.admin))?;
        let control = BoundListeners::bind(&config).await?;
        let cold_start_metrics = ColdStartMetrics::default();
        let background = match &config.kubernetes {
            Some(_) => Some(BackgroundRuntime::new().map_err(StartError::Background)?),
            None => None,
        };
        let handle = background.as_ref().and_then(BackgroundRuntime::handle);
        let cluster = match &config.kubernetes {
            Some(kubernetes) => Some(Cluster::new(kubernetes, handle).await?),
            None => None,
        };
        let routes = watch::Sender::default();
        let obstacles = cluster.as_ref().map(|cluster| {
            let pods = PodWatches::new(cluster.clone());
            options.discovery = Arc::new(Endpoints::new(cluster.clone(), pods.clone()));
            ObstacleSources::new(cluster, pods, routes.subscribe(), &mut options)
        });
        let metrics = cold_start_metrics.clone();
        let notifier = obstacles.as_ref().map(|obstacles| obstacles.notifier().clone());
        let cold_starts = ColdStarts::new(move |cold_start| {
            metrics.record(cold_start);
            log_cold_start(cold_start);
            if let Some(notifier) = &notifier {
                notifier.cold_start(cold_start);
            }
        });
        let journal = match &config.report {
            Some(report) => {
                let (journal, records) =
                    Journal::open(Path::new(&report.dir), report.max_bytes.get(), report.files)?;
                cold_starts.restore(records);
                Some(journal)
            }
            None => None,
        };
        let shared = Shared::new(files::fit(config.limits, None));
        shared.cross_site.set(&config, address);
        shared.history.set_max(config.history.requests);
        shared.access_log.store(config.log.access, Ordering::Relaxed);
        let mut export = None;
        if let Some(config) = &config.traces {
            let (traces, exporting) = SpanQueue::with_exporter(config)?;
            // Cannot fail: `shared` is new.
            let _ = shared.traces.set(traces);
            export = Some(exporting);
        }
        Ok(Self {
            address,
            admin_address,
            scaler_address: control.scaler_address(),
            peers_address: control.peers_address(),
            config,
            listeners,
            admin,
            control,
            directory: Arc::default(),
            shared,
            cold_starts,
            cold_start_metrics,
            journal,
            options,
            background,
            cluster,
            export,
            obstacles,
            routes,
        })
    }

    /// Returns the state shared by worker threads; routes are in place once [`Self::run`] has started.
    pub const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Returns the routes by name; they are in place once [`Self::run`] has started.
    pub const fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Returns the records of cold starts.
    pub const fn cold_starts(&self) -> &Arc<ColdStarts> {
        &self.cold_starts
    }

    /// Runs until stopped, and returns the account of all requests.
    pub async fn run(self, mut commands: mpsc::Receiver<Command>) -> Account {
        let drain = Drain::default();
        let tasks = TaskTracker::new();
        let stopped = CancellationToken::new();
        let journal =
            self.journal.map(|journal| tokio::spawn(journal.run(self.cold_starts.clone(), stopped.clone())));
        let times =
            DrainTimes { delay: self.config.drain_delay.get(), timeout: self.config.drain_timeout.get() };
        let mut routes = Routes::new(
            self.shared.clone(),
            self.cold_starts.clone(),
            self.options,
            self.routes,
            self.directory.clone(),
            self.scaler_address.is_some(),
            self.background.as_ref().and_then(BackgroundRuntime::handle).cloned(),
        );
        routes.apply(&cluster::merged(&self.config.routes, &[])).await;
        let notifier = self.obstacles.as_ref().map(|obstacles| obstacles.notifier().clone());
        let mut cluster =
            ClusterWatch::start(self.cluster, notifier, &self.config, &self.shared, &self.cold_starts);
        if let Some(obstacles) = self.obstacles {
            obstacles.start(self.shared.clone());
        }
        self.shared.awaits_routes.store(cluster.is_some(), Ordering::Relaxed);
        let control = self.control.start(self.directory);
        let exporting = self.export.map(Exporting::start);
        let workers = Workers::start(self.listeners, &self.shared, &drain, &tasks);
        let admin = Admin::new(
            Arc::new(control.view(
                self.address,
                self.shared.clone(),
                cluster.as_ref().map(ClusterWatch::view),
            )),
            self.cold_starts,
            &self.cold_start_metrics,
            drain.unready.clone(),
            drain.cut.child_token(),
        );
        let showing = tokio::spawn(admin.run());
        let admin = tokio::spawn(admin.serve(self.admin));
        tracing::info!(address = %self.address, admin = %self.admin_address, routes = routes.len(), "listening");

        let mut running = self.config;
        let mut found = Arc::<Vec<Arc<Route>>>::default();
        let stop = loop {
            let command = tokio::select! {
                // Commands take precedence over changes in the cluster.
                biased;
                command = commands.recv() => command,
                found = ClusterWatch::changed(&mut cluster) => Some(Command::ClusterRoutes(found)),
            };
            match command {
                Some(Command::Reload(config)) => {
                    routes.apply(&cluster::merged(&config.routes, &found)).await;
                    if let Some(cluster) = &cluster {
                        cluster.set_file(&config.routes);
                    }
                    self.shared.set_limits(files::fit(config.limits, Some(running.limits)));
                    self.shared.cross_site.set(&config, self.address);
                    self.shared.history.set_max(config.history.requests);
                    self.shared.access_log.store(config.log.access, Ordering::Relaxed);
                    warn_of_restart(&running, &config);
                    running = *config;
                    tracing::info!(routes = routes.len(), "configuration reloaded");
                }
                Some(Command::ClusterRoutes(now)) => {
                    found = now;
                    routes.apply(&cluster::merged(&running.routes, &found)).await;
                    self.shared.awaits_routes.store(false, Ordering::Relaxed);
                    tracing::info!(
                        routes = routes.len(),
                        cluster = found.len(),
                        "routes of the cluster changed"
                    );
                }
                Some(Command::Stop(stop)) => break stop,
                None => break StopSignal::Terminate,
            }
        };

        // The stages of draining run to their end, unless a second stop cuts them short.
        control.drain();
        self.shared.draining.store(true, Ordering::Relaxed);
        {
            let draining = drain_in_order(&drain, times, stop, &routes, &tasks);
            tokio::select! {
                // Draining may be complete already.
                biased;
                () = draining => {}
                () = second_stop(&mut commands) => tracing::warn!("second stop request: cutting off requests in flight"),
            }
        }
        self.shared.drain_timed_out.store(true, Ordering::Relaxed);
        drain.closing.cancel();
        drain.cut.cancel();
        workers.join().await;
        if let Some(cluster) = cluster {
            cluster.stop().await;
        }
        control.stop().await;
        routes.stop().await;
        let _ = showing.await;
        // The export stops after the last request, and before the admin API with the span metrics stops.
        if let Some(exporting) = exporting {
            exporting.stop().await;
        }
        admin.abort();
        stopped.cancel();
        if let Some(journal) = journal {
            // The journal task ends by itself once the last record is on disk.
            let _ = journal.await;
        }
        let account = routes.account();
        tracing::info!(
            admitted = account.admitted,
            outcomes = %account.outcomes.iter().map(|(name, count)| format!("{name}={count}")).collect::<Vec<_>>().join(" "),
            held = account.held,
            in_flight = account.in_flight,
            "stopped"
        );
        account
    }
}

async fn second_stop(commands: &mut mpsc::Receiver<Command>) {
    while let Some(command) = commands.recv().await {
        if let Command::Stop(_) = command {
            return;
        }
    }
    std::future::pending().await
}

async fn drain_in_order(
    drain: &Drain,
    times: DrainTimes,
    stop: StopSignal,
    routes: &Routes,
    tasks: &TaskTracker,
) {
    let delay = if stop == StopSignal::Terminate { times.delay } else { Duration::ZERO };
    tracing::info!(delay_s = delay.as_secs_f64(), timeout_s = times.timeout.as_secs_f64(), "draining");
    drain.unready.store(true, Ordering::Relaxed);
    routes.drain();
    sleep(delay).await;
    drain.closing.cancel();
    tasks.close();
    let finished = async {
        let evicted = async {
            sleep(times.held_request_timeout()).await;
            routes.evict();
            sleep(times.timeout - times.held_request_timeout()).await;
        };
        tokio::select! {
            // All requests may have finished already.
            biased;
            () = tasks.wait() => {}
            () = evicted => {}
        }
    };
    finished.await;
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn warn_of_restart(running: &Config, new: &Config) {
    for (key, changed) in [
        ("listen", running.listen != new.listen),
        ("admin", running.admin != new.admin),
        ("scaler", running.scaler != new.scaler),
        ("scalerTls", running.scaler_tls != new.scaler_tls),
        ("peers", running.peers != new.peers),
        ("kubernetes", running.kubernetes != new.kubernetes),
        ("report", running.report != new.report),
        ("traces", running.traces != new.traces),
        ("workers", running.workers != new.workers),
        ("log.format", running.log.format != new.log.format),
        ("drainDelay", running.drain_delay != new.drain_delay),
        ("drainTimeout", running.drain_timeout != new.drain_timeout),
    ] {
        if changed {
            tracing::warn!(key, "changing this key requires a restart");
        }
    }
}

fn log_cold_start(cold_start: &ColdStart) {
    // Each phase has its own log field, so that durations are numbers in JSON.
    let ms = |name: Phase| {
        cold_start
            .finished_phases()
            .find(|span| span.name == name)
            .map(|span| span.duration_ms.round() as u64)
    };
    let outcome = cold_start.outcome.map_or("", ColdStartOutcome::name);
    tracing::info!(
        route = %cold_start.route,
        id = cold_start.id,
        kind = cold_start.kind.name(),
        outcome,
        total_ms = cold_start.total_ms.round(),
        phases.signal_ms = ms(Phase::Signal),
        phases.scale_ms = ms(Phase::Scale),
        phases.create_ms = ms(Phase::Create),
        phases.schedule_ms = ms(Phase::Schedule),
        phases.pull_ms = ms(Phase::Pull),
        phases.start_ms = ms(Phase::Start),
        phases.load_ms = ms(Phase::Load),
        phases.propagate_ms = ms(Phase::Propagate),
        phases.dispatch_ms = ms(Phase::Dispatch),
        phases.first_byte_ms = ms(Phase::FirstByte),
        phases.first_token_ms = ms(Phase::FirstToken),
        held_peak = cold_start.held_peak,
        reason = cold_start.reason.as_deref().map(tracing::field::display),
        "cold start"
    );
}
