//! The ramp, with answers that are long, missing or broken off.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use super::*;
use crate::domain::Period;

/// A server that resets requests beyond its capacity, and answers the others after `takes`.
struct LimitedServer {
    capacity_limit: u32,
    takes: Duration,
    now: AtomicU32,
    max_in_flight_seen: AtomicU32,
    resets: AtomicU32,
    /// Requests that are accepted and never answered.
    unanswered_left: AtomicU32,
}

impl LimitedServer {
    fn new(bears: u32, ms: u64) -> Arc<Self> {
        Arc::new(Self {
            capacity_limit: bears,
            takes: Duration::from_millis(ms),
            now: AtomicU32::new(0),
            max_in_flight_seen: AtomicU32::new(0),
            resets: AtomicU32::new(0),
            unanswered_left: AtomicU32::new(0),
        })
    }

    /// Serves a held request. Returns the time in milliseconds from the start, and the number of dispatches.
    async fn serve(self: Arc<Self>, stage: Arc<KeeperTest>, mut ticket: Ticket<Permit>) -> (u64, u32) {
        for sent in 1.. {
            let permit = match ticket.released().await {
                ReleaseOutcome::Dispatch(permit) => permit,
                _ => panic!("not released"),
            };
            if self.unanswered_left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
                std::future::pending::<()>().await;
            }
            if self.now.load(SeqCst) == self.capacity_limit {
                self.resets.fetch_add(1, SeqCst);
                permit.suspect();
                drop(permit);
                ticket = stage.gate.readmit(ticket.place(), 1);
                continue;
            }
            let now = self.now.fetch_add(1, SeqCst) + 1;
            self.max_in_flight_seen.fetch_max(now, SeqCst);
            sleep(self.takes).await;
            self.now.fetch_sub(1, SeqCst);
            permit.first_byte();
            return (stage.ms(), sent);
        }
        unreachable!("as often as it takes")
    }
}

/// Holds `count` requests while the pod starts; it becomes ready at 1000 ms.
async fn held(
    stage: &Arc<KeeperTest>,
    count: usize,
    model: &Arc<LimitedServer>,
) -> Vec<JoinHandle<(u64, u32)>> {
    let tickets: Vec<_> = (0..count).map(|_| stage.hold()).collect();
    let served =
        tickets.into_iter().map(|ticket| tokio::spawn(model.clone().serve(stage.clone(), ticket))).collect();
    stage.at(1_000).await;
    stage.report(&[(A, Ready)]).await;
    served
}

/// Returns the time and the number of dispatches of each request.
async fn ends(served: Vec<JoinHandle<(u64, u32)>>) -> Vec<(u64, u32)> {
    let mut ends = Vec::new();
    for one in served {
        ends.push(timeout(Duration::from_secs(600), one).await.expect("served").unwrap());
    }
    ends
}

async fn stage(policy: Policy, gateway: Option<&str>) -> Arc<KeeperTest> {
    Arc::new(KeeperTest::new(policy, gateway, &[(A, NotReady)]).await)
}

