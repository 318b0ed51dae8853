mod ramp;
mod record;
mod reported;
mod roles;

use std::time::Duration;

use http::StatusCode;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use super::*;
use crate::{
    admission::Permit,
    coldstart::{ColdStart, ColdStartOutcome, ColdStarts, Phase},
    domain::{Concurrency, EndpointSource, ObstacleKind, Period, Policy, Roles},
    hold::{QueuePosition, ReleaseOutcome, Ticket},
    probe::ProbeResult,
    state::{DiscoveryProblem, Obstacle},
};

const A: &str = "10.0.0.1:8000";
const B: &str = "10.0.0.2:8000";

/// A keeper with a scripted cluster and scripted servers.
struct KeeperTest {
    gate: Arc<Gate>,
    store: Arc<ColdStarts>,
    cluster: watch::Sender<Arc<Discovered>>,
    servers: Arc<Servers>,
    shutdown: Shutdown,
    keeping: JoinHandle<()>,
    began: Instant,
}

/// Scripted servers by address; other addresses refuse connections.
#[derive(Default)]
struct Servers {
    answers: Mutex<HashMap<String, (ProbeResult, Duration)>>,
    asked: Mutex<Vec<(u64, String)>>,
    now: Mutex<(usize, usize)>,
    /// Result of every lookup; `None` resolves.
    unresolved: Mutex<Option<ProbeResult>>,
}

impl KeeperTest {
    async fn new(policy: Policy, gateway: Option<&str>, pods: &[(&str, ReportedState)]) -> Self {
        let stage = Self::unsynced(policy, gateway);
        stage.report(pods).await;
        stage
    }

    /// Creates a stage whose pods have not been listed.
    fn unsynced(policy: Policy, gateway: Option<&str>) -> Self {
        Self::with_roles(policy, gateway, Roles::default())
    }

    /// Like [`Self::unsynced`], for pods of several roles.
    fn with_roles(policy: Policy, gateway: Option<&str>, roles: Roles) -> Self {
        let store = ColdStarts::new(|_| {});
        let gate = Gate::new("tiny".into(), policy, store.clone());
        let (cluster, discovered) = watch::channel(Arc::default());
        let servers = Arc::<Servers>::default();
        let began = Instant::now();
        let asked = servers.clone();
        let prober: Prober =
            Arc::new(move |endpoint, _| asked.clone().ask(endpoint.address().into(), began).boxed());
        let shutdown = Shutdown::default();
        let (kept, ours) = (gate.clone(), shutdown.clone());
        let source = EndpointSource::InferencePool { name: "tiny".into() };
        let asked = servers.clone();
        let resolver: Resolver = Arc::new(move |_, _| {
            let unresolved = asked.unresolved.lock().clone();
            async move { unresolved }.boxed()
        });
        let gateway = gateway.map(String::from);
        let target = ClusterTarget { namespace: "ml".into(), source, gateway, roles };
        let keeping =
            tokio::spawn(async move { keep(kept, &target, discovered, (prober, resolver), ours).await });
        Self { gate, store, cluster, servers, shutdown, keeping, began }
    }

    /// Publishes the pods, and waits until the keeper has processed them.
    async fn report(&self, pods: &[(&str, ReportedState)]) {
        let pods: Vec<_> = pods.iter().map(|(address, word)| (*address, *word, Role::default())).collect();
        self.report_with_roles(&pods).await;
    }

    /// Like [`Self::report`], for pods of several roles.
    async fn report_with_roles(&self, pods: &[(&str, ReportedState, Role)]) {
        let endpoints = pods.iter().map(|(address, word, role)| DiscoveredEndpoint {
            address: (*address).into(),
            protocol: Protocol::Http1,
            ready: *word == ReportedState::Ready,
            terminating: *word == ReportedState::Terminating,
            gated: *word == ReportedState::Gated,
            role: *role,
        });
        let endpoints = endpoints.collect();
        self.cluster.send_replace(Arc::new(Discovered {
            is_synced: true,
            endpoints,
            ..Discovered::default()
        }));
        settle().await;
    }

    fn hold(&self) -> Ticket<Permit> {
        self.gate.demand().record_activity();
        self.gate.hold(1, true).unwrap()
    }

    fn enter(&self) -> Option<Permit> {
        self.gate.enter().map(|(permit, _): (Permit, QueuePosition)| permit)
    }

