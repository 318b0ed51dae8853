//! Brings targets up and down: the launcher of processes, the prober of servers that are scaled elsewhere, and the keeper
//! of pods in a cluster.

mod activator;
mod cluster;
pub mod keda;
mod kubernetes;
mod options;
mod output;
mod probe_reporter;
mod process;
mod server;
mod shutdown;
mod sleep;
mod url;

use std::sync::Arc;

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use tokio::sync::watch;

use crate::{admission::Gate, coldstart::TargetKind, domain::Target, state::Scale};
pub use options::Options;
pub use shutdown::Shutdown;

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
            // Without a publisher the target never changes.
            while targets.changed().await.is_ok() {
                if *targets.borrow_and_update() != target {
                    return;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            // `running` returns only on shutdown, and then the target is not replaced.
            biased;
            () = &mut running => {
                while leaving.next().await.is_some() {}
                let reason = format!("{} before the target was up", shutdown.reason());
                return gate.cold_starts().failed(reason.into(), Vec::new());
            }
            () = async { while leaving.next().await.is_some() {} std::future::pending().await } => {}
            () = replaced => {
                tracing::info!(route = %gate.key(), "replacing the target of the route");
                ours.drain();
            }
        }
        match target {
            Target::Process(_) => running.await,
            // A single poll of the replaced target retires its endpoints and publishes that.
            Target::Url(_) | Target::Cluster(_) if (&mut running).now_or_never().is_none() => {
                leaving.push(running);
            }
            Target::Url(_) | Target::Cluster(_) => {}
        }
        // Held requests remain in the queue; the next activation begins at the arrival of the first.
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
            let scaling = scale_without_keda(gate.clone(), options.scale, shutdown.clone());
            tokio::join!(url::run(gate, &url, shutdown), scaling);
        }
        Target::Cluster(target) => {
            gate.cold_starts().set_target_kind(TargetKind::Cluster);
            let scaling = scale_without_keda(gate.clone(), options.scale, shutdown.clone());
            tokio::join!(cluster::run(gate, &target, options.discovery, shutdown), scaling);
        }
    }
}

/// Scales the workload of a cluster route, unless something else does, until the target drains.
async fn scale_without_keda(gate: Arc<Gate>, scale: Arc<dyn Scale>, shutdown: Shutdown) {
    let Some((namespace, _)) = gate.key().namespaced() else { return };
    tokio::select! {
        // Shutdown first: nothing is started any more.
        biased;
        () = shutdown.drain.cancelled() => {}
        () = kubernetes::run(gate.clone(), namespace, scale) => {}
    }
}
