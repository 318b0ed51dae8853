//! State of the other replicas.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use strum::IntoStaticStr;
use tokio::{sync::Notify, time::Instant};

use super::proto::{Report, RouteDemand};
use crate::{
    admission::{Directory, Gate},
    config::budget::{PEER_BOARD_BYTES, PEER_REPLICAS, PEER_SHARE_BYTES},
    demand::Counts,
    domain::RouteKey,
};

/// Last reports of the other replicas. The sum for each route is in its gate.
pub(super) struct Board {
    id: String,
    routes: Arc<Directory>,
    timeout: Duration,
    /// Time for which the last counts of a replica remain valid if it is listed and cannot be reached.
    unreachable_timeout: Duration,
    /// Addresses that the service resolved to last.
    listed: Mutex<BTreeSet<SocketAddr>>,
    /// Replicas by their own id.
    replicas: Mutex<BTreeMap<String, Replica>>,
    /// Addresses that do not respond.
    unreachable: Mutex<BTreeSet<SocketAddr>>,
    /// Wakes [`Self::expire`] after changes that may bring the next expiry forward.
    expiry_changed: Notify,
}

struct Replica {
    address: SocketAddr,
    is_connected: bool,
    /// True if the last counts of the replica outlast [`Board::timeout`].
    is_kept: bool,
    last_report_at: Instant,
    routes: HashMap<String, BoardEntry>,
    /// Cost of the routes, in bytes.
    bytes: usize,
}

/// Report of a replica on one route.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct BoardEntry {
    pub(super) counts: Counts,
    /// Number of pushes that the replica sent to a scaler.
    pub(super) pushes: u64,
}

/// State of another replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum PeerState {
    /// Reports its demand.
    Connected,
    /// The connection has ended; the last report counts for a while.
    Silent,
    /// Silent for longer and still listed: the last requests count for a while.
    Kept,
    /// An address that the service resolves to, and that does not respond.
    Unreachable,
}

/// Replica at an address, by its first report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReplicaIdentity {
    /// A replica to follow.
    Peer,
    /// This replica itself.
    Ourselves,
    /// A replica that is already followed at another address.
    Known,
    /// One replica beyond [`PEER_REPLICAS`].
    TooMany,
}

/// Maximum number of routes counted per replica.
const MAX_ROUTES_PER_REPLICA: usize = 10_000;

/// Cost of an entry besides its name, in bytes: its part of a table that doubles.
const ENTRY_BYTES: usize = 256;

/// Maximum length of a route's key, in bytes: a namespace has at most 63 characters, a name 253.
const MAX_ROUTE_KEY_BYTES: usize = 512;

// === impl Board ===

impl Board {
    pub(super) fn new(
        id: String,
        routes: Arc<Directory>,
        timeout: Duration,
        unreachable_timeout: Duration,
    ) -> Self {
        Self {
            id,
            routes,
            timeout,
            unreachable_timeout,
            listed: Mutex::default(),
            replicas: Mutex::default(),
            unreachable: Mutex::default(),
            expiry_changed: Notify::new(),
        }
    }

