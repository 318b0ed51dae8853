//! Follows every other replica: who they are, and what they say.

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
    REPLICAS,
    board::{Board, Found},
    network::{Network, Reports},
};

/// How often the service is resolved.
const RESOLVE: Duration = Duration::from_secs(2);

/// How long resolving may take.
const RESOLVING: Duration = Duration::from_secs(5);

/// How long somebody who was asked may take to begin to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// How long to wait before a broken connection is made again; doubles.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// How long an address is left alone where we have found ourselves, or somebody we know.
const KNOWN: Duration = Duration::from_secs(5);

/// Those that are followed.
pub(super) struct Following<N> {
    follow: Arc<Follow<N>>,
    tasks: JoinSet<()>,
    followed: HashMap<SocketAddr, AbortHandle>,
}

struct Follow<N> {
    board: Arc<Board>,
    network: Arc<N>,
    /// What the service resolved to last.
    listed: Mutex<BTreeSet<SocketAddr>>,
}

/// How following one address ended.
enum End {
    /// It stops.
    Goodbye,
    /// It has not said anything for too long.
    Silent,
    /// Broken, and why.
    Broken(String),
    /// Nobody to follow.
    Nobody(Found),
}

// === impl Following ===

impl<N: Network> Following<N> {
    pub(super) fn new(board: Arc<Board>, network: Arc<N>) -> Self {
        let follow = Arc::new(Follow { board, network, listed: Mutex::default() });
        Self { follow, tasks: JoinSet::new(), followed: HashMap::new() }
    }

    /// Never ends; dropping it ends all following.
    pub(super) async fn run(mut self) {
        let board = self.follow.board.clone();
        let mut changes = board.routes().changes();
        let added_up = async {
            loop {
                board.add_up_all();
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
                changes.mark_unchanged();
            }
        };
        tokio::select! {
            // None of them ends.
            biased;
            () = added_up => {}
            () = board.expire() => {}
            () = self.resolve() => {}
        }
    }

    async fn resolve(&mut self) {
        let mut ticks = interval(RESOLVE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failed = false;
        loop {
            ticks.tick().await;
            let resolved = match timeout(RESOLVING, self.follow.network.resolve()).await {
                Ok(resolved) => resolved.map_err(|error| error.to_string()),
                Err(elapsed) => Err(elapsed.to_string()),
            };
            match resolved {
                Ok(addresses) => {
                    failed = false;
                    self.list(&addresses);
                }
                // Those that are known stay. Said once, not every time.
                Err(error) if !failed => {
                    failed = true;
                    tracing::warn!(
                        error,
                        "the other replicas cannot be found: peers.service does not resolve"
                    );
                }
                Err(_) => {}
            }
        }
    }

    fn list(&mut self, addresses: &[SocketAddr]) {
        let listed: BTreeSet<_> = addresses.iter().copied().take(REPLICAS + 1).collect();
        if addresses.len() > REPLICAS + 1 {
            tracing::warn!(addresses = addresses.len(), "peers.service has more addresses than are followed");
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
    /// Follows whoever is at this address until it is not listed any more and does not answer.
    async fn follow(self: Arc<Self>, address: SocketAddr) {
        let mut backoff = BACKOFF.0;
        loop {
            let end = self.once(address).await;
            self.board.set_reachable(address, !matches!(end, End::Broken(_) | End::Silent));
            let wait = match end {
                End::Goodbye => {
                    tracing::info!(%address, "a replica said goodbye");
                    self.board.left(address);
                    backoff = BACKOFF.0;
                    BACKOFF.1
                }
                End::Silent => {
                    tracing::warn!(%address, "a replica has been silent for too long");
                    self.board.disconnected(address);
                    BACKOFF.1
                }
                End::Nobody(found) => {
                    if found == Found::TooMany {
                        tracing::warn!(%address, "there are more replicas than are followed");
                    }
                    KNOWN
                }
                End::Broken(reason) => {
                    tracing::debug!(%address, reason, "a replica cannot be followed");
                    self.board.disconnected(address);
                    let wait = backoff;
                    backoff = BACKOFF.1.min(backoff * 2);
                    wait
                }
            };
            sleep(wait).await;
            if !self.listed.lock().contains(&address) {
                self.board.set_reachable(address, true);
                return;
            }
        }
    }

    async fn once(&self, address: SocketAddr) -> End {
        let limit = self.board.timeout();
        let asked = async {
            let mut reports = self.network.watch(address).await?;
            let first = reports.next().await;
            first.transpose().map(|first| (reports, first))
        };
        let (mut reports, first): (Reports, _) = match timeout(ANSWER, asked).await {
            Ok(Ok((reports, Some(first)))) => (reports, first),
            Ok(Ok((_, None))) => return End::Goodbye,
            Ok(Err(status)) => return End::Broken(status.message().to_owned()),
            Err(elapsed) => return End::Broken(elapsed.to_string()),
        };
        match self.board.found(address, &first) {
            Found::Peer => tracing::info!(%address, replica = first.replica, "a replica was found"),
            found => return End::Nobody(found),
        }
        self.board.set_reachable(address, true);
        loop {
            match timeout(limit, reports.next()).await {
                Ok(Some(Ok(report))) if report.replica == first.replica => self.board.heard(&report),
                Ok(Some(Ok(_))) => return End::Broken("it has changed its name".into()),
                Ok(Some(Err(status))) => return End::Broken(status.message().to_owned()),
                Ok(None) => return End::Goodbye,
                Err(_) => return End::Silent,
            }
        }
    }
}
