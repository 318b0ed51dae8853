//! Replicas in memory, on a paused clock. They exchange the reports that are sent in production, without a network.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr},
};

use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};
use tonic::Status;

use super::{
    network::{self, Network},
    proto::{Report, RouteDemand},
    report::Reports,
    *,
};
use crate::{
    admission::Gate,
    coldstart::{ColdStarts, Phase},
    demand::{Capacity, queue_depth},
    domain::Policy,
    hold::Ticket,
    state::Endpoint,
};

/// Simulated network: all addresses, and the replicas that respond there.
#[derive(Default)]
struct FakePeerNetwork {
    listed: Mutex<Vec<SocketAddr>>,
    ends: Mutex<HashMap<SocketAddr, FakeLink>>,
}

#[derive(Clone)]
struct FakeLink {
    id: Arc<str>,
    routes: Arc<Directory>,
    clean_end: CancellationToken,
    broken: CancellationToken,
    frozen: CancellationToken,
}

struct TestReplica {
    gate: Arc<Gate>,
    directory: Arc<Directory>,
    board: Arc<Board>,
    cold_starts: Arc<ColdStarts>,
    wire: FakeLink,
    following: JoinHandle<()>,
}

const SILENCE_TIMEOUT: Duration = Duration::from_secs(10);
const UNREACHABLE_TIMEOUT: Duration = Duration::from_secs(300);

fn address(number: u8) -> SocketAddr {
    (Ipv4Addr::new(10, 0, 0, number), 9091).into()
}

impl Network for FakePeerNetwork {
    async fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        Ok(self.listed.lock().clone())
    }

    async fn watch(&self, address: SocketAddr) -> Result<network::ReportStream, Status> {
        let wire = self.ends.lock().get(&address).cloned().ok_or_else(|| Status::unavailable("nobody"))?;
        if wire.broken.is_cancelled() {
            return Err(Status::unavailable("nobody"));
        }
        let (broken, frozen) = (wire.broken.clone(), wire.frozen.clone());
        let reports = Reports::new(wire.id, wire.routes, wire.clean_end).stream(None);
        let reports = Box::pin(reports).take_until(frozen.clone().cancelled_owned());
        // A frozen replica sends no further report, and does not end its stream either.
        let reports = reports.map(Some).chain(stream::once(async move {
            if frozen.is_cancelled() {
                std::future::pending::<()>().await;
            }
            None
        }));
        let reports = reports.filter_map(std::future::ready).take_until(broken.clone().cancelled_owned());
        let reports = reports.chain(stream::iter(std::iter::from_fn(move || {
            broken.is_cancelled().then(|| Err(Status::unavailable("reset")))
        })));
        Ok(Box::pin(reports))
    }
}

impl FakePeerNetwork {
    fn join(self: &Arc<Self>, number: u8) -> TestReplica {
        self.join_at(number, &[address(number)])
    }

    /// Adds a replica. It is listed immediately, and other replicas follow it once they resolve the service again.
    fn join_at(self: &Arc<Self>, number: u8, addresses: &[SocketAddr]) -> TestReplica {
        let cold_starts = ColdStarts::new(|_| {});
        let gate = Gate::new("tiny".into(), Policy::default(), cold_starts.clone());
        let directory = Arc::new(Directory::default());
        directory.publish([gate.clone()]);
        let wire = FakeLink {
            id: format!("replica-{number}").into(),
            routes: directory.clone(),
            clean_end: CancellationToken::new(),
            broken: CancellationToken::new(),
            frozen: CancellationToken::new(),
        };
        for address in addresses {
            self.ends.lock().insert(*address, wire.clone());
            let mut listed = self.listed.lock();
            if !listed.contains(address) {
                listed.push(*address);
            }
        }
        let board = Arc::new(Board::new(
            wire.id.to_string(),
            directory.clone(),
            SILENCE_TIMEOUT,
            UNREACHABLE_TIMEOUT,
        ));
        let following = tokio::spawn(Following::new(board.clone(), self.clone()).run());
        TestReplica { gate, directory, board, cold_starts, wire, following }
    }
}

impl TestReplica {
    fn held(&self) -> u64 {
        self.gate.counts_everywhere().held
    }

    /// Returns the numbers of connected, silent and unreachable replicas.
    fn states(&self) -> [usize; 3] {
        let [connected, silent, _, unreachable] = self.board.states().map(|(_, number)| number);
        [connected, silent, unreachable]
    }

    fn kept(&self) -> usize {
        self.board.states()[2].1
    }

    fn hold(&self) -> Ticket<crate::admission::Permit> {
        self.gate.hold(1, true).unwrap()
    }
}

