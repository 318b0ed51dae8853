use parking_lot::Mutex;

use super::*;
use crate::{
    coldstart::{ColdStarts, Phase},
    domain::{Period, Policy, Scaling as Policies},
    state::{Endpoint, Replicas, ScaleFuture},
};

/// A workload that records its patches.
#[derive(Default)]
struct FakeScale {
    state: Mutex<FakeScaleState>,
}

#[derive(Default)]
struct FakeScaleState {
    wanted: u32,
    version: u64,
    /// Replica counts set by patches, in order.
    patched_replicas: Vec<u32>,
    reads: usize,
    /// Errors that the next calls return.
    errors: Vec<ScaleError>,
    /// Replica count that another client sets just before the next patch.
    concurrent_patch: Option<u32>,
}

impl Scale for FakeScale {
    fn replicas<'a>(&'a self, namespace: &'a str, workload: &'a Workload) -> ScaleFuture<'a, Replicas> {
        assert_eq!((namespace, &*workload.name), ("team-a", "vllm"));
        let mut state = self.state.lock();
        state.reads += 1;
        let result = match state.errors.pop() {
            Some(error) => Err(error),
            None => Ok(Replicas { wanted: state.wanted, version: Some(state.version.to_string()) }),
        };
        Box::pin(async { result })
    }

    fn set<'a>(
        &'a self,
        _: &'a str,
        _: &'a Workload,
        seen: &'a Replicas,
        replicas: u32,
    ) -> ScaleFuture<'a, ()> {
        let mut state = self.state.lock();
        if let Some(rival) = state.concurrent_patch.take() {
            state.wanted = rival;
            state.version += 1;
        }
        let result = if seen.version == Some(state.version.to_string()) {
            state.wanted = replicas;
            state.version += 1;
            state.patched_replicas.push(replicas);
            Ok(())
        } else {
            Err(ScaleError::Conflict)
        };
        Box::pin(async { result })
    }
}

struct KubernetesTest {
    gate: Arc<Gate>,
    fake: Arc<FakeScale>,
    running: tokio::task::JoinHandle<()>,
}

impl KubernetesTest {
    fn new(wanted: u32, scale_by: ScaleBy) -> Self {
        let policy = Policy {
            scale_by,
            workload: Some(Workload {
                api_version: "apps/v1".into(),
                kind: "Deployment".into(),
                name: "vllm".into(),
            }),
            scaling: Policies { idle_timeout: Period::from_secs(300), ..Policies::default() },
            ..Policy::default()
        };
        let gate = Gate::new("team-a/chat".into(), policy, ColdStarts::new(|_| {}));
        let fake = Arc::new(FakeScale::default());
        fake.state.lock().wanted = wanted;
        let (theirs, scale) = (gate.clone(), fake.clone());
        let running = tokio::spawn(async move { run(theirs, "team-a", scale).await });
        Self { gate, fake, running }
    }

    fn sets(&self) -> Vec<u32> {
        self.fake.state.lock().patched_replicas.clone()
    }

    /// Adds a ready endpoint.
    fn come_up(&self) -> Arc<Endpoint> {
        let endpoint = Endpoint::new("10.0.0.1:8000", 8);
        self.gate.target().add(&endpoint);
        self.gate.target().ready(&endpoint, None);
        self.gate.demand().end_activation();
        endpoint
    }
}

impl Drop for KubernetesTest {
    fn drop(&mut self) {
        self.running.abort();
    }
}