    /// Advances the clock to `ms` from the start.
    async fn at(&self, ms: u64) {
        tokio::time::sleep_until(self.began + Duration::from_millis(ms)).await;
        settle().await;
    }

    fn ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap()
    }

    fn endpoint(&self, address: &str) -> Option<Arc<Endpoint>> {
        self.gate.target().endpoints().iter().find(|endpoint| endpoint.address() == address).cloned()
    }

    fn is_open(&self, address: &str) -> bool {
        self.endpoint(address).is_some_and(|endpoint| endpoint.is_ready())
    }

    fn ended(&self) -> Vec<ColdStart> {
        self.store.recent(None, 10)
    }

    fn status(&self) -> &'static str {
        self.gate.target().status().name()
    }
}

impl Drop for KeeperTest {
    fn drop(&mut self) {
        self.keeping.abort();
    }
}

impl Servers {
    fn answer(&self, address: &str, answer: ProbeResult) {
        self.answer_after(address, answer, 0);
    }

    fn answer_after(&self, address: &str, answer: ProbeResult, ms: u64) {
        self.answers.lock().insert(address.into(), (answer, Duration::from_millis(ms)));
    }

    async fn ask(self: Arc<Self>, address: String, began: Instant) -> ProbeResult {
        let asked = u64::try_from(began.elapsed().as_millis()).unwrap();
        self.asked.lock().push((asked, address.clone()));
        let (answer, after) =
            self.answers.lock().get(&address).cloned().unwrap_or((ProbeResult::Refused, Duration::ZERO));
        {
            let mut now = self.now.lock();
            *now = (now.0 + 1, now.1.max(now.0 + 1));
        }
        if !after.is_zero() {
            sleep(after).await;
        }
        self.now.lock().0 -= 1;
        answer
    }

    /// Returns the times of probes of a server, in milliseconds from the start.
    fn times(&self, address: &str) -> Vec<u64> {
        self.asked.lock().iter().filter(|(_, asked)| asked == address).map(|(at, _)| *at).collect()
    }
}

/// Runs all tasks that are ready, without advancing the clock.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

async fn released(ticket: &mut Ticket<Permit>) -> Permit {
    match timeout(Duration::from_secs(3600), ticket.released()).await {
        Ok(ReleaseOutcome::Dispatch(permit)) => permit,
        Ok(ReleaseOutcome::Failed(reason, _)) => panic!("failed: {reason}"),
        other => panic!("{}", if other.is_err() { "not released" } else { "draining" }),
    }
}

async fn failed(ticket: &mut Ticket<Permit>) -> String {
    match timeout(Duration::from_secs(36000), ticket.released()).await {
        Ok(ReleaseOutcome::Failed(reason, _)) => reason.to_string(),
        _ => panic!("not failed"),
    }
}

fn with(max: u32, ramp_start: u32) -> Policy {
    Policy { concurrency: Concurrency { max, ramp_start }, ..Policy::default() }
}

use ReportedState::{Gated, NotReady, Ready, Terminating};

#[tokio::test(start_paused = true)]
async fn pod_that_is_up_already_has_no_ramp() {
    let stage = KeeperTest::unsynced(Policy::default(), None);
    let mut held = stage.hold();
    stage.at(500).await;
    assert!(stage.gate.cold_starts().current().is_none(), "the cluster may have ready pods");
    stage.report(&[(A, Ready), (B, Ready)]).await;
    let permit = released(&mut held).await;
    permit.first_byte();
    assert_eq!([A, B].map(|address| stage.endpoint(address).unwrap().limit()), [64, 64]);
    assert!(stage.ended().is_empty() && stage.gate.cold_starts().current().is_none());
    assert!(!stage.gate.demand().is_leased());
    assert_eq!((stage.status(), stage.servers.asked.lock().len()), ("ready", 0), "without a probe");
}

#[tokio::test(start_paused = true)]
async fn cold_start_begins_1_s_without_the_pods_list() {
    let stage = KeeperTest::unsynced(Policy::default(), None);
    let _held = stage.hold();
    stage.at(999).await;
    assert!(stage.gate.cold_starts().current().is_none());
    stage.at(1000).await;
    assert_eq!(stage.gate.cold_starts().current().unwrap().total_ms, 1000.0, "from the request on");
}

