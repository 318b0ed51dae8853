//! A gateway before the pods: requests go there, and the pods tell whether and how many.

use std::{future::pending, pin::pin, time::Duration};

use tokio::{
    join,
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    super::{
        sight::Sight,
        wake::{Wake, suspect},
    },
    Keeper, Tally,
};
use crate::{
    domain::Phase,
    probe::Answer,
    state::{Endpoint, Front},
};

/// The longest back-off. While pods are up, a gateway that says no has mostly not noticed them yet: each try is one
/// request that it turns away by itself, and every millisecond here is one of a cold start.
const LONGEST: Duration = Duration::from_millis(250);

/// How long the answers to others are waited for that would clear a gateway which broke a request off.
const UNASKED: Duration = Duration::from_millis(50);

/// Opens the gateway while pods take requests. Never ends.
///
/// A gateway learns of its pods in its own time and answers with errors until then. Its health path may answer at zero,
/// so after the back-off the next request is the probe, alone. Only where a server may have run the request before the
/// gateway gave up is the health path asked first: a request is sent so only twice. Its ramp widens while its pods
/// answer.
pub(super) async fn run(keeper: &Keeper, gateway: Option<&Endpoint>) {
    let Some(gateway) = gateway else { return pending().await };
    let wake = Wake::new(keeper.gate.clone());
    let mut tally = keeper.tally.subscribe();
    loop {
        let mut servers = other_than(0, &mut tally).await;
        keeper.gate.target().set_servers(gateway, servers, 0);
        gateway.front().into_iter().for_each(Front::found_ready);
        keeper.open(&wake, gateway, Some(start(keeper)));
        keeper.count(|tally| tally.open = 1);
        while servers > 0 {
            tokio::select! {
                biased; // the pods first: without them there is nothing to fail
                now = other_than(servers, &mut tally) => {
                    servers = now;
                    let start = keeper.gate.policy().concurrency.ramp_start;
                    keeper.gate.target().set_servers(gateway, servers, start);
                }
                () = suspect(gateway, async || { sleep(UNASKED).await; Answer::TimedOut(UNASKED.into()) }) => {
                    keeper.gate.cold_starts().reopen(Phase::Propagate);
                    keeper.count(|tally| (tally.open, tally.doubtful) = (0, 1));
                    let unresolved;
                    (servers, unresolved) =
                        join!(back_off(gateway, servers, &mut tally), keeper.resolve(gateway));
                    if let Some(answer) = unresolved {
                        servers = until_resolved(keeper, gateway, answer, servers, &mut tally).await;
                    }
                    if servers > 0 && gateway.front().is_some_and(Front::takes_question) {
                        servers = until_answered(keeper, gateway, servers, &mut tally).await;
                    }
                    keeper.gate.target().set_servers(gateway, servers, 0);
                    if servers > 0 {
                        // It keeps the one request at a time that being suspect left it, and grows from there.
                        keeper.open(&wake, gateway, None);
                    }
                    keeper.count(|tally| (tally.open, tally.doubtful) = (servers.min(1), 0));
                }
                () = wake.widen(gateway, || keeper.ask_pods()) => {}
            }
        }
        gateway.retire();
        keeper.count(|tally| tally.open = 0);
    }
}

/// Waits for the back-off, or until there are no pods any more. Says how many there are.
async fn back_off(gateway: &Endpoint, mut servers: u32, tally: &mut watch::Receiver<Tally>) -> u32 {
    let until = Instant::now() + gateway.backoff().min(LONGEST);
    while servers > 0 {
        tokio::select! {
            biased; // as above
            now = other_than(servers, tally) => servers = now,
            () = sleep_until(until) => break,
        }
    }
    servers
}

/// Waits until the name of the gateway resolves, which this `answer` says it does not, or until there are no pods any
/// more; reports that meanwhile. Says how many pods there are.
async fn until_resolved(
    keeper: &Keeper,
    gateway: &Endpoint,
    mut answer: Answer,
    mut servers: u32,
    tally: &mut watch::Receiver<Tally>,
) -> u32 {
    let mut sight = Sight::new(keeper.gate.clone());
    while servers > 0 {
        sight.saw(gateway.address(), &answer);
        let again = async {
            sleep(LONGEST).await;
            keeper.resolve(gateway).await
        };
        tokio::select! {
            biased; // as above
            now = other_than(servers, tally) => servers = now,
            again = again => match again {
                Some(again) => answer = again,
                None => break,
            },
        }
    }
    servers
}

/// Waits until the gateway passes the health path on, or answers it, but no longer than it has to notice its pods; or
/// until there are no pods any more. Says how many there are.
async fn until_answered(
    keeper: &Keeper,
    gateway: &Endpoint,
    mut servers: u32,
    tally: &mut watch::Receiver<Tally>,
) -> u32 {
    let within = keeper.gate.policy().gateway.not_yet.within.get();
    let answered = async {
        while keeper.ask(gateway).await.is_without_server() {
            sleep(LONGEST).await;
        }
    };
    let mut answered = pin!(timeout(within, answered));
    while servers > 0 {
        tokio::select! {
            biased; // as above
            now = other_than(servers, tally) => servers = now,
            _ = &mut answered => break,
        }
    }
    servers
}

/// Waits until there are not so many pods that take requests, and says how many there are. Cancel-safe.
async fn other_than(servers: u32, tally: &mut watch::Receiver<Tally>) -> u32 {
    match tally.wait_for(|tally| tally.pods != servers).await.map(|tally| tally.pods) {
        Ok(servers) => servers,
        // The keeper has gone.
        Err(_) => pending().await,
    }
}

/// What the pods that take requests get at first, together.
fn start(keeper: &Keeper) -> u32 {
    let pods = keeper.pods().endpoints();
    pods.iter().filter(|pod| pod.is_ready()).fold(0, |sum, pod| sum.saturating_add(pod.limit()))
}