impl Drop for TestReplica {
    fn drop(&mut self) {
        self.following.abort();
    }
}

/// Waits until all replicas follow each other: the service is resolved every 2 s.
async fn settled() {
    sleep(Duration::from_secs(7)).await;
}

#[tokio::test(start_paused = true)]
async fn every_replica_has_the_sum_and_every_edge() {
    let wires = Arc::<FakePeerNetwork>::default();
    let replicas = [1, 2, 3].map(|number| wires.join(number));
    settled().await;
    assert_eq!(replicas.each_ref().map(TestReplica::states), [[2, 0, 0]; 3], "two others, not itself");
    let mut changes = replicas[1].gate.demand().changes();
    let start = Instant::now();
    let mut tickets = vec![replicas[0].hold()];
    changes.changed().await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
    assert!(replicas[1].gate.counts_everywhere().is_active());
    assert!(!replicas[1].gate.counts().is_active(), "its own is false");
    tickets.extend([replicas[0].hold(), replicas[1].hold()]);
    sleep(Duration::from_millis(25)).await;
    assert_eq!(replicas.each_ref().map(TestReplica::held), [3, 3, 3], "2 + 1, within a look of 20 ms");
    tickets.clear();
    sleep(Duration::from_millis(25)).await;
    assert_eq!(replicas.each_ref().map(TestReplica::held), [0; 3]);
    assert!(replicas[2].gate.counts_everywhere().is_kept_alive, "the lease of both");
    replicas.iter().for_each(|replica| replica.gate.demand().end_activation());
    sleep(Duration::from_secs(59)).await;
    assert!(replicas[2].gate.counts_everywhere().is_kept_alive, "the linger, 59 of 60 s");
    sleep(Duration::from_millis(1_025)).await;
    assert!(!replicas[2].gate.counts_everywhere().is_active());
}

#[tokio::test(start_paused = true)]
async fn ramp_of_three_replicas_asks_for_one_target() {
    let wires = Arc::<FakePeerNetwork>::default();
    let replicas = [1, 2, 3].map(|number| wires.join(number));
    settled().await;
    let _held: Vec<_> = (0..48).map(|number| replicas[number % 3].hold()).collect();
    let depths = || {
        replicas.each_ref().map(|replica| {
            let gate = &replica.gate;
            queue_depth(&gate.counts_everywhere(), Capacity::from(&**gate.policy()))
        })
    };
    let told = || sleep(Duration::from_millis(45));
    told().await;
    assert_eq!(depths(), [5.0; 3], "at zero: one replica, of 5");
    let hears_of_pod = |replica: &TestReplica| {
        let endpoint = Endpoint::new("10.1.0.1:8000", 64);
        replica.gate.target().add(&endpoint);
        replica.gate.target().ready(&endpoint, Some(4));
    };
    replicas[..2].iter().for_each(hears_of_pod);
    told().await;
    assert_eq!(
        depths(),
        [3.75; 3],
        "48 × 5 ÷ 64: 8 in flight, 24 soon, and 16 where the pod is not known yet"
    );
    hears_of_pod(&replicas[2]);
    told().await;
    assert_eq!(depths(), [3.75; 3], "12 in flight, 36 soon");
    sleep(Duration::from_secs(10)).await;
    assert_eq!(depths(), [36.9375; 3], "no head for 10 s: 36 + 12 × 5 ÷ 64");
}

#[tokio::test(start_paused = true)]
async fn replica_without_pod_does_not_hide_backlog() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    settled().await;
    let _held: Vec<_> = (0..16).map(|_| two.hold()).collect();
    let endpoint = Endpoint::new("10.1.0.1:8000", 64);
    one.gate.target().add(&endpoint);
    one.gate.target().ready(&endpoint, Some(4));
    sleep(Duration::from_millis(45)).await;
    let soon = || (one.gate.counts_everywhere().held_with_room, two.gate.counts_everywhere().held_with_room);
    assert_eq!(soon(), (16, 16));
    sleep(Duration::from_secs(10)).await;
    assert_eq!(soon(), (0, 0), "10 s after the other one found it");
}

