//! A gateway in front of the pods: the target's only endpoint, open while pods take requests.

use std::{future::pending, pin::pin, time::Duration};

use tokio::{
    join,
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    super::{
        activator::{Activator, until_suspect},
        probe_reporter::ProbeReporter,
    },
    keeper::{Keeper, PodCounts},
};
use crate::{
    domain::Phase,
    probe::ProbeResult,
    state::{Endpoint, Front},
};

/// Longest backoff. With ready pods, a gateway that rejects a request has usually not noticed them yet: a try is cheap, and
/// the backoff adds to the cold start.
const MAX_GATEWAY_BACKOFF: Duration = Duration::from_millis(250);

/// Time in which other answers may clear a gateway that broke off a request.
const GATEWAY_DOUBT_GRACE: Duration = Duration::from_millis(50);

/// Keeps the gateway open while pods take requests. Never returns.
///
/// A gateway notices its pods later than this proxy and answers with errors until then. Its health path may answer at
/// zero, so after the backoff a single request is the probe. If a server may have run the failed request, the health
/// path is probed first, so that no request is sent more than twice. The ramp widens while the pods answer probes.
pub(super) async fn run(keeper: &Keeper, gateway: Option<&Endpoint>) {
    let Some(gateway) = gateway else { return pending().await };
    let activator = Activator::new(keeper.gate.clone());
    let mut counts = keeper.counts.subscribe();
    loop {
        let mut servers = until_open_pods_differ(0, &mut counts).await;
        keeper.gate.target().set_servers(gateway, servers, 0);
        gateway.front().into_iter().for_each(Front::found_ready);
        keeper.open(&activator, gateway, Some(sum_of_pod_limits(keeper)));
        keeper.update_counts(|counts| counts.open = 1);
        while servers > 0 {
            tokio::select! {
                biased; // the pods first: without them the gateway cannot serve
                now = until_open_pods_differ(servers, &mut counts) => {
                    servers = now;
                    let start = keeper.gate.policy().concurrency.ramp_start;
                    keeper.gate.target().set_servers(gateway, servers, start);
                }
                () = until_suspect(gateway, async || { sleep(GATEWAY_DOUBT_GRACE).await; ProbeResult::TimedOut(GATEWAY_DOUBT_GRACE.into()) }) => {
                    keeper.gate.cold_starts().reopen(Phase::Propagate);
                    keeper.update_counts(|counts| (counts.open, counts.doubtful) = (0, 1));
                    let unresolved;
                    (servers, unresolved) =
                        join!(back_off(gateway, servers, &mut counts), keeper.resolve(gateway));
                    if let Some(answer) = unresolved {
                        servers = until_resolved(keeper, gateway, answer, servers, &mut counts).await;
                    }
                    if servers > 0 && gateway.front().is_some_and(Front::take_probe_required) {
                        servers = until_answered(keeper, gateway, servers, &mut counts).await;
                    }
                    keeper.gate.target().set_servers(gateway, servers, 0);
                    if servers > 0 {
                        // Keeps the limit of one request that suspicion has set; the ramp widens it.
                        keeper.open(&activator, gateway, None);
                    }
                    keeper.update_counts(|counts| (counts.open, counts.doubtful) = (servers.min(1), 0));
                }
                () = activator.widen_ramp(gateway, || keeper.probe_open_pods()) => {}
            }
        }
        gateway.retire();
        keeper.update_counts(|counts| counts.open = 0);
    }
}

/// Waits for the backoff, or until no pod is left. Returns the number of pods.
async fn back_off(gateway: &Endpoint, mut servers: u32, counts: &mut watch::Receiver<PodCounts>) -> u32 {
    let until = Instant::now() + gateway.backoff().min(MAX_GATEWAY_BACKOFF);
    while servers > 0 {
        tokio::select! {
            biased; // as above
            now = until_open_pods_differ(servers, counts) => servers = now,
            () = sleep_until(until) => break,
        }
    }
    servers
}

/// Waits until the gateway's name resolves, or until no pod is left; reports `answer`, the failure, meanwhile. Returns the
/// number of pods.
async fn until_resolved(
    keeper: &Keeper,
    gateway: &Endpoint,
    mut answer: ProbeResult,
    mut servers: u32,
    counts: &mut watch::Receiver<PodCounts>,
) -> u32 {
    let mut reporter = ProbeReporter::new(keeper.gate.clone());
    while servers > 0 {
        reporter.record(gateway.address(), &answer);
        let again = async {
            sleep(MAX_GATEWAY_BACKOFF).await;
            keeper.resolve(gateway).await
        };
        tokio::select! {
            biased; // as above
            now = until_open_pods_differ(servers, counts) => servers = now,
            again = again => match again {
                Some(again) => answer = again,
                None => break,
            },
        }
    }
    servers
}

/// Waits until the gateway answers the health path, up to the policy's time for noticing pods, or until no pod is left.
/// Returns the number of pods.
async fn until_answered(
    keeper: &Keeper,
    gateway: &Endpoint,
    mut servers: u32,
    counts: &mut watch::Receiver<PodCounts>,
) -> u32 {
    let within = keeper.gate.policy().gateway.not_yet.within.get();
    let answered = async {
        while keeper.probe_bounded(gateway).await.is_without_server() {
            sleep(MAX_GATEWAY_BACKOFF).await;
        }
    };
    let mut answered = pin!(timeout(within, answered));
    while servers > 0 {
        tokio::select! {
            biased; // as above
            now = until_open_pods_differ(servers, counts) => servers = now,
            _ = &mut answered => break,
        }
    }
    servers
}

/// Waits until the number of open pods is not `servers`, and returns it. Cancel-safe.
async fn until_open_pods_differ(servers: u32, counts: &mut watch::Receiver<PodCounts>) -> u32 {
    match counts.wait_for(|counts| counts.pods != servers).await.map(|counts| counts.pods) {
        Ok(servers) => servers,
        // The keeper was dropped.
        Err(_) => pending().await,
    }
}

/// Returns the sum of the limits of the open pods.
fn sum_of_pod_limits(keeper: &Keeper) -> u32 {
    let pods = keeper.pods().endpoints();
    pods.iter().filter(|pod| pod.is_ready()).fold(0, |sum, pod| sum.saturating_add(pod.limit()))
}