    /// Returns the id of this replica.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) const fn routes(&self) -> &Arc<Directory> {
        &self.routes
    }

    /// Returns the time for which the last report of a silent replica counts.
    pub(super) const fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Applies the first report of a connection, which is complete.
    pub(super) fn apply_first_report(&self, address: SocketAddr, report: &Report) -> ReplicaIdentity {
        if report.replica == self.id {
            self.forget(|_, replica| replica.address == address);
            return ReplicaIdentity::Ourselves;
        }
        // The replica that had this address before no longer exists.
        self.forget(|id, replica| replica.address == address && *id != report.replica);
        let mut replicas = self.replicas.lock();
        if replicas.get(&report.replica).is_some_and(|known| known.is_connected && known.address != address) {
            return ReplicaIdentity::Known;
        }
        if replicas.len() >= PEER_REPLICAS && !replicas.contains_key(&report.replica) {
            return ReplicaIdentity::TooMany;
        }
        let replica = Replica {
            address,
            is_connected: true,
            is_kept: false,
            last_report_at: Instant::now(),
            routes: HashMap::new(),
            bytes: 0,
        };
        let before = replicas.insert(report.replica.clone(), replica);
        let mut touched: Vec<_> = before.into_iter().flat_map(|before| before.routes.into_keys()).collect();
        touched.extend(store_report(&mut replicas, report));
        self.update_sums(&replicas, touched.iter().map(String::as_str));
        ReplicaIdentity::Peer
    }

    /// Applies a further report.
    pub(super) fn apply_report(&self, report: &Report) {
        let mut replicas = self.replicas.lock();
        for (route, pushes) in pushes(&replicas, report) {
            // Another replica notified the scaler, perhaps of a request held here.
            if let Some(gate) = self.routes.get(route)
                && pushes
            {
                gate.record_scaler_notified();
            }
        }
        let touched = store_report(&mut replicas, report);
        self.update_sums(&replicas, touched.iter().map(String::as_str));
    }

    /// Records a broken connection. The last report counts until the timeout.
    pub(super) fn disconnected(&self, address: SocketAddr) {
        for replica in self.replicas.lock().values_mut().filter(|replica| replica.address == address) {
            replica.is_connected = false;
        }
        self.expiry_changed.notify_one();
    }

    /// Forgets a replica that ended its stream cleanly.
    pub(super) fn remove_stopped(&self, address: SocketAddr) {
        self.forget(|_, replica| replica.address == address);
    }

    /// Sets the addresses that the service resolves to.
    pub(super) fn set_listed(&self, listed: BTreeSet<SocketAddr>) {
        *self.listed.lock() = listed;
        self.expiry_changed.notify_one();
    }

    /// Records that an address does or does not respond.
    pub(super) fn set_reachable(&self, address: SocketAddr, is_reachable: bool) {
        let mut unreachable = self.unreachable.lock();
        if is_reachable {
            unreachable.remove(&address);
        } else {
            unreachable.insert(address);
        }
    }

    /// Forgets each replica once it has been silent for too long. Never returns; cancel-safe.
    pub(super) async fn expire(&self) {
        loop {
            let expired = async {
                match self.next_expiry() {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Both branches lead to the same update; the order does not matter.
                biased;
                () = self.expiry_changed.notified() => {}
                () = expired => {}
            }
            self.keep_requests();
            let (now, listed) = (Instant::now(), self.listed.lock().clone());
            self.forget(|_, replica| !replica.is_connected && self.expiry(replica, &listed) <= now);
        }
    }

    /// Returns the time at which the next silent replica is kept or forgotten.
    fn next_expiry(&self) -> Option<Instant> {
        let listed = self.listed.lock().clone();
        let replicas = self.replicas.lock();
        let silent = replicas.values().filter(|replica| !replica.is_connected);
        let next = silent.map(|replica| match replica.is_kept {
            true => self.expiry(replica, &listed),
            false => replica.last_report_at + self.timeout,
        });
        next.min()
    }

    /// Returns the time at which a silent replica is forgotten. A listed one may still hold its requests and only be
    /// unreachable: if it had any, these count for longer.
    fn expiry(&self, replica: &Replica, listed: &BTreeSet<SocketAddr>) -> Instant {
        let is_believed =
            listed.contains(&replica.address) && replica.routes.values().any(BoardEntry::has_requests);
        replica.last_report_at
            + if is_believed { self.unreachable_timeout.max(self.timeout) } else { self.timeout }
    }

    /// Drops everything but the requests of replicas that have been silent for the timeout and are not forgotten: a
    /// lease or a linger would have ended.
    fn keep_requests(&self) {
        let (now, listed) = (Instant::now(), self.listed.lock().clone());
        let mut replicas = self.replicas.lock();
        let mut touched = Vec::new();
        for (id, replica) in replicas.iter_mut() {
            let is_due =
                !replica.is_connected && !replica.is_kept && replica.last_report_at + self.timeout <= now;
            if !is_due || self.expiry(replica, &listed) <= now {
                continue;
            }
            replica.is_kept = true;
            tracing::warn!(
                replica = id,
                address = %replica.address,
                until_s = self.unreachable_timeout.as_secs_f64(),
                "replica unreachable but still listed: its last known requests still count"
            );
            touched.extend(replica.routes.keys().cloned());
            replica.routes.retain(|_, entry| entry.has_requests());
            replica.bytes = replica.routes.keys().map(|route| route.len() + ENTRY_BYTES).sum();
            for entry in replica.routes.values_mut() {
                entry.counts.is_kept_alive = false;
            }
        }
        self.update_sums(&replicas, touched.iter().map(String::as_str));
    }

    /// Updates the sums of all routes, as new gates have none yet.
    pub(super) fn update_all_sums(&self) {
        let replicas = self.replicas.lock();
        let gates = self.routes.gates();
        self.update_sums(&replicas, gates.keys().map(RouteKey::as_str));
    }

    pub(super) fn states(&self) -> [(PeerState, usize); 4] {
        let replicas = self.replicas.lock();
        let connected = replicas.values().filter(|replica| replica.is_connected).count();
        let kept = replicas.values().filter(|replica| replica.is_kept).count();
        [
            (PeerState::Connected, connected),
            (PeerState::Silent, replicas.len() - connected - kept),
            (PeerState::Kept, kept),
            (PeerState::Unreachable, self.unreachable.lock().len()),
        ]
    }

    #[cfg(test)]
    pub(super) fn routes_of(&self, replica: &str) -> usize {
        self.replicas.lock()[replica].routes.len()
    }

    fn forget(&self, gone: impl Fn(&String, &Replica) -> bool) {
        let mut replicas = self.replicas.lock();
        let mut touched = Vec::new();
        replicas.retain(|id, replica| {
            let gone = gone(id, replica);
            if gone {
                tracing::info!(replica = id, address = %replica.address, "replica removed; its demand no longer counts");
                touched.extend(std::mem::take(&mut replica.routes).into_keys());
            }
            !gone
        });
        self.update_sums(&replicas, touched.iter().map(String::as_str));
    }

    /// Writes the sums of these routes to their gates. The caller holds the lock, so that an older sum cannot
    /// overwrite a newer one.
    fn update_sums<'a>(&self, replicas: &BTreeMap<String, Replica>, routes: impl Iterator<Item = &'a str>) {
        let mut gates: BTreeMap<&str, Arc<Gate>> = BTreeMap::new();
        gates.extend(routes.filter_map(|route| Some((route, self.routes.get(route)?))));
        for (route, gate) in gates {
            let entries = replicas.values().filter_map(|replica| replica.routes.get(route));
            gate.demand().set_peers(entries.fold(Counts::default(), |sum, entry| sum.plus(entry.counts)));
        }
    }
}

