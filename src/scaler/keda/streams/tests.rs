use std::sync::Arc;

use tokio::{
    task::yield_now,
    time::{advance, timeout},
};

use super::*;
use crate::{
    admission::Gate,
    coldstart::{ColdStarts, Phase},
    demand::Counts,
    domain::{Concurrency, Period, Policy, RequestRate, Scaling},
    scaler::keda::proto::ScaledObjectRef,
    state::Endpoint,
};

const SECOND: Duration = Duration::from_secs(1);

struct StreamsTest {
    directory: Arc<Directory>,
    gate: Arc<Gate>,
    cold_starts: Arc<ColdStarts>,
    ending: CancellationToken,
}

/// A route with a linger of 60 s and an activation timeout of 30 min, the defaults.
fn scene() -> StreamsTest {
    let cold_starts = ColdStarts::new(|_| {});
    let gate = Gate::new("tiny".into(), Policy::default(), cold_starts.clone());
    let directory = Arc::new(Directory::default());
    directory.publish([gate.clone()]);
    StreamsTest { directory, gate, cold_starts, ending: CancellationToken::new() }
}

fn trigger() -> Trigger {
    Trigger::of(&ScaledObjectRef {
        name: "vllm".into(),
        namespace: "ml".into(),
        scaler_metadata: [("route".into(), "tiny".into())].into(),
    })
    .unwrap()
}

impl StreamsTest {
    fn activity(&self) -> Activity {
        Activity::new(trigger(), self.directory.clone(), self.ending.clone(), Source::default())
    }

    fn specs(&self) -> Specs {
        Specs::new(trigger(), self.directory.clone(), self.ending.clone())
    }

    fn up(&self) -> Arc<Endpoint> {
        let endpoint = Endpoint::new("127.0.0.1:1", 64);
        self.gate.target().add(&endpoint);
        self.gate.target().ready(&endpoint, None);
        self.gate.demand().end_activation();
        endpoint
    }
}

/// Returns the next message and the time until then.
async fn next(activity: &mut Activity) -> (Duration, Option<bool>) {
    let start = Instant::now();
    let message = activity.next().await;
    (start.elapsed(), message)
}

/// Asserts that no message is sent within an hour.
async fn assert_silent(activity: &mut Activity) {
    silent_for(activity, 3600).await;
}

async fn silent_for(activity: &mut Activity, seconds: u32) {
    assert!(timeout(seconds * SECOND, activity.next()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn state_is_sent_at_once_then_on_every_edge() {
    let scene = scene();
    let mut activity = scene.activity();
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(false)));
    assert_silent(&mut activity).await;
    let held = scene.gate.hold(1, true).unwrap();
    for wait in [0, 5, 5, 5] {
        assert_eq!(next(&mut activity).await, (wait * SECOND, Some(true)));
    }
    let mut late = scene.activity();
    assert_eq!(next(&mut late).await, (Duration::ZERO, Some(true)), "a later stream gets it as well");
    drop(held);
    for _ in 3..12 {
        assert_eq!(next(&mut activity).await, (5 * SECOND, Some(true)), "the lease");
    }
    let left = 1800 - 60;
    assert_eq!(next(&mut activity).await, (left * SECOND, Some(false)), "the lease of 1800 s, less 12 × 5");
    assert_eq!(scene.gate.demand().pushes(), 2, "one edge on two streams; repetitions do not count");
}

/// Returns the trigger's ScaledObject as listed in the cluster, after another one.
fn shown(is_listed: bool, is_scaled: Option<bool>) -> Vec<PushReceiver> {
    let other =
        PushReceiver { namespace: "ml".into(), name: "other".into(), is_listed: true, is_scaled: None };
    vec![other.clone(), PushReceiver { name: "vllm".into(), is_listed, is_scaled, ..other }]
}

#[tokio::test(start_paused = true)]
async fn true_is_repeated_until_replicas_are_observed() {
    let scene = scene();
    scene.gate.demand().set_receivers(shown(true, Some(false)));
    let mut activity = scene.activity();
    assert_eq!(activity.next().await, Some(false));
    let _held = scene.gate.hold(1, true).unwrap();
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)));
    for _ in 0..100 {
        assert_eq!(next(&mut activity).await, (5 * SECOND, Some(true)), "KEDA may drop any of them");
    }
    scene.gate.demand().set_receivers(shown(true, Some(true)));
    silent_for(&mut activity, 1200).await;
    // An operator scales to zero while a request waits.
    scene.gate.demand().set_receivers(shown(true, Some(false)));
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)));
    scene.gate.demand().set_receivers(shown(true, Some(true)));
    let mut late = scene.activity();
    assert_eq!(next(&mut late).await, (Duration::ZERO, Some(true)), "a new stream gets it at once");
    silent_for(&mut late, 60).await;
    assert_eq!(scene.gate.demand().pushes(), 2);
}

