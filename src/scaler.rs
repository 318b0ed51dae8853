//! Brings targets up and down: the launcher of processes, the prober of servers that are scaled elsewhere, and the keeper
//! of pods in a cluster.

mod activator;
mod backoff;
mod cluster;
pub mod keda;
mod kubernetes;
mod output;
mod probe_reporter;
mod process;
mod server;
mod sleep;
mod url;

use std::{path::PathBuf, sync::Arc};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    admission::Gate,
    coldstart::TargetKind,
    domain::Target,
    state::{Discovery, NoDiscovery, NoScale, Scale},
};

/// Options of all supervisors of this process.
#[derive(Clone)]
pub struct Options {
    /// Executable whose `guardian` subcommand starts model servers.
    pub guardian: PathBuf,
    /// Soft limit of open files for model servers; `None` leaves them the limit of this process.
    pub open_files: Option<u64>,
    /// Name that is unique among the running proxies of this machine and the same after a restart. With it, a model server
    /// waits for the one that the previous run of this proxy has left.
    pub instance: Option<Arc<str>>,
    /// Discovery of the targets' pods.
    pub discovery: Arc<dyn Discovery>,
    /// Scale subresource of workloads, for routes with `scaleBy: kubernetes`.
    pub scale: Arc<dyn Scale>,
}

/// Ends the supervision of a target in two stages.
#[derive(Clone, Debug)]
pub struct Shutdown {
    /// Send nothing more; let requests in flight finish.
    drain: CancellationToken,
    /// Stop now. Implies `drain`.
    kill: CancellationToken,
}

/// Brings the target of a route up when it is wanted and down when it is idle, until `shutdown`. Runs once per route.
///
/// When another target is published, requests in flight on the old one finish and held ones stay in the queue. An old
/// process must end first, since two might not fit on the machine; an old url or pods are not waited for. Dropping the
/// future is safe: its guardian ends the process.
pub async fn supervise(
    gate: Arc<Gate>,
    mut targets: watch::Receiver<Target>,
    options: Options,
    shutdown: Shutdown,
) {
    let mut leaving = FuturesUnordered::new();
    loop {
        let target = targets.borrow_and_update().clone();
        let ours = shutdown.for_one_target();
        let mut running = Box::pin(run(gate.clone(), target.clone(), options.clone(), ours.clone()));
        let replaced = async {
            // Without a publisher the target stays.
            while targets.changed().await.is_ok() {
                if *targets.borrow_and_update() != target {
                    return;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            // Returns only on shutdown, and then nothing is replaced.
            biased;
            () = &mut running => {
                while leaving.next().await.is_some() {}
                let reason = "the proxy was stopped before the target was up";
                return gate.cold_starts().failed(reason.into(), Vec::new());
            }
            () = async { while leaving.next().await.is_some() {} std::future::pending().await } => {}
            () = replaced => {
                tracing::info!(route = %gate.key(), "the target of the route is replaced");
                ours.drain();
            }
        }
        match target {
            Target::Process(_) => running.await,
            // One poll suffices to retire the endpoints and to publish that.
            Target::Url(_) | Target::Cluster(_) if (&mut running).now_or_never().is_none() => {
                leaving.push(running);
            }
            Target::Url(_) | Target::Cluster(_) => {}
        }
        // Held requests stay; the next activation begins at the arrival of the first.
        gate.cold_starts().failed("the target was replaced before it was up".into(), Vec::new());
    }
}

async fn run(gate: Arc<Gate>, target: Target, options: Options, shutdown: Shutdown) {
    match target {
        Target::Process(target) => {
            gate.cold_starts().set_target_kind(TargetKind::Process);
            process::Launcher::new(gate, target, &options, shutdown).run().await;
        }
        Target::Url(url) => {
            gate.cold_starts().set_target_kind(TargetKind::Url);
            let scaling = scale(gate.clone(), options.scale, shutdown.clone());
            tokio::join!(url::run(gate, &url, shutdown), scaling);
        }
        Target::Cluster(target) => {
            gate.cold_starts().set_target_kind(TargetKind::Cluster);
            let scaling = scale(gate.clone(), options.scale, shutdown.clone());
            tokio::join!(cluster::run(gate, &target, options.discovery, shutdown), scaling);
        }
    }
}

/// Scales the workload of a cluster route, unless something else does, until the target drains.
async fn scale(gate: Arc<Gate>, scale: Arc<dyn Scale>, shutdown: Shutdown) {
    let Some((namespace, _)) = gate.key().namespaced() else { return };
    tokio::select! {
        // The end first: nothing is started any more.
        biased;
        () = shutdown.drain.cancelled() => {}
        () = kubernetes::run(gate.clone(), namespace, scale) => {}
    }
}

// === impl Options ===

impl Default for Options {
    fn default() -> Self {
        // An upgrade may have replaced the file; the kernel's link leads to the running executable.
        let guardian = if cfg!(target_os = "linux") {
            "/proc/self/exe".into()
        } else {
            std::env::current_exe().unwrap_or_else(|_| "anteroom".into())
        };
        Self {
            guardian,
            open_files: None,
            instance: None,
            discovery: Arc::new(NoDiscovery),
            scale: Arc::new(NoScale),
        }
    }
}

// === impl Shutdown ===

impl Default for Shutdown {
    fn default() -> Self {
        let kill = CancellationToken::new();
        Self { drain: kill.child_token(), kill }
    }
}

impl Shutdown {
    /// Sends nothing more to the target, and stops it when its requests have finished.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Stops the target now, whatever is in flight.
    pub fn kill(&self) {
        self.kill.cancel();
    }

    /// Returns a handle whose `drain` leaves the other targets alone.
    fn for_one_target(&self) -> Self {
        Self { drain: self.drain.child_token(), kill: self.kill.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_guardian_is_the_running_executable() {
        let listed = std::process::Command::new(Options::default().guardian).arg("--list").output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        assert!(listed.contains("default_guardian_is_the_running_executable"), "{listed}");
    }

    #[test]
    fn kill_drains_and_replacing_one_target_does_not() {
        let shutdown = Shutdown::default();
        let ours = shutdown.for_one_target();
        ours.drain();
        assert!(!shutdown.drain.is_cancelled());
        let ours = shutdown.for_one_target();
        shutdown.kill();
        assert!(shutdown.drain.is_cancelled() && ours.drain.is_cancelled() && ours.kill.is_cancelled());
    }
}
