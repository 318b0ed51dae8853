//! What brings targets up and down: the launcher of processes, the prober of servers that someone else scales, and the
//! keeper of the pods of a cluster.

mod backoff;
mod cluster;
pub mod keda;
mod kubernetes;
mod output;
mod process;
mod server;
mod sight;
mod sleep;
mod url;
mod wake;

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

/// What those who look after targets need to know of this installation.
#[derive(Clone)]
pub struct Options {
    /// The executable whose `guardian` subcommand model servers are started with.
    pub guardian: PathBuf,
    /// Soft limit of open files for model servers; `None` leaves them the limit of this process.
    pub open_files: Option<u64>,
    /// What tells this proxy apart from others on this machine: a name that no other living one has, and that the next
    /// life of this one has again. With it, a model server waits for the one that an earlier life has left.
    pub instance: Option<Arc<str>>,
    /// What finds the pods of targets.
    pub discovery: Arc<dyn Discovery>,
    /// What scales workloads of routes that say `scaleBy: kubernetes`.
    pub scale: Arc<dyn Scale>,
}

/// How the owner of a target ends its supervision, gently first.
#[derive(Clone, Debug)]
pub struct Stops {
    retire: CancellationToken,
    stop: CancellationToken,
}

/// Brings the target of a route up when it is wanted and down when it is not, until it is told to end. One task a
/// route runs this.
///
/// When another target is published, requests in flight on the old one finish and held ones stay where they are. The
/// new one takes over when an old process has ended, since two might not fit on the machine; an old url or pod is
/// not waited for. Dropping the future is safe too: no process outlives it for long.
pub async fn supervise(
    gate: Arc<Gate>,
    mut targets: watch::Receiver<Target>,
    options: Options,
    stops: Stops,
) {
    let mut leaving = FuturesUnordered::new();
    loop {
        let target = targets.borrow_and_update().clone();
        let ours = stops.of_one_target();
        let mut running = Box::pin(run(gate.clone(), target.clone(), options.clone(), ours.clone()));
        let replaced = async {
            // Without a publisher this target is the last one.
            while targets.changed().await.is_ok() {
                if *targets.borrow_and_update() != target {
                    return;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            // It ends by itself only when it is told to, and then nothing is to be replaced.
            biased;
            () = &mut running => {
                while leaving.next().await.is_some() {}
                let reason = "the proxy was stopped before the target was up";
                return gate.cold_starts().failed(reason.into(), Vec::new());
            }
            () = async { while leaving.next().await.is_some() {} std::future::pending().await } => {}
            () = replaced => {
                tracing::info!(route = %gate.key(), "the target of the route is replaced");
                ours.retire();
            }
        }
        match target {
            Target::Process(_) => running.await,
            // Polled once, it sends nothing more there and has said so.
            Target::Url(_) | Target::Cluster(_) if (&mut running).now_or_never().is_none() => {
                leaving.push(running);
            }
            Target::Url(_) | Target::Cluster(_) => {}
        }
        // Whoever still waits has not moved, and the next activation counts from when the first of them came.
        gate.cold_starts().failed("the target was replaced before it was up".into(), Vec::new());
    }
}

async fn run(gate: Arc<Gate>, target: Target, options: Options, stops: Stops) {
    match target {
        Target::Process(target) => {
            gate.cold_starts().set_target_kind(TargetKind::Process);
            process::Launcher::new(gate, target, &options, stops).run().await;
        }
        Target::Url(url) => {
            gate.cold_starts().set_target_kind(TargetKind::Url);
            let scaling = scale(gate.clone(), options.scale, stops.clone());
            tokio::join!(url::run(gate, &url, stops), scaling);
        }
        Target::Cluster(target) => {
            gate.cold_starts().set_target_kind(TargetKind::Cluster);
            let scaling = scale(gate.clone(), options.scale, stops.clone());
            tokio::join!(cluster::run(gate, &target, options.discovery, stops), scaling);
        }
    }
}

/// Scales the workload of a route of the cluster, where nothing else is to, until the target is to go.
async fn scale(gate: Arc<Gate>, scale: Arc<dyn Scale>, stops: Stops) {
    let Some((namespace, _)) = gate.key().namespaced() else { return };
    tokio::select! {
        // The end first: nothing is woken any more.
        biased;
        () = stops.retire.cancelled() => {}
        () = kubernetes::run(gate.clone(), namespace, scale) => {}
    }
}

// === impl Options ===

impl Default for Options {
    fn default() -> Self {
        // The file may have been replaced by an upgrade since we started; the kernel's link still leads to ours.
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

// === impl Stops ===

impl Default for Stops {
    /// Nobody has told anything yet. Who stops also retires.
    fn default() -> Self {
        let stop = CancellationToken::new();
        Self { retire: stop.child_token(), stop }
    }
}

impl Stops {
    /// Nothing more is sent to the target; what is in flight finishes, and then it is stopped.
    pub fn retire(&self) {
        self.retire.cancel();
    }

    /// The target is stopped now, whatever is in flight.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Those of one target among several: retiring it leaves the others alone.
    fn of_one_target(&self) -> Self {
        Self { retire: self.retire.child_token(), stop: self.stop.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_guardian_is_the_executable_that_runs() {
        let listed = std::process::Command::new(Options::default().guardian).arg("--list").output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        assert!(listed.contains("the_default_guardian_is_the_executable_that_runs"), "{listed}");
    }

    #[test]
    fn who_stops_retires_and_who_replaces_one_target_does_not_end_the_others() {
        let stops = Stops::default();
        let ours = stops.of_one_target();
        ours.retire();
        assert!(!stops.retire.is_cancelled());
        let ours = stops.of_one_target();
        stops.stop();
        assert!(stops.retire.is_cancelled() && ours.retire.is_cancelled() && ours.stop.is_cancelled());
    }
}