#[tokio::test(start_paused = true)]
async fn counts_are_reported_at_most_every_20_ms() {
    let wires = Arc::<FakePeerNetwork>::default();
    let replica = wires.join(1);
    let ending = CancellationToken::new();
    let reports = Reports::new("one".into(), replica.directory.clone(), ending.clone()).stream(None);
    let mut reports = Box::pin(reports);
    assert_eq!(reports.next().await.unwrap().unwrap().routes, [], "nothing to say, and that at once");
    let start = Instant::now();
    assert_eq!(reports.next().await.unwrap().unwrap().routes, []);
    assert_eq!(start.elapsed(), Duration::from_secs(1), "the heartbeat");
    let _first = replica.hold();
    let busy = tokio::spawn({
        let gate = replica.gate.clone();
        async move {
            let mut tickets = Vec::new();
            for _ in 0..100 {
                sleep(Duration::from_millis(1)).await;
                tickets.push(gate.hold(1, true).unwrap());
            }
            tickets
        }
    });
    let start = Instant::now();
    let mut told = Vec::new();
    while told.last() != Some(&101) {
        told.push(reports.next().await.unwrap().unwrap().routes[0].held);
    }
    assert_eq!(told[0], 1, "the edge, at once");
    assert!(told.len() <= 7, "100 ms ÷ 20 ms, the edge and the end: {told:?}");
    assert!(start.elapsed() <= Duration::from_millis(125), "{:?}", start.elapsed());
    drop(busy.await.unwrap());
    assert_eq!(reports.next().await.unwrap().unwrap().routes[0].held, 1);
    ending.cancel();
    assert!(reports.next().await.is_none(), "a goodbye");
}

#[tokio::test(start_paused = true)]
async fn changing_counts_do_not_delay_the_clean_end() {
    let wires = Arc::<FakePeerNetwork>::default();
    let replica = wires.join(1);
    let ending = CancellationToken::new();
    let reports = Reports::new("one".into(), replica.directory.clone(), ending.clone()).stream(None);
    let mut reports = Box::pin(reports);
    let mut tickets = vec![replica.hold()];
    assert_eq!(reports.next().await.unwrap().unwrap().routes[0].held, 1);
    let start = Instant::now();
    for held in 2..=6 {
        // A new request is held for each report.
        tickets.push(replica.hold());
        assert_eq!(reports.next().await.unwrap().unwrap().routes[0].held, held);
    }
    assert_eq!(start.elapsed(), Duration::from_millis(100), "5 × 20 ms");
    tickets.push(replica.hold());
    ending.cancel();
    assert!(reports.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn last_report_counts_until_the_timeout() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    settled().await;
    let _held = two.hold();
    sleep(Duration::from_millis(100)).await;
    wires.listed.lock().retain(|listed| *listed != address(2));
    two.wire.broken.cancel();
    sleep(Duration::from_millis(8_900)).await;
    assert_eq!(
        (one.held(), one.states()),
        (1, [0, 1, 0]),
        "8.9 s: its last heartbeat was at most 1 s before"
    );
    sleep(Duration::from_millis(1_200)).await;
    assert_eq!((one.held(), one.states(), one.kept()), (0, [0, 0, 0], 0), "10.1 s");
}

#[tokio::test(start_paused = true)]
async fn requests_of_a_listed_replica_count_for_5_min() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    settled().await;
    let _held = two.hold();
    sleep(Duration::from_millis(100)).await;
    two.wire.broken.cancel();
    sleep(Duration::from_secs(12)).await;
    assert_eq!((one.held(), one.states(), one.kept()), (1, [0, 0, 1], 1));
    assert!(!one.gate.counts_everywhere().is_kept_alive, "its lease is not believed for so long");
    sleep(Duration::from_millis(286_900)).await;
    assert_eq!((one.held(), one.kept()), (1, 1), "298.9 s: its last heartbeat was at most 1 s before");
    sleep(Duration::from_millis(1_200)).await;
    assert_eq!((one.held(), one.kept()), (0, 0), "300.1 s");
}

#[tokio::test(start_paused = true)]
async fn retained_replica_is_dropped_when_unlisted() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    settled().await;
    let _held = two.hold();
    sleep(Duration::from_millis(100)).await;
    two.wire.broken.cancel();
    sleep(Duration::from_secs(60)).await;
    assert_eq!((one.held(), one.kept()), (1, 1));
    wires.listed.lock().retain(|listed| *listed != address(2));
    sleep(Duration::from_millis(2_100)).await;
    assert_eq!((one.held(), one.kept()), (0, 0), "the service is resolved every 2 s");
}

#[tokio::test(start_paused = true)]
async fn silent_replica_without_demand_is_ignored() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    settled().await;
    drop(two.hold());
    sleep(Duration::from_millis(100)).await;
    assert!(one.gate.counts_everywhere().is_kept_alive, "its lease");
    two.wire.broken.cancel();
    sleep(Duration::from_millis(10_100)).await;
    assert!(!one.gate.counts_everywhere().is_active());
    assert_eq!((one.states(), one.kept()), ([0, 0, 1], 0));
}