#[tokio::test(start_paused = true)]
async fn ready_target_with_unknown_replicas_is_pushed_once() {
    let scene = scene();
    let endpoint = scene.up();
    let mut activity = scene.activity();
    assert_eq!(activity.next().await, Some(false));
    let _permit = scene.gate.enter().unwrap();
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)));
    assert_silent(&mut activity).await;
    endpoint.retire();
    let _held = scene.gate.hold(1, true).unwrap();
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)), "an edge after the silence");
}

#[tokio::test(start_paused = true)]
async fn demand_is_pushed_when_its_metric_is_listed() {
    let scene = scene();
    scene.gate.cold_starts().expect_push(true);
    scene.gate.demand().set_receivers(shown(false, Some(false)));
    let mut activity = scene.activity();
    assert_eq!(activity.next().await, Some(false));
    let _held = scene.gate.hold(1, true).unwrap();
    for wait in [0, 5] {
        assert_eq!(next(&mut activity).await, (wait * SECOND, Some(true)));
    }
    advance(SECOND).await;
    scene.gate.demand().set_receivers(shown(true, Some(false)));
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)), "4 s before the repetition");
    scene.gate.cold_starts().begin(scene.gate.demand().activation_since().unwrap(), 1);
    scene.gate.cold_starts().ready(None);
    scene.gate.cold_starts().abandoned();
    let [record] = scene.cold_starts.recent(None, 1).try_into().unwrap();
    let signal = record.phase(Phase::Signal).unwrap();
    assert_eq!(signal.duration_ms, 6000.0, "5 + 1 s: what was dropped before was no signal");
}

#[tokio::test(start_paused = true)]
async fn metrics_are_sent_again_until_they_are_listed() {
    let scene = scene();
    scene.gate.demand().set_receivers(shown(false, Some(false)));
    let mut specs = scene.specs();
    for wait in [0, 5, 10, 20, 40, 60, 60] {
        let start = Instant::now();
        assert!(specs.next().await.is_some());
        assert_eq!(start.elapsed(), wait * SECOND);
    }
    scene.gate.demand().set_receivers(shown(true, Some(false)));
    assert!(timeout(3600 * SECOND, specs.next()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn warm_request_after_the_linger_is_pushed() {
    let scene = scene();
    scene.up();
    let mut activity = scene.activity();
    assert_eq!(activity.next().await, Some(false));
    let (permit, _) = scene.gate.enter().unwrap();
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)));
    advance(Duration::from_secs(2)).await;
    drop(permit);
    assert_eq!(
        next(&mut activity).await,
        (60 * SECOND, Some(false)),
        "the linger; what is up needs no repetition"
    );
    let _again = scene.gate.enter().unwrap();
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)));
}

#[tokio::test(start_paused = true)]
async fn activation_is_pushed_while_demand_is_true() {
    let scene = scene();
    let endpoint = scene.up();
    drop(scene.gate.enter().unwrap());
    let mut activity = scene.activity();
    assert_eq!(activity.next().await, Some(true));
    advance(SECOND).await;
    endpoint.retire();
    let _held = scene.gate.hold(1, true).unwrap();
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)), "not with the repetition, 4 s later");
    let _second = scene.gate.hold(1, true).unwrap();
    assert_eq!(
        next(&mut activity).await,
        (5 * SECOND, Some(true)),
        "the second request is no new activation"
    );
    // The activation failed, and the next request starts another.
    scene.gate.demand().end_activation();
    let _third = scene.gate.hold(1, true).unwrap();
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)));
}

#[tokio::test(start_paused = true)]
async fn demand_of_peers_is_pushed_and_repeated() {
    let scene = scene();
    let mut activity = scene.activity();
    assert_eq!(activity.next().await, Some(false));
    let set = |counts| scene.gate.demand().set_peers(counts);
    set(Counts { held: 1, activations: 1, ..Counts::default() });
    for wait in [0, 5, 5] {
        assert_eq!(next(&mut activity).await, (wait * SECOND, Some(true)));
    }
    set(Counts { held: 2, activations: 2, ..Counts::default() });
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)), "another activation at the peer");
    set(Counts::default());
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(false)));
    assert_silent(&mut activity).await;
}