#[tokio::test(start_paused = true)]
async fn pod_is_probed_every_50_ms_and_opens_on_answer() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, NotReady)]).await;
    stage.at(10_000).await;
    assert_eq!((stage.servers.times(A), stage.status()), (vec![], "idle"), "no request waits");
    let mut held = stage.hold();
    stage.at(10_220).await;
    assert_eq!(stage.servers.times(A), [10_000, 10_050, 10_100, 10_150, 10_200]);
    assert_eq!(stage.status(), "starting");
    stage.servers.answer(A, ProbeResult::Ready);
    let permit = released(&mut held).await;
    assert_eq!(stage.ms(), 10_250, "30 ms after it began to answer, at the next probe");
    assert_eq!(stage.endpoint(A).unwrap().limit(), 4, "a cold pod has a ramp");
    stage.at(10_300).await;
    permit.first_byte();
    let [record] = stage.ended().try_into().unwrap();
    let phases: Vec<_> = record.phases.iter().map(|span| (span.name, span.duration_ms)).collect();
    assert_eq!(
        phases,
        [(Phase::Load, 250.0), (Phase::Dispatch, 0.0), (Phase::FirstByte, 50.0)],
        "the signal is marked by who pushes it"
    );
    stage.at(20_000).await;
    assert_eq!(stage.servers.times(A).len(), 6, "an open pod is not probed");
}

#[tokio::test(start_paused = true)]
async fn new_pod_is_probed_at_once_beside_a_slow_one() {
    let stage = KeeperTest::new(Policy::default(), None, &[]).await;
    let mut held = stage.hold();
    stage.at(1_003).await;
    stage.servers.answer_after(A, ProbeResult::TimedOut(Period::from_secs(1)), 1000);
    stage.report(&[(A, NotReady)]).await;
    stage.at(1_020).await;
    stage.servers.answer_after(B, ProbeResult::Ready, 7);
    stage.report(&[(A, NotReady), (B, NotReady)]).await;
    let permit = released(&mut held).await;
    assert_eq!((permit.endpoint().address(), stage.ms()), (B, 1_027), "1020 + 7");
    assert_eq!(stage.servers.times(A), [1_003], "one probe at a time");
    permit.first_byte();
    let [record] = stage.ended().try_into().unwrap();
    let phases: Vec<_> = record.phases.iter().map(|span| (span.name, span.duration_ms.round())).collect();
    assert_eq!(phases[0], (Phase::Load, 1_027.0), "no other phase is known");
}

#[tokio::test(start_paused = true)]
async fn report_of_ready_opens_a_pod_without_probes() {
    let mut policy = Policy::default();
    policy.readiness.probe = false;
    let stage = KeeperTest::new(policy, None, &[(A, NotReady)]).await;
    stage.servers.answer(A, ProbeResult::Ready);
    let mut held = stage.hold();
    stage.at(5_000).await;
    assert!(!stage.is_open(A) && stage.servers.times(A).is_empty());
    stage.report(&[(A, Ready)]).await;
    let permit = released(&mut held).await;
    assert_eq!((stage.ms(), stage.endpoint(A).unwrap().limit()), (5_000, 4));
    // After a failure, the cluster's report suffices for the pod to recover after its backoff.
    permit.suspect();
    drop(permit);
    let mut again = stage.hold();
    let permit = released(&mut again).await;
    assert_eq!((stage.ms(), permit.endpoint().limit()), (5_050, 1));
}

#[tokio::test(start_paused = true)]
async fn pod_reported_unready_stays_closed_until_restart() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, NotReady)]).await;
    stage.servers.answer(A, ProbeResult::Ready);
    let mut held = stage.hold();
    drop(released(&mut held).await);
    stage.at(30_000).await;
    stage.report(&[(A, NotReady), (B, NotReady)]).await;
    assert!(stage.is_open(A), "its kubelet has not probed yet");
    stage.report(&[(A, Ready)]).await;
    stage.at(60_000).await;
    assert!(stage.is_open(A));

    stage.report(&[(A, NotReady)]).await;
    assert!(!stage.is_open(A), "it was ready, and no longer is");
    let mut held = stage.hold();
    stage.at(61_000).await;
    assert!(!stage.is_open(A), "its answer does not suffice");
    assert_eq!(stage.servers.times(A).len(), 1 + 21, "probed nevertheless: at 60000, 60050, … 61000");
    stage.servers.answer(A, ProbeResult::Refused);
    stage.at(62_000).await;
    stage.servers.answer(A, ProbeResult::Status(StatusCode::SERVICE_UNAVAILABLE));
    stage.at(62_010).await;
    stage.servers.answer(A, ProbeResult::Ready);
    assert_eq!(released(&mut held).await.endpoint().limit(), 4, "restarted, so it has a ramp");
    assert_eq!(stage.ms(), 62_050);
}

