//! Discovery of the other replicas, and following of their reports.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    task::{AbortHandle, JoinSet},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::StreamExt;

use super::{
    board::{Board, ReplicaIdentity},
    network::{Network, ReportStream},
};
use crate::{config::budget::PEER_REPLICAS, domain::Backoff};

/// Interval at which the service is resolved.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(2);

/// Timeout of one resolution.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout for the first report of a replica, including the connection.
const FIRST_REPORT_TIMEOUT: Duration = Duration::from_secs(3);

/// Backoff before reconnecting.
const MIN_RECONNECT_DELAY: Duration = Duration::from_millis(100);
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(2);

/// Delay before another connection to an address that leads to this replica, to one already followed, or to one too
/// many.
const REDIAL_DELAY: Duration = Duration::from_secs(5);

/// Tasks that follow the other replicas.
pub(super) struct Following<N> {
    follow: Arc<Follow<N>>,
    tasks: JoinSet<()>,
    followed: HashMap<SocketAddr, AbortHandle>,
}

struct Follow<N> {
    board: Arc<Board>,
    network: Arc<N>,
    /// Addresses that the service resolved to last.
    listed: Mutex<BTreeSet<SocketAddr>>,
}

/// Reason why following an address ended.
enum FollowEnd {
    /// The replica is stopping.
    Goodbye,
    /// No report arrived for too long.
    Silent,
    /// The connection failed, with the reason.
    Broken(String),
    /// The replica at the address is not to be followed, for this reason.
    Nobody(ReplicaIdentity),
}

// === impl Following ===

impl<N: Network> Following<N> {
    pub(super) fn new(board: Arc<Board>, network: Arc<N>) -> Self {
        let follow = Arc::new(Follow { board, network, listed: Mutex::default() });
        Self { follow, tasks: JoinSet::new(), followed: HashMap::new() }
    }

    /// Follows all other replicas. Never returns; dropping the future stops all of it.
    pub(super) async fn run(mut self) {
        let board = self.follow.board.clone();
        let mut changes = board.routes().changes();
        let added_up = async {
            loop {
                board.update_all_sums();
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
                changes.mark_unchanged();
            }
        };
        tokio::select! {
            // None of these futures returns; the order does not matter.
            biased;
            () = added_up => {}
            () = board.expire() => {}
            () = self.resolve() => {}
        }
    }

    async fn resolve(&mut self) {
        let mut ticks = interval(RESOLVE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failed = false;
        loop {
            ticks.tick().await;
            let resolved = match timeout(RESOLVE_TIMEOUT, self.follow.network.resolve()).await {
                Ok(resolved) => resolved.map_err(|error| error.to_string()),
                Err(elapsed) => Err(elapsed.to_string()),
            };
            match resolved {
                Ok(addresses) => {
                    failed = false;
                    self.set_listed_addresses(&addresses);
                }
                // Known replicas are kept. Logged once per outage.
                Err(error) if !failed => {
                    failed = true;
                    tracing::warn!(error, "peers.service does not resolve; keeping the known replicas");
                }
                Err(_) => {}
            }
        }
    }

    fn set_listed_addresses(&mut self, addresses: &[SocketAddr]) {
        let listed: BTreeSet<_> = addresses.iter().copied().take(PEER_REPLICAS + 1).collect();
        if addresses.len() > PEER_REPLICAS + 1 {
            tracing::warn!(
                addresses = addresses.len(),
                "peers.service has too many addresses; following only the first ones"
            );
        }
        self.follow.listed.lock().clone_from(&listed);
        self.follow.board.set_listed(listed.clone());
        while self.tasks.try_join_next().is_some() {}
        self.followed.retain(|_, task| !task.is_finished());
        for address in listed {
            self.followed
                .entry(address)
                .or_insert_with(|| self.tasks.spawn(self.follow.clone().follow(address)));
        }
    }
}

// === impl Follow ===

impl<N: Network> Follow<N> {
    /// Follows the replica at an address, until a connection has ended and the address is no longer listed.
    async fn follow(self: Arc<Self>, address: SocketAddr) {
        let backoff = Backoff::new(MIN_RECONNECT_DELAY, MAX_RECONNECT_DELAY);
        let mut backoff = backoff.with_jitter(fastrand::u64(..));
        loop {
            let end = self.follow_connection(address).await;
            self.board.set_reachable(address, !matches!(end, FollowEnd::Broken(_) | FollowEnd::Silent));
            let wait = match end {
                FollowEnd::Goodbye => {
                    tracing::info!(%address, "replica is stopping");
                    self.board.remove_stopped(address);
                    backoff.reset();
                    MAX_RECONNECT_DELAY
                }
                FollowEnd::Silent => {
                    tracing::warn!(%address, "replica sent no report in time; reconnecting");
                    self.board.disconnected(address);
                    MAX_RECONNECT_DELAY
                }
                FollowEnd::Nobody(found) => {
                    if found == ReplicaIdentity::TooMany {
                        tracing::warn!(%address, "too many replicas; not following this one");
                    }
                    REDIAL_DELAY
                }
                FollowEnd::Broken(reason) => {
                    tracing::debug!(%address, reason, "cannot follow a replica; retrying");
                    self.board.disconnected(address);
                    backoff.failed()
                }
            };
            sleep(wait).await;
            if !self.listed.lock().contains(&address) {
                self.board.set_reachable(address, true);
                return;
            }
        }
    }

    async fn follow_connection(&self, address: SocketAddr) -> FollowEnd {
        let limit = self.board.timeout();
        let asked = async {
            let mut reports = self.network.watch(address).await?;
            let first = reports.next().await;
            first.transpose().map(|first| (reports, first))
        };
        let (mut reports, first): (ReportStream, _) = match timeout(FIRST_REPORT_TIMEOUT, asked).await {
            Ok(Ok((reports, Some(first)))) => (reports, first),
            Ok(Ok((_, None))) => return FollowEnd::Goodbye,
            Ok(Err(status)) => return FollowEnd::Broken(status.message().to_owned()),
            Err(elapsed) => return FollowEnd::Broken(elapsed.to_string()),
        };
        match self.board.apply_first_report(address, &first) {
            ReplicaIdentity::Peer => tracing::info!(%address, replica = first.replica, "following a replica"),
            found => return FollowEnd::Nobody(found),
        }
        self.board.set_reachable(address, true);
        loop {
            match timeout(limit, reports.next()).await {
                Ok(Some(Ok(report))) if report.replica == first.replica => self.board.apply_report(&report),
                Ok(Some(Ok(_))) => return FollowEnd::Broken("it has changed its name".into()),
                Ok(Some(Err(status))) => return FollowEnd::Broken(status.message().to_owned()),
                Ok(None) => return FollowEnd::Goodbye,
                Err(_) => return FollowEnd::Silent,
            }
        }
    }
}