#[tokio::test(start_paused = true)]
async fn reconnect_in_time_changes_nothing() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    settled().await;
    let _held = two.hold();
    sleep(Duration::from_millis(100)).await;
    let mut changes = one.gate.demand().changes();
    changes.mark_unchanged();
    two.wire.broken.cancel();
    sleep(Duration::from_secs(3)).await;
    assert_eq!((one.held(), one.states()), (1, [0, 1, 1]));
    let mended = FakeLink { broken: CancellationToken::new(), ..two.wire.clone() };
    wires.ends.lock().insert(address(2), mended);
    sleep(Duration::from_secs(30)).await;
    assert_eq!((one.held(), one.states()), (1, [1, 0, 0]));
    assert!(!changes.has_changed().unwrap(), "it was true all the time");
}

#[tokio::test(start_paused = true)]
async fn frozen_replica_counts_while_listed() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    settled().await;
    let _held = two.hold();
    sleep(Duration::from_millis(100)).await;
    two.wire.frozen.cancel();
    sleep(Duration::from_millis(8_900)).await;
    assert_eq!(one.held(), 1);
    sleep(Duration::from_millis(1_200)).await;
    assert_eq!((one.held(), one.states(), one.kept()), (1, [0, 0, 1], 1));
    let thawed = FakeLink { frozen: CancellationToken::new(), ..two.wire.clone() };
    wires.ends.lock().insert(address(2), thawed);
    sleep(Duration::from_secs(6)).await;
    assert_eq!((one.held(), one.states()), (1, [1, 0, 0]));
}

#[tokio::test(start_paused = true)]
async fn replica_sending_goodbye_is_removed_at_once() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    settled().await;
    let _held = two.hold();
    sleep(Duration::from_millis(100)).await;
    let mut changes = one.gate.demand().changes();
    changes.mark_unchanged();
    let start = Instant::now();
    two.wire.clean_end.cancel();
    changes.changed().await.unwrap();
    assert_eq!((start.elapsed(), one.held()), (Duration::ZERO, 0));
}

#[tokio::test(start_paused = true)]
async fn new_replica_at_old_address_replaces_its_reports() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    settled().await;
    let _held = two.hold();
    sleep(Duration::from_millis(100)).await;
    two.wire.broken.cancel();
    let _new = wires.join_at(3, &[address(2)]);
    sleep(Duration::from_secs(3)).await;
    assert_eq!((one.held(), one.states()), (0, [1, 0, 0]), "long before the timeout");
}