#[tokio::test(start_paused = true)]
async fn terminating_pod_is_removed_when_vacant() {
    let stage = KeeperTest::new(with(2, 2), None, &[(A, Ready), (B, Ready)]).await;
    let permits: Vec<_> = (0..4).map(|_| stage.enter().unwrap()).collect();
    stage.report(&[(A, Terminating), (B, Ready)]).await;
    let (of_a, of_b): (Vec<_>, Vec<_>) =
        permits.into_iter().partition(|permit| permit.endpoint().address() == A);
    assert_eq!((of_a.len(), of_b.len()), (2, 2));
    drop(of_b);
    let of_b: Vec<_> = (0..3).map(|_| stage.enter()).collect();
    assert_eq!(of_b.iter().flatten().map(|permit| permit.endpoint().address()).collect::<Vec<_>>(), [B, B]);
    stage.report(&[(B, Ready)]).await;
    assert_eq!(stage.gate.in_flight(), 4, "requests in flight finish, and count");
    // The same address returns while answers are still being read.
    stage.report(&[(A, Ready), (B, Ready)]).await;
    assert!(stage.is_open(A) && stage.enter().is_none(), "full with the requests that it had");
    assert_eq!(stage.endpoint(A).unwrap().limit(), 2);
    stage.report(&[(A, Terminating), (B, Ready)]).await;
    drop(of_a);
    settle().await;
    assert!(stage.endpoint(A).is_some_and(|endpoint| !endpoint.is_ready()), "not removed yet");
    stage.report(&[(B, Ready)]).await;
    assert!(stage.endpoint(A).is_none());
    stage.report(&[(A, Terminating), (B, Ready)]).await;
    assert!(stage.endpoint(A).is_none(), "a terminating pod is not added");
    stage.report(&[(A, NotReady), (B, Ready)]).await;
    assert!(stage.endpoint(A).is_some());
}

/// Requests on a dead pod are broken off: those without an answer at once, the others after 30 s.
#[tokio::test(start_paused = true)]
async fn dead_pod_is_severed_and_answers_have_a_grace() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, Ready)]).await;
    let permits = [stage.enter().unwrap(), stage.enter().unwrap()];
    let endpoint = stage.endpoint(A).unwrap();
    let (waiting, answering) = (endpoint.connection(), endpoint.connection());
    answering.set_answering(true);
    stage.report(&[(A, Terminating)]).await;
    stage.at(60_000).await;
    assert!(!waiting.is_cut(), "terminating");
    stage.report(&[]).await;
    stage.at(120_000).await;
    assert!(!waiting.is_cut(), "it left the target, and may live");
    let dead = vec![A.into()];
    stage.cluster.send_replace(Arc::new(Discovered { is_synced: true, dead, ..Discovered::default() }));
    settle().await;
    assert!(waiting.is_cut() && !answering.is_cut());
    stage.at(149_990).await;
    assert!(!answering.is_cut());
    stage.at(150_010).await;
    assert!(answering.is_cut(), "120 + 30 s");
    drop(permits);
    settle().await;
    assert!(stage.endpoint(A).is_none());
}