#[tokio::test(start_paused = true)]
async fn stream_follows_a_route_that_comes_and_goes() {
    let scene = scene();
    scene.directory.publish([]);
    let (mut activity, mut early) = (scene.activity(), scene.specs());
    let specs = early.next().await.unwrap().metric_specs;
    assert_eq!((&*specs[0].metric_name, specs[0].target_size), ("tiny-queue-depth", 5), "its future metric");
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(false)));
    assert_silent(&mut activity).await;
    let _held = scene.gate.hold(1, true).unwrap();
    // While the stream waits.
    let come = async { scene.directory.publish([scene.gate.clone()]) };
    let (message, ()) = tokio::join!(next(&mut activity), come);
    assert_eq!(message, (Duration::ZERO, Some(true)));
    let mut specs = scene.specs();
    assert!(specs.next().await.is_some());
    assert_eq!(scene.gate.demand().streams(), 1, "the stream of metrics gets no pushes");
    scene.directory.publish([]);
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(false)));
    assert_eq!(scene.gate.demand().streams(), 0);
    let other = Gate::new("tiny".into(), Policy::default(), scene.cold_starts.clone());
    let _held = other.hold(1, true).unwrap();
    scene.directory.publish([other.clone()]);
    assert_eq!(next(&mut activity).await, (Duration::ZERO, Some(true)));
    assert_eq!((scene.gate.demand().streams(), other.demand().streams()), (0, 1));
    drop(activity);
    assert_eq!(other.demand().streams(), 0);
}

#[tokio::test(start_paused = true)]
async fn stream_ends_on_request() {
    let scene = scene();
    let _held = scene.gate.hold(1, true).unwrap();
    let (mut activity, mut specs) = (scene.activity(), scene.specs());
    assert_eq!(activity.next().await, Some(true));
    assert!(specs.next().await.is_some());
    scene.ending.cancel();
    assert_eq!(next(&mut activity).await, (Duration::ZERO, None));
    assert_eq!(specs.next().await, None);
}

#[tokio::test(start_paused = true)]
async fn push_ends_the_signal_phase() {
    let scene = scene();
    scene.gate.cold_starts().expect_push(true);
    let mut activity = scene.activity();
    assert_eq!(activity.next().await, Some(false));
    let _held = scene.gate.hold(1, true).unwrap();
    advance(Duration::from_millis(1)).await;
    assert_eq!(activity.next().await, Some(true));
    // The prober finds the target down a little later.
    advance(Duration::from_millis(7)).await;
    scene.gate.cold_starts().begin(scene.gate.demand().activation_since().unwrap(), 1);
    scene.gate.cold_starts().signal_acknowledged();
    scene.gate.cold_starts().ready(None);
    scene.gate.cold_starts().abandoned();
    let [record] = scene.cold_starts.recent(None, 1).try_into().unwrap();
    let phases: Vec<_> = record.phases.iter().map(|span| (span.name, span.duration_ms)).collect();
    assert_eq!(phases, [(Phase::Signal, 1.0), (Phase::Load, 7.0)]);
}

#[tokio::test(start_paused = true)]
async fn specs_are_sent_at_once_and_on_changes() {
    let scene = scene();
    let mut specs = scene.specs();
    let targets = |specs: GetMetricSpecResponse| -> Vec<_> {
        specs.metric_specs.iter().map(|spec| (spec.metric_name.clone(), spec.target_size)).collect()
    };
    let depth = |target| ("tiny-queue-depth".to_owned(), target);
    assert_eq!(targets(specs.next().await.unwrap()), [depth(5)]);
    let reload = |scaling| scene.gate.set_policy(Policy { scaling, ..Policy::default() });
    reload(Scaling { target: 8, ..Scaling::default() });
    assert_eq!(targets(specs.next().await.unwrap()), [depth(8)]);
    // This change does not concern the specs.
    reload(Scaling { target: 8, linger: Period::from_secs(1), ..Scaling::default() });
    scene.gate.set_policy(Policy {
        scaling: Scaling { target: 8, ..Scaling::default() },
        concurrency: Concurrency { max: 3, ..Concurrency::default() },
        ..Policy::default()
    });
    assert!(timeout(3600 * SECOND, specs.next()).await.is_err());
    let rate = RequestRate { target: 9, window: Period::from_secs(60) };
    reload(Scaling { target: 8, request_rate: Some(rate), ..Scaling::default() });
    assert_eq!(targets(specs.next().await.unwrap()), [depth(8), ("tiny-request-rate".into(), 9)]);
    scene.directory.publish([]);
    yield_now().await;
    assert_eq!(targets(specs.next().await.unwrap()), [depth(5)], "as GetMetricSpec for an unknown route");
    assert!(timeout(3600 * SECOND, specs.next()).await.is_err());
}