#[tokio::test(start_paused = true)]
async fn replica_with_two_addresses_counts_once() {
    let wires = Arc::<FakePeerNetwork>::default();
    let one = wires.join_at(1, &[address(1), address(101)]);
    let two = wires.join_at(2, &[address(2), address(102)]);
    settled().await;
    let _held = (one.hold(), two.hold());
    sleep(Duration::from_millis(100)).await;
    assert_eq!((one.held(), one.states()), (2, [1, 0, 0]));
    // The address in use fails: the other one takes over.
    wires.ends.lock().remove(&address(2));
    let left = FakeLink { broken: CancellationToken::new(), ..two.wire.clone() };
    wires.ends.lock().insert(address(102), left);
    two.wire.broken.cancel();
    sleep(Duration::from_secs(15)).await;
    assert_eq!((one.held(), one.states()[0]), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn new_route_includes_demand_of_peers() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    one.directory.publish([]);
    settled().await;
    let _held = two.hold();
    sleep(Duration::from_millis(100)).await;
    let gate = Gate::new("tiny".into(), Policy::default(), one.cold_starts.clone());
    one.directory.publish([gate.clone()]);
    sleep(Duration::from_millis(1)).await;
    assert_eq!(gate.counts_everywhere().held, 1);
    // A removed route is subtracted.
    two.directory.publish([]);
    sleep(Duration::from_millis(1)).await;
    assert_eq!(gate.counts_everywhere().held, 0);
}

#[tokio::test(start_paused = true)]
async fn push_by_peer_ends_the_signal_phase() {
    let wires = Arc::<FakePeerNetwork>::default();
    let (one, two) = (wires.join(1), wires.join(2));
    one.gate.cold_starts().expect_push(true);
    settled().await;
    let _held = one.hold();
    one.gate.cold_starts().begin(one.gate.demand().activation_since().unwrap(), 1);
    sleep(Duration::from_millis(3)).await;
    two.gate.demand().record_push();
    sleep(Duration::from_millis(5)).await;
    one.gate.cold_starts().ready(None);
    one.gate.cold_starts().abandoned();
    let [record] = one.cold_starts.recent(None, 1).try_into().unwrap();
    let phases: Vec<_> = record.phases.iter().map(|span| (span.name, span.duration_ms)).collect();
    assert_eq!(phases, [(Phase::Signal, 3.0), (Phase::Load, 5.0)]);
}

#[tokio::test(start_paused = true)]
async fn reports_are_bounded_and_never_spoil_the_sum() {
    let wires = Arc::<FakePeerNetwork>::default();
    let one = wires.join(1);
    let demand =
        |route: String, rate| RouteDemand { route, request_rate: rate, held: 1, ..RouteDemand::default() };
    let report = |routes| Report { replica: "bad".into(), routes };
    one.board.apply_first_report(
        address(200),
        &report(vec![demand("tiny".into(), f64::NAN), demand("x".repeat(600), 1.0)]),
    );
    one.board.apply_report(&report((0..12_000).map(|number| demand(number.to_string(), 1.0)).collect()));
    one.board.apply_report(&report(vec![RouteDemand { held: u64::MAX, ..demand("tiny".into(), -1.0) }]));
    let _held = one.hold();
    let counts = one.gate.counts_everywhere();
    assert_eq!((counts.held, counts.request_rate), (u64::MAX, 0.0), "no overflow, and a number");
    assert_eq!(one.board.routes_of("bad"), 10_000);
    for number in 0..100 {
        let found = one
            .board
            .apply_first_report(address(number), &Report { replica: number.to_string(), routes: Vec::new() });
        assert_eq!(
            found == board::ReplicaIdentity::TooMany,
            number >= 63,
            "{number}: the bad one is the first of 64"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn many_routes_are_split_into_several_reports() {
    let wires = Arc::<FakePeerNetwork>::default();
    let one = wires.join(1);
    let gates: Vec<_> = (0..1_125)
        .map(|number| {
            Gate::new(format!("route-{number}").as_str().into(), Policy::default(), one.cold_starts.clone())
        })
        .collect();
    let _held: Vec<_> = gates.iter().map(|gate| gate.hold(1, true).unwrap()).collect();
    one.directory.publish(gates);
    let reports = Reports::new("one".into(), one.directory.clone(), CancellationToken::new()).stream(None);
    let mut reports = Box::pin(reports);
    let start = Instant::now();
    let mut told = Vec::new();
    for _ in 0..3 {
        told.push(reports.next().await.unwrap().unwrap().routes.len());
    }
    // The first report is sent immediately, and two more 20 ms apart.
    assert_eq!((told, start.elapsed()), (vec![500, 500, 125], Duration::from_millis(40)));
}

#[tokio::test(start_paused = true)]
async fn large_reports_are_split_every_20_ms() {
    let cold_starts = ColdStarts::new(|_| {});
    let gate = |number| {
        let name = format!("route-{number:05}");
        Gate::new(name.as_str().into(), Policy::default(), cold_starts.clone())
    };
    let gates: Vec<_> = (0..=2 * report::MAX_ROUTES_PER_REPORT).map(gate).collect();
    let directory = Arc::new(Directory::default());
    directory.publish(gates.iter().cloned());
    let ending = CancellationToken::new();
    let reports = Reports::new("one".into(), directory.clone(), ending).stream(None);
    let mut reports = Box::pin(reports);
    assert_eq!(reports.next().await.unwrap().unwrap().routes, []);
    let mut tickets = Vec::new();
    let mut turns = HashMap::<String, u32>::new();
    let start = Instant::now();
    // All 1,001 routes change before each report, and a report has 500 of them. Six reports have 3,000 entries: three
    // for every route except three routes, which have two.
    for number in 0..6 {
        tickets.extend(gates.iter().map(|gate| gate.hold(1, true).unwrap()));
        let told = reports.next().await.unwrap().unwrap().routes;
        assert_eq!(told.len(), report::MAX_ROUTES_PER_REPORT);
        assert_eq!(start.elapsed(), Duration::from_millis(20) * number, "the edge at once, then no sooner");
        told.into_iter().for_each(|told| *turns.entry(told.route).or_default() += 1);
    }
    assert_eq!(turns.len(), gates.len(), "every route");
    assert!(turns.values().all(|turns| (2..=3).contains(turns)));
    // Removed routes are reported although all others change.
    directory.publish(gates[1..].iter().cloned());
    tickets.extend(gates.iter().map(|gate| gate.hold(1, true).unwrap()));
    let told = reports.next().await.unwrap().unwrap().routes;
    assert!(told.iter().any(|told| told.route == "route-00000" && told.held == 0));
}