async fn secs(seconds: u64) {
    sleep(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn first_request_scales_up_idle_timeout_to_zero() {
    let stage = KubernetesTest::new(0, ScaleBy::Kubernetes);
    secs(3600).await;
    assert_eq!(stage.sets(), [0_u32; 0], "no request yet");
    let held = stage.gate.hold(1, true).unwrap();
    sleep(Duration::from_millis(1)).await;
    assert_eq!(stage.sets(), [1], "at once");
    let cold_starts = stage.gate.cold_starts();
    cold_starts.begin(stage.gate.demand().activation_since().unwrap(), 1);
    let signal = cold_starts.current().unwrap().phases[0].clone();
    assert_eq!((signal.name, signal.duration_ms), (Phase::Signal, 0.0), "scaled at once");
    secs(60).await;
    let _endpoint = stage.come_up();
    drop(held);
    secs(100).await;
    let (permit, _) = stage.gate.enter().unwrap();
    secs(1000).await;
    drop(permit);
    secs(299).await;
    assert_eq!(stage.sets(), [1], "299 of 300 s since the last answer");
    secs(2).await;
    assert_eq!(stage.sets(), [1, 0]);
}

#[tokio::test(start_paused = true)]
async fn request_does_not_change_replicas_above_zero() {
    let stage = KubernetesTest::new(3, ScaleBy::Kubernetes);
    let _held = stage.gate.hold(1, true).unwrap();
    secs(10).await;
    assert_eq!(stage.sets(), [0_u32; 0]);
    assert!(stage.fake.state.lock().reads > 1, "read again while a request waits");
}

#[tokio::test(start_paused = true)]
async fn conflict_is_retried_after_reading_again() {
    let stage = KubernetesTest::new(0, ScaleBy::Kubernetes);
    stage.fake.state.lock().concurrent_patch = Some(2);
    let held = stage.gate.hold(1, true).unwrap();
    secs(1).await;
    assert_eq!((stage.sets(), stage.fake.state.lock().wanted), (vec![], 2));
    // Another replica scaled the target to zero when this one admitted a request.
    stage.fake.state.lock().wanted = 0;
    secs(2).await;
    assert_eq!(stage.sets(), [1], "within 2 s");
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn loading_target_is_not_idle_without_clients() {
    let stage = KubernetesTest::new(0, ScaleBy::Kubernetes);
    drop(stage.gate.hold(1, true).unwrap());
    secs(900).await;
    assert_eq!(stage.sets(), [1], "the lease holds for 30 minutes, thrice the idle time");
    stage.come_up();
    secs(299).await;
    assert_eq!(stage.sets(), [1], "clients may retry");
    secs(4).await;
    assert_eq!(stage.sets(), [1, 0]);
}

#[tokio::test(start_paused = true)]
async fn manual_scale_up_restarts_the_idle_timeout() {
    let stage = KubernetesTest::new(0, ScaleBy::Kubernetes);
    secs(1000).await;
    stage.fake.state.lock().wanted = 1;
    secs(300).await;
    assert_eq!(stage.sets(), [0_u32; 0], "noticed within 60 s, then idle for 300 s");
    secs(62).await;
    assert_eq!(stage.sets(), [0]);
}

#[tokio::test(start_paused = true)]
async fn failures_are_retried_with_backoff() {
    let stage = KubernetesTest::new(0, ScaleBy::Kubernetes);
    sleep(Duration::from_millis(1)).await;
    stage.fake.state.lock().errors = vec![ScaleError::Unavailable("refused".into()); 4];
    let _held = stage.gate.hold(1, true).unwrap();
    sleep(Duration::from_millis(1400)).await;
    assert_eq!(stage.sets(), [0_u32; 0]);
    sleep(Duration::from_millis(110)).await;
    assert_eq!(stage.sets(), [1], "100 + 200 + 400 + 800 ms");
}

#[tokio::test(start_paused = true)]
async fn refusal_is_found_before_demand_and_rechecked() {
    let stage = KubernetesTest::new(0, ScaleBy::Kubernetes);
    stage.fake.state.lock().errors = vec![ScaleError::Refused("owned".into()); 12];
    sleep(Duration::from_millis(1)).await;
    assert_eq!(stage.fake.state.lock().reads, 1);
    secs(120).await;
    assert_eq!(
        stage.fake.state.lock().reads,
        13,
        "after 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4 and 12.8 s, then each 15 s: the thirteenth after 85.5 s, which went well"
    );
}

#[tokio::test(start_paused = true)]
async fn routes_scaled_by_keda_are_left_alone() {
    let stage = KubernetesTest::new(1, ScaleBy::Keda);
    let _held = stage.gate.hold(1, true).unwrap();
    secs(3600).await;
    assert_eq!((stage.sets(), stage.fake.state.lock().reads), (vec![], 0));
}
