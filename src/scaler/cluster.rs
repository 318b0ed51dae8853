//! The keeper: tracks which pods of a target take requests, sooner than the cluster does. It scales nothing.
//!
//! One task per route. Within it a [`pod::PodSupervisor`] per pod follows its state in the cluster and its own answers;
//! [`activation`] begins cold starts and times them out.

mod activation;
mod gateway;
mod keeper;
mod pod;
mod reported_state;
mod scrape;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use super::{
    Shutdown,
    activator::{Activator, until_vacant},
    url::{address, fail_all_requests},
};
use crate::{
    admission::Gate,
    domain::{ClusterTarget, Role},
    probe::{probe_pod, resolve},
    state::{
        Discovered, DiscoveredEndpoint, Discovery, Endpoint, FrontKind, PodStart, Protocol, Status,
        TargetState,
    },
};
use keeper::{Keeper, MAX_PROBES, Prober, Resolver, probe_protocol_of};
use pod::PodSupervisor;
use reported_state::ReportedState;

/// A running [`PodSupervisor`].
struct KeptPod {
    endpoint: Arc<Endpoint>,
    reported: watch::Sender<ReportedState>,
}

/// Identity of a pod's endpoint: the same address with another protocol or role is another endpoint.
type PodKey = (Arc<str>, Protocol, Role);

/// The running pods, and their futures, which return the pod's key.
struct RunningPods {
    kept: HashMap<PodKey, KeptPod>,
    running: FuturesUnordered<BoxFuture<'static, PodKey>>,
    /// True until the first full list, whose ready pods were ready before this keeper started.
    is_first: bool,
}

/// Supervises the pods of `target` until `shutdown`.
pub(super) async fn run(
    gate: Arc<Gate>,
    target: &ClusterTarget,
    discovery: Arc<dyn Discovery>,
    shutdown: Shutdown,
) {
    let discovered = discovery.watch(target);
    let prober: Prober = Arc::new(|endpoint, readiness| {
        let (address, readiness) = (endpoint.address().to_owned(), readiness.clone());
        let speaks = probe_protocol_of(endpoint.protocol());
        async move { probe_pod(&address, speaks, &readiness).await }.boxed()
    });
    let resolver: Resolver = Arc::new(|address, limit| {
        let address = address.to_owned();
        async move { resolve(&address, limit).await.err() }.boxed()
    });
    keep(gate, target, discovered, (prober, resolver), shutdown).await;
}

async fn keep(
    gate: Arc<Gate>,
    target: &ClusterTarget,
    discovered: watch::Receiver<Arc<Discovered>>,
    (prober, resolver): (Prober, Resolver),
    shutdown: Shutdown,
) {
    let max = gate.policy().concurrency.max;
    let gateway = match target.gateway.as_deref().map(|url| address(url).ok_or(url)).transpose() {
        Ok(address) => address.map(|address| Endpoint::fronting(FrontKind::Gateway, address, max)),
        Err(url) => {
            // Validation rejects such a gateway.
            let reason = format!("the target's gateway, `{url}`, is not http://host:port");
            let mut activator = Activator::new(gate);
            return tokio::select! {
                biased; // the end first: there is nothing else to wait for
                () = shutdown.drain.cancelled() => {}
                () = fail_all_requests(&mut activator, &reason) => {}
            };
        }
    };
    let keeper = Arc::new(Keeper {
        gate: gate.clone(),
        discovered: discovered.clone(),
        pods_behind_gateway: gateway.is_some().then(TargetState::default),
        groups: target.roles.groups.keys().map(|name| name.as_str().into()).collect(),
        counts: watch::Sender::default(),
        prober,
        resolver,
        probes: Semaphore::new(MAX_PROBES),
        last_probe: Mutex::default(),
        overruled: Mutex::default(),
    });
    let mut pods = RunningPods { kept: HashMap::new(), running: FuturesUnordered::new(), is_first: true };
    if let Some(gateway) = &gateway {
        gate.target().add(gateway);
    }
    tokio::select! {
        // Shutdown first: nothing is started any more.
        biased;
        () = shutdown.drain.cancelled() => {}
        () = pods.follow(&keeper, discovered) => {}
        () = gateway::run(&keeper, gateway.as_deref()) => {}
        () = activation::run(&keeper) => {}
        () = scrape::run(&keeper) => {}
    }
    gate.demand().set_server_queue(0);
    if gate.target().is_up() {
        // Requests of a running cold start have been dispatched or have ended.
        gate.cold_starts().abandoned();
    }
    let RunningPods { kept, running, .. } = pods;
    // Drops the pods' futures first: they would consume the endpoints' notifications.
    drop(running);
    let endpoints: Vec<_> = kept.into_values().map(|kept| kept.endpoint).chain(gateway).collect();
    endpoints.iter().for_each(|endpoint| endpoint.retire());
    // The status is set before the wait: after it, another target may have taken over.
    gate.target().set_status(Status::Idle);
    let left = async {
        for endpoint in &endpoints {
            until_vacant(endpoint).await;
            gate.target().remove(endpoint);
        }
    };
    tokio::select! {
        // A kill does not wait for requests in flight.
        biased;
        () = shutdown.kill.cancelled() => {}
        () = left => {}
    }
}