/// A doubted pod is probed at once and keeps its limit; one that may not be probed has 50 ms to answer another request.
#[tokio::test(start_paused = true)]
async fn doubted_pod_keeps_its_limit_if_it_answers() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, Ready)]).await;
    stage.servers.answer(A, ProbeResult::Ready);
    let permit = stage.enter().unwrap();
    let limit = permit.endpoint().limit();
    permit.doubt();
    stage.at(1).await;
    assert!(stage.is_open(A) && !permit.endpoint().is_doubted());
    assert_eq!((stage.servers.times(A), permit.endpoint().limit()), (vec![0], limit));
    stage.servers.answer(A, ProbeResult::Refused);
    permit.doubt();
    stage.at(49).await;
    assert!(stage.is_open(A), "probed again after 50 ms at the earliest");
    stage.at(51).await;
    assert!(!stage.is_open(A));

    let mut policy = Policy::default();
    policy.readiness.probe = false;
    let stage = KeeperTest::new(policy, None, &[(A, Ready)]).await;
    let permits = [stage.enter().unwrap(), stage.enter().unwrap()];
    permits[0].doubt();
    stage.at(40).await;
    permits[1].first_byte();
    stage.at(100).await;
    assert!(stage.is_open(A), "it answered another request");
    permits[0].doubt();
    stage.at(200).await;
    // A suspect pod may get one request beside the two that it still has.
    assert_eq!((permits[0].endpoint().is_doubted(), permits[0].endpoint().limit()), (false, 3));
}

#[tokio::test(start_paused = true)]
async fn suspect_pod_is_probed_after_its_backoff() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, Ready)]).await;
    stage.servers.answer(A, ProbeResult::Ready);
    let mut times = Vec::new();
    for _ in 0..6 {
        let permit = match stage.enter() {
            Some(permit) => permit,
            None => released(&mut stage.hold()).await,
        };
        assert!(times.is_empty() || permit.endpoint().limit() == 1);
        times.push(stage.ms());
        permit.suspect();
        drop(permit);
    }
    assert_eq!(times, [0, 50, 150, 350, 750, 1550], "50, 100, 200, 400 and 800 ms later");
    let permit = released(&mut stage.hold()).await;
    permit.first_byte();
    assert_eq!((stage.ms(), permit.endpoint().limit()), (2550, 2), "a second at most; then the ramp grows");
    assert!(stage.ended().is_empty() && stage.gate.cold_starts().current().is_none());
    assert_eq!(stage.servers.times(A), [50, 150, 350, 750, 1550, 2550]);
}

#[tokio::test(start_paused = true)]
async fn suspect_pod_without_an_answer_begins_a_cold_start() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, Ready)]).await;
    stage.enter().unwrap().suspect();
    let mut held = stage.hold();
    stage.at(49).await;
    assert!(stage.gate.cold_starts().current().is_none());
    stage.at(50).await;
    assert!(stage.gate.cold_starts().current().is_some());
    stage.at(225).await;
    assert_eq!(stage.servers.times(A), [50, 100, 150, 200]);
    stage.servers.answer(A, ProbeResult::Ready);
    released(&mut held).await.first_byte();
    assert_eq!((stage.ms(), stage.ended()[0].outcome), (250, Some(ColdStartOutcome::Completed)));
}

#[tokio::test(start_paused = true)]
async fn unneeded_suspect_pod_is_probed_every_second() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, Ready), (B, Ready)]).await;
    let suspect =
        std::iter::repeat_with(|| stage.enter().unwrap()).find(|permit| permit.endpoint().address() == A);
    suspect.unwrap().suspect();
    stage.at(3_500).await;
    assert_eq!(stage.servers.times(A), [50, 1050, 2050, 3050]);
    stage.servers.answer(A, ProbeResult::Ready);
    stage.at(4_050).await;
    assert!(stage.is_open(A));
}

#[tokio::test(start_paused = true)]
async fn last_pod_going_with_held_requests_restarts() {
    let stage = KeeperTest::new(with(1, 1), None, &[(A, Ready)]).await;
    let permit = stage.enter().unwrap();
    let mut held = stage.hold();
    assert!(!stage.gate.demand().is_leased(), "an endpoint is ready");
    stage.at(1_000).await;
    stage.report(&[(A, Terminating)]).await;
    assert!(stage.gate.demand().is_leased());
    assert_eq!(stage.status(), "starting");
    stage.at(2_000).await;
    drop(permit);
    stage.report(&[(B, NotReady)]).await;
    stage.servers.answer(B, ProbeResult::Ready);
    let permit = released(&mut held).await;
    assert_eq!(permit.endpoint().address(), B);
    permit.first_byte();
    let [record] = stage.ended().try_into().unwrap();
    assert_eq!(
        record.total_ms, 1050.0,
        "from when it went, at 1000, to the second probe of the next, at 2050"
    );
    drop(permit);
    stage.report(&[]).await;
    assert_eq!(stage.status(), "idle");
}