/// Stores a report. Returns the routes stored or removed.
fn store_report(replicas: &mut BTreeMap<String, Replica>, report: &Report) -> Vec<String> {
    let mut total: usize = replicas.values().map(|replica| replica.bytes).sum();
    let Some(replica) = replicas.get_mut(&report.replica) else { return Vec::new() };
    replica.last_report_at = Instant::now();
    let mut touched = Vec::with_capacity(report.routes.len());
    for demand in &report.routes {
        let entry = BoardEntry::from(demand);
        let is_known = replica.routes.contains_key(&demand.route);
        let cost = demand.route.len() + ENTRY_BYTES;
        // Each replica has a share that other replicas cannot use up.
        let has_room = replica.bytes + cost <= PEER_SHARE_BYTES || total + cost <= PEER_BOARD_BYTES;
        if entry == BoardEntry::default() {
            if replica.routes.remove(&demand.route).is_some() {
                replica.bytes -= cost;
                total -= cost;
            }
        } else if is_known {
            replica.routes.insert(demand.route.clone(), entry);
        } else if has_room
            && replica.routes.len() < MAX_ROUTES_PER_REPLICA
            && demand.route.len() <= MAX_ROUTE_KEY_BYTES
        {
            replica.routes.insert(demand.route.clone(), entry);
            replica.bytes += cost;
            total += cost;
        } else {
            tracing::warn!(
                replica = report.replica,
                "route of a replica not counted: too many routes, or its name is too long"
            );
            continue;
        }
        touched.push(demand.route.clone());
    }
    touched
}

/// Returns the routes of a report, each with `true` if a scaler was notified of it since the last report.
fn pushes<'a>(
    replicas: &BTreeMap<String, Replica>,
    report: &'a Report,
) -> impl Iterator<Item = (&'a str, bool)> {
    let replica = replicas.get(&report.replica);
    report.routes.iter().map(move |demand| {
        let before = replica.and_then(|replica| replica.routes.get(&demand.route));
        (demand.route.as_str(), demand.pushes > before.map_or(0, |before| before.pushes))
    })
}

// === impl BoardEntry ===

impl BoardEntry {
    /// Returns `true` if there are requests.
    const fn has_requests(&self) -> bool {
        self.counts.held > 0 || self.counts.in_flight > 0
    }

    /// Converts the entry to a message.
    pub(super) fn of(self, route: &RouteKey) -> RouteDemand {
        let Counts {
            held,
            held_with_room: soon,
            in_flight,
            is_kept_alive: lasting,
            activations,
            request_rate,
            server_queue,
            ready,
            streams,
        } = self.counts;
        RouteDemand {
            route: route.to_string(),
            held,
            soon,
            in_flight,
            lasting,
            request_rate,
            streams,
            activations,
            pushes: self.pushes,
            ready,
            server_queue,
        }
    }
}

impl From<&RouteDemand> for BoardEntry {
    fn from(demand: &RouteDemand) -> Self {
        let rate = demand.request_rate;
        Self {
            counts: Counts {
                held: demand.held,
                held_with_room: demand.soon.min(demand.held),
                in_flight: demand.in_flight,
                is_kept_alive: demand.lasting,
                activations: demand.activations,
                // A non-finite rate counts as 0.
                request_rate: if rate.is_finite() { rate.max(0.0) } else { 0.0 },
                server_queue: demand.server_queue,
                ready: demand.ready,
                streams: demand.streams,
            },
            pushes: demand.pushes,
        }
    }
}

// === impl PeerState ===

impl PeerState {
    /// Returns the name in metrics.
    pub fn name(self) -> &'static str {
        self.into()
    }
}