// === impl RunningPods ===

impl RunningPods {
    /// Follows the discovery. Never returns.
    async fn follow(&mut self, keeper: &Arc<Keeper>, mut discovered: watch::Receiver<Arc<Discovered>>) {
        let mut is_over = false;
        loop {
            let now = discovered.borrow_and_update().clone();
            self.apply(keeper, &now);
            loop {
                tokio::select! {
                    // Changes first: a pod that is back must not be removed.
                    biased;
                    changed = discovered.changed(), if !is_over => {
                        is_over = changed.is_err();
                        break;
                    }
                    Some(key) = self.running.next() => self.ended(keeper, key),
                    else => std::future::pending().await,
                }
            }
        }
    }

    fn apply(&mut self, keeper: &Arc<Keeper>, discovered: &Discovered) {
        // Starts are recorded before the pods are updated: a pod that opens must find its own start recorded.
        let starts = discovered.starts.iter().map(|start| PodStart::clone(start));
        keeper.gate.cold_starts().observe_pods(starts);
        for endpoint in &discovered.endpoints {
            let key = key_of(endpoint);
            let reported = ReportedState::from(endpoint);
            match self.kept.get(&key) {
                Some(kept) => report(kept, reported),
                None if reported == ReportedState::Terminating => {}
                None => self.add(keeper, key, reported),
            }
        }
        if discovered.is_synced {
            let there: HashSet<_> = discovered.endpoints.iter().map(key_of).collect();
            let gone = self.kept.iter().filter(|(key, _)| !there.contains(key));
            gone.for_each(|((address, ..), kept)| {
                report(
                    kept,
                    if discovered.dead.contains(address) { ReportedState::Dead } else { ReportedState::Gone },
                );
            });
            self.is_first = false;
            keeper.update_counts(|counts| counts.is_synced = true);
        }
    }

    fn add(&mut self, keeper: &Arc<Keeper>, key: PodKey, reported: ReportedState) {
        let max = keeper.gate.policy().concurrency.max;
        let endpoint = Endpoint::speaking(key.1, &*key.0, max);
        let role = key.2;
        if !role.is_helper {
            keeper.pods().add(&endpoint);
        }
        let is_warm = self.is_first && reported == ReportedState::Ready;
        let (sender, reported) = watch::channel(reported);
        self.kept.insert(key.clone(), KeptPod { endpoint: endpoint.clone(), reported: sender });
        let pod = PodSupervisor::new(keeper.clone(), endpoint, role, reported, is_warm);
        self.running.push(
            async move {
                pod.run().await;
                key
            }
            .boxed(),
        );
    }

    /// Removes a pod that was deleted or has left the target, once nothing is in flight on it.
    fn ended(&mut self, keeper: &Arc<Keeper>, key: PodKey) {
        let Some(kept) = self.kept.remove(&key) else { return };
        keeper.pods().remove(&kept.endpoint);
        let reported = *kept.reported.borrow();
        if !matches!(reported, ReportedState::Gone | ReportedState::Dead) {
            // The pod was reported again at the same moment.
            self.add(keeper, key, reported);
        }
    }
}

fn key_of(endpoint: &DiscoveredEndpoint) -> PodKey {
    (endpoint.address.clone(), endpoint.protocol, endpoint.role)
}

fn report(kept: &KeptPod, reported: ReportedState) {
    kept.reported.send_if_modified(|known| std::mem::replace(known, reported) != reported);
}

#[cfg(test)]
mod tests;