#[tokio::test(start_paused = true)]
async fn pod_is_probed_while_others_are_full() {
    let stage = KeeperTest::new(with(1, 1), None, &[(A, Ready), (B, NotReady)]).await;
    let _permit = stage.enter().unwrap();
    stage.at(3_000).await;
    assert_eq!(stage.servers.times(B), [0; 0], "the open pod has room");
    let mut held = stage.hold();
    stage.at(3_120).await;
    assert_eq!(stage.servers.times(B), [3_000, 3_050, 3_100]);
    stage.servers.answer(B, ProbeResult::Ready);
    assert_eq!(released(&mut held).await.endpoint().address(), B);
    assert!(
        stage.ended().is_empty() && stage.gate.cold_starts().current().is_none(),
        "the target was not at zero"
    );
}

#[tokio::test(start_paused = true)]
async fn activation_timeout_names_the_last_probe() {
    let mut policy = Policy::default();
    policy.readiness.activation_timeout = Period::from_secs(60);
    let stage = KeeperTest::new(policy, None, &[]).await;
    let mut held = stage.hold();
    assert_eq!(failed(&mut held).await, "the target was not ready within 1m: there is no pod");
    assert_eq!((stage.ms(), stage.status()), (60_000, "failed"));
    assert!(!stage.gate.demand().is_leased());
    stage.at(70_000).await;
    assert_eq!(stage.status(), "idle");

    stage.report(&[(A, NotReady), (B, Terminating)]).await;
    stage.servers.answer(A, ProbeResult::Status(StatusCode::SERVICE_UNAVAILABLE));
    let mut held = stage.hold();
    assert_eq!(
        failed(&mut held).await,
        format!(
            "the target was not ready within 1m: none of 1 pods is ready; the last probe, of /health at {A}, saw: \
             status 503"
        )
    );
    let mut held = stage.hold();
    let problem = Discovered {
        is_synced: true,
        problem: Some(DiscoveryProblem::passing("no such Service")),
        ..Discovered::default()
    };
    stage.cluster.send_replace(Arc::new(problem));
    assert_eq!(failed(&mut held).await, "the target was not ready within 1m: no such Service");
    assert_eq!(stage.ended().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn lasting_obstacle_fails_held_and_new_requests() {
    let stage = KeeperTest::new(Policy::default(), None, &[]).await;
    let obstacle = |kind, message| stage.gate.target().set_obstacle(Some(Obstacle::new(kind, message)));
    stage.at(1_000).await;
    obstacle(ObstacleKind::CrashLoop, "exit code 1");
    stage.at(50_000).await;
    let mut held = stage.hold();
    stage.at(60_999).await;
    assert_eq!(stage.gate.held(), 1);
    assert_eq!(failed(&mut held).await, "exit code 1");
    assert_eq!(stage.ms(), 61_000, "60 s after it was there at 1 s, whenever the request came");
    assert_eq!(failed(&mut stage.hold()).await, "exit code 1");
    assert_eq!(stage.ms(), 61_000, "at once");

    // An obstacle without a grace period fails no request, nor does one that is removed in time.
    obstacle(ObstacleKind::NoKedaStream, "no stream");
    let mut held = stage.hold();
    stage.at(600_000).await;
    obstacle(ObstacleKind::ImagePull, "no such image");
    stage.at(719_000).await;
    stage.gate.target().set_obstacle(None);
    stage.at(800_000).await;
    assert_eq!(stage.gate.held(), 1);
    stage.report(&[(A, Ready)]).await;
    drop(released(&mut held).await);

    // No obstacle fails a request while an endpoint is ready.
    obstacle(ObstacleKind::Unschedulable, "no node");
    stage.at(5_000_000).await;
    assert!(stage.enter().is_some());
    assert_eq!(
        stage.ended().iter().filter(|record| record.outcome == Some(ColdStartOutcome::Failed)).count(),
        2
    );
}

#[tokio::test(start_paused = true)]
async fn cold_start_without_requests_is_abandoned() {
    let stage = KeeperTest::new(Policy::default(), None, &[(A, NotReady)]).await;
    drop(stage.hold());
    stage.at(3_000).await;
    assert_eq!(stage.servers.times(A).len(), 61, "the lease continues: at 0, 50, … 3000");
    stage.servers.answer(A, ProbeResult::Ready);
    stage.at(3_050).await;
    assert_eq!((stage.is_open(A), stage.ended()[0].outcome), (true, Some(ColdStartOutcome::Abandoned)));

    // The client hangs up after the dispatch, before the first byte.
    stage.report(&[]).await;
    let mut held = stage.hold();
    settle().await;
    stage.report(&[(A, Ready)]).await;
    let permit = released(&mut held).await;
    stage.at(10_000).await;
    assert_eq!(stage.ended().len(), 1);
    drop(permit);
    stage.at(11_050).await;
    assert_eq!((stage.ended().len(), stage.ended()[0].outcome), (2, Some(ColdStartOutcome::Abandoned)));

    // The pod disappears before it has answered. Its request in flight may still be answered.
    stage.report(&[]).await;
    let mut held = stage.hold();
    settle().await;
    stage.report(&[(A, Ready)]).await;
    let permit = released(&mut held).await;
    stage.report(&[]).await;
    stage.at(13_000).await;
    assert_eq!(stage.ended().len(), 2);
    drop(permit);
    stage.at(14_100).await;
    assert_eq!((stage.ended().len(), stage.ended()[0].outcome), (3, Some(ColdStartOutcome::Abandoned)));
}

#[tokio::test(start_paused = true)]
async fn concurrent_probes_are_bounded() {
    let addresses: Vec<_> = (0..100).map(|at| format!("10.0.1.{at}:8000")).collect();
    let pods: Vec<_> = addresses.iter().map(|address| (&**address, NotReady)).collect();
    let stage = KeeperTest::new(Policy::default(), None, &pods).await;
    for address in &addresses {
        stage.servers.answer_after(address, ProbeResult::Status(StatusCode::SERVICE_UNAVAILABLE), 100);
    }
    let _held = stage.hold();
    stage.at(350).await;
    assert_eq!(stage.servers.now.lock().1, MAX_PROBES);
    assert_eq!(stage.servers.asked.lock().len(), 4 * MAX_PROBES, "four rounds, at 0, 100, 200 and 300 ms");
}

#[tokio::test(start_paused = true)]
async fn gateway_is_open_with_the_limit_of_its_pods() {
    const GATEWAY_HOST: &str = "envoy:8080";
    let stage = KeeperTest::new(with(8, 2), Some("http://envoy:8080"), &[(A, Ready), (B, NotReady)]).await;
    let gateway = stage.endpoint(GATEWAY_HOST).unwrap();
    assert_eq!((stage.is_open(GATEWAY_HOST), gateway.limit()), (true, 8), "one warm pod");
    assert_eq!(stage.gate.target().endpoints().len(), 1, "pods are not endpoints");
    let permits: Vec<_> = (0..8).map(|_| stage.enter().unwrap()).collect();
    let mut held = stage.hold();
    stage.servers.answer(B, ProbeResult::Ready);
    let more = released(&mut held).await;
    assert_eq!(
        (more.endpoint().address(), gateway.limit()),
        (GATEWAY_HOST, 10),
        "8 + the ramp of the new one"
    );
    permits.iter().for_each(Permit::first_byte);
    assert_eq!(gateway.limit(), 16, "2 × 8");
    stage.gate.set_policy(with(4, 2));
    assert_eq!(gateway.limit(), 8, "2 × 4");
    stage.report(&[(A, Terminating), (B, Ready)]).await;
    assert_eq!((stage.is_open(GATEWAY_HOST), gateway.limit()), (true, 4));
    stage.report(&[(A, Terminating), (B, Terminating)]).await;
    assert!(!stage.is_open(GATEWAY_HOST));
    assert_eq!(stage.gate.in_flight(), 9, "requests in flight finish");
    drop((permits, more));
    let mut held = stage.hold();
    settle().await;
    assert_eq!(stage.status(), "starting");
    stage.report(&[(A, Ready)]).await;
    let permit = released(&mut held).await;
    assert_eq!(gateway.limit(), 2, "cold");
    permit.first_byte();
    assert_eq!(stage.ended().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn gateway_unaware_of_its_pods_is_retried_soon() {
    let stage = KeeperTest::new(with(8, 2), Some("http://envoy:8080"), &[]).await;
    let mut held = stage.hold();
    stage.at(2_000).await;
    stage.report(&[(A, Ready)]).await;
    let mut times = Vec::new();
    while times.len() < 8 {
        let permit = released(&mut held).await;
        times.push(stage.ms() - 2_000);
        // The gateway answers 503 with "no healthy upstream".
        permit.suspect();
        held = stage.gate.readmit(held.place(), 1);
    }
    assert_eq!(times, [0, 50, 150, 350, 600, 850, 1100, 1350], "50, 100 and 200 ms later, then every 250");
    assert!(stage.servers.asked.lock().is_empty(), "the gateway's health path proves nothing");
    // The pod disappears during the backoff: the request is not retried.
    stage.report(&[]).await;
    stage.at(20_000).await;
    assert_eq!((stage.gate.held(), stage.is_open("envoy:8080")), (1, false));
    stage.report(&[(A, Ready)]).await;
    let permit = released(&mut held).await;
    permit.first_byte();
    assert_eq!(stage.ms(), 20_000);
}

#[tokio::test(start_paused = true)]
async fn unresolved_gateway_is_reported_until_it_resolves() {
    let stage = KeeperTest::new(with(8, 2), Some("http://envoy.llm:8080"), &[(A, Ready)]).await;
    let unresolved = ProbeResult::Unresolved("envoy.llm".into(), "Name or service not known".into());
    *stage.servers.unresolved.lock() = Some(unresolved);
    let obstacle = || stage.gate.target().obstacle().map(|obstacle| obstacle.kind);
    let (permit, place): (Permit, QueuePosition) = stage.gate.enter().unwrap();
    // The dispatch fails as after a failed lookup.
    permit.suspect();
    let mut held = stage.gate.readmit(place, 1);
    stage.at(1_900).await;
    assert_eq!((obstacle(), stage.is_open("envoy.llm:8080")), (None, false));
    stage.at(2_250).await;
    assert_eq!(obstacle(), Some(ObstacleKind::NameUnresolved));
    stage.at(60_000).await;
    assert_eq!((stage.gate.held(), stage.is_open("envoy.llm:8080")), (1, false));
    // The Service of the gateway is created.
    *stage.servers.unresolved.lock() = None;
    let permit = released(&mut held).await;
    assert!((60_000..=60_250).contains(&stage.ms()), "{}", stage.ms());
    assert_eq!(obstacle(), None);

    // Without pods, the gateway is not reported.
    *stage.servers.unresolved.lock() = Some(ProbeResult::Unresolved("envoy.llm".into(), "gone".into()));
    permit.suspect();
    stage.at(70_000).await;
    assert_eq!(obstacle(), Some(ObstacleKind::NameUnresolved));
    stage.report(&[]).await;
    assert_eq!(obstacle(), None);
}

#[tokio::test(start_paused = true)]
async fn invalid_gateway_url_fails_requests() {
    let stage = KeeperTest::new(Policy::default(), Some("https://envoy"), &[]).await;
    let reason = failed(&mut stage.hold()).await;
    assert_eq!(reason, "the target's gateway, `https://envoy`, is not http://host:port");
}

#[tokio::test(start_paused = true)]
async fn drain_waits_for_requests_in_flight() {
    let mut stage = KeeperTest::new(Policy::default(), None, &[(A, Ready), (B, NotReady)]).await;
    let permit = stage.enter().unwrap();
    stage.shutdown.drain();
    settle().await;
    assert!(stage.enter().is_none() && !stage.keeping.is_finished());
    assert_eq!(stage.status(), "idle");
    drop(permit);
    timeout(Duration::from_secs(1), &mut stage.keeping).await.unwrap().unwrap();
    assert!(stage.gate.target().endpoints().is_empty());

    let mut stage = KeeperTest::new(Policy::default(), Some("http://envoy:80"), &[(A, Ready)]).await;
    let _permit = stage.enter().unwrap();
    stage.shutdown.kill();
    timeout(Duration::from_secs(1), &mut stage.keeping).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn lost_discovery_keeps_the_known_pods() {
    let mut stage = KeeperTest::new(Policy::default(), None, &[(A, Ready), (B, NotReady)]).await;
    stage.cluster = watch::Sender::default();
    stage.at(1_000).await;
    assert!(stage.is_open(A));
    // A pod still fails and recovers.
    stage.servers.answer(A, ProbeResult::Ready);
    stage.enter().unwrap().suspect();
    stage.at(1_100).await;
    assert!(stage.is_open(A));
}