#[tokio::test(start_paused = true)]
async fn ramp_widens_without_waiting_for_answers() {
    for gateway in [None, Some("http://envoy:8080")] {
        let stage = stage(Policy::default(), gateway).await;
        let model = LimitedServer::new(64, 2_000);
        let served = held(&stage, 64, &model).await;
        // The server answers probes as soon as the pod opens.
        stage.servers.answer(A, ProbeResult::Ready);
        let mut ends: Vec<_> = ends(served).await.into_iter().map(|(ms, _)| ms - 1_000).collect();
        ends.sort_unstable();
        let at = |ms| ends.iter().filter(|end| **end == ms).count();
        // The limit starts at 4 and doubles every 150 ms; each request takes 2 s. A ramp that only answers widen
        // would need 5 rounds, 10 s.
        assert_eq!(
            [2_000, 2_150, 2_300, 2_450, 2_600].map(at),
            [4, 4, 8, 16, 32],
            "2.6 s in all, 1.3 times 2 s: {ends:?}"
        );
        assert_eq!(model.resets.load(SeqCst), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn pods_without_probes_widen_by_their_report() {
    let mut policy = Policy::default();
    policy.readiness.probe = false;
    let stage = stage(policy, None).await;
    let served = held(&stage, 64, &LimitedServer::new(64, 2_000)).await;
    assert_eq!(ends(served).await.iter().map(|(ms, _)| ms).max(), Some(&3_600), "1000 + 4 × 150 + 2000");
    assert!(stage.servers.asked.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn swallowed_requests_delay_others_for_bounded_time() {
    let slow = ProbeResult::TimedOut(Period::from_secs(1));
    for (answer, usual_ms, expected) in [
        (ProbeResult::Ready, None, 150),
        (ProbeResult::Status(StatusCode::NOT_FOUND), None, 150),
        (slow.clone(), None, 5_000),
        (slow.clone(), Some(1_500), 1_500),
        (slow, Some(60_000), 5_000),
        (ProbeResult::Status(StatusCode::SERVICE_UNAVAILABLE), None, 5_000),
    ] {
        let stage = stage(Policy::default(), None).await;
        if let Some(ms) = usual_ms {
            stage.gate.counters().first_byte(Duration::from_millis(ms), false, None);
        }
        let model = LimitedServer::new(64, 10);
        model.unanswered_left.store(4, SeqCst);
        let mut served = held(&stage, 12, &model).await;
        stage.servers.answer(A, answer.clone());
        let rest = served.split_off(4);
        // The next 4 requests are dispatched, and their answers after 10 ms release the last 4.
        let ends: Vec<_> = ends(rest).await.into_iter().map(|(ms, _)| ms - 1_000 - expected).collect();
        assert_eq!(ends, [10, 10, 10, 10, 20, 20, 20, 20], "{answer}");
        served.iter().for_each(JoinHandle::abort);
    }
}

#[tokio::test(start_paused = true)]
async fn ramp_of_a_silent_server_does_not_widen() {
    let stage = stage(Policy::default(), None).await;
    let model = LimitedServer::new(64, 10);
    model.unanswered_left.store(4, SeqCst);
    // The server has died without closing its connections.
    let served = held(&stage, 12, &model).await;
    stage.at(61_000).await;
    assert_eq!((stage.gate.in_flight(), stage.gate.held()), (4, 8));
    served.iter().for_each(JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn ramp_stops_at_the_servers_capacity() {
    let stage = stage(Policy::default(), None).await;
    let model = LimitedServer::new(8, 2_000);
    let served = held(&stage, 64, &model).await;
    stage.servers.answer(A, ProbeResult::Ready);
    let ends = ends(served).await;
    let took = ends.iter().map(|(ms, _)| ms - 1_000).max().unwrap();
    // 8 rounds of 2 s; the first began in two parts, 150 ms apart.
    assert!((16_000..=16_500).contains(&took), "{took} ms");
    // Limits of 4, 8 and 16 were tried, which is 8 requests too many; after that, one more request is tried every 5
    // s.
    let resets = model.resets.load(SeqCst);
    assert!((8..=8 + 3).contains(&resets), "{resets} resets");
    assert!(ends.iter().all(|(_, sent)| *sent <= 2), "no request was reset twice: {ends:?}");
    assert_eq!(model.max_in_flight_seen.load(SeqCst), 8);
}

#[tokio::test(start_paused = true)]
async fn suspect_pod_serves_beside_its_open_streams() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, Ready)]).await;
    stage.servers.answer(A, ProbeResult::Ready);
    let mut streams: Vec<_> = (0..41).map(|_| stage.enter().unwrap()).collect();
    streams.iter().for_each(Permit::first_byte);
    // One stream ends, and the next request takes its place.
    streams.pop();
    let permit = stage.enter().unwrap();
    permit.suspect();
    drop(permit);
    drop(released(&mut stage.hold()).await);
    assert_eq!(stage.ms(), 50, "after the backoff, before any of the 40 has ended");
}
