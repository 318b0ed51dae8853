use std::{net::SocketAddr, sync::atomic::AtomicUsize};

use http::{HeaderMap, HeaderValue};
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::sleep};

use super::*;
use crate::{
    admin::ClusterCounts,
    admission::{Gate, Permit},
    domain::Policy,
    error::ProxyError,
    history::RequestHistory,
    hold::Ticket,
    telemetry::RouteCounters,
};

/// Routes without a proxy.
struct FakeView {
    gates: Mutex<Vec<Arc<Gate>>>,
    unrouted: RouteCounters,
    history: Arc<RequestHistory>,
    /// Number of calls of `gates`.
    gate_calls: AtomicUsize,
}

impl View for FakeView {
    fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 8080))
    }
    fn example(&self) -> Option<String> {
        Some("tiny".into())
    }
    fn check_page(&self, _: &str, _: &HeaderMap, _: bool) -> Result<(), ProxyError> {
        Ok(())
    }
    fn listed_origin(&self, _: &HeaderMap) -> Option<HeaderValue> {
        None
    }
    fn gates(&self) -> Vec<Arc<Gate>> {
        self.gate_calls.fetch_add(1, Ordering::Relaxed);
        self.gates.lock().clone()
    }
    fn unrouted(&self) -> &RouteCounters {
        &self.unrouted
    }
    fn history(&self) -> &RequestHistory {
        &self.history
    }
    fn memory(&self) -> Vec<(&'static str, usize)> {
        vec![("body", 0), ("unfinished_body", 0), ("head", 0), ("request", 0), ("answer", 0), ("relay", 0)]
    }
    fn awaits_routes(&self) -> bool {
        false
    }
    fn has_scaler(&self) -> bool {
        false
    }
    fn peers(&self) -> Vec<(&'static str, usize)> {
        vec![("connected", 2)]
    }
    fn cluster(&self) -> Option<ClusterCounts> {
        None
    }
    fn spans(&self) -> Option<[(&'static str, u64); 3]> {
        None
    }
}

struct LiveTest {
    routes: Arc<FakeView>,
    cold_starts: Arc<ColdStarts>,
    draining: Arc<AtomicBool>,
    stopped: CancellationToken,
    live: Arc<Live>,
    running: JoinHandle<()>,
}

impl LiveTest {
    /// Starts `Live` and runs it past its first tick; the next tick follows one second later.
    async fn new(names: &[&str]) -> Self {
        let cold_starts = ColdStarts::new(|_| {});
        let gate = |name: &&str| Gate::new((*name).into(), Policy::default(), cold_starts.clone());
        let gates = Mutex::new(names.iter().map(gate).collect());
        let routes = Arc::new(FakeView {
            gates,
            unrouted: RouteCounters::default(),
            history: RequestHistory::new(0),
            gate_calls: AtomicUsize::new(0),
        });
        let (draining, stopped) = <(Arc<AtomicBool>, CancellationToken)>::default();
        let live = Live::new(routes.clone(), cold_starts.clone(), draining.clone(), stopped.clone());
        let running = tokio::spawn(live.clone().run());
        sleep(Duration::from_millis(1)).await;
        Self { routes, cold_starts, draining, stopped, live, running }
    }

    fn gate(&self, index: usize) -> Arc<Gate> {
        self.routes.gates.lock()[index].clone()
    }

    fn hold(&self, count: usize) -> Vec<Ticket<Permit>> {
        (0..count).map(|_| self.gate(0).hold(1, true).unwrap()).collect()
    }
}

/// Returns the name and data of the next event.
async fn next(watcher: &mut Watcher) -> (String, Value) {
    let event = watcher.next().await.expect("an event");
    let (name, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
    let data = data.strip_suffix("\n\n").unwrap();
    assert!(!data.contains('\n'), "one line");
    (name.to_owned(), serde_json::from_str(data).unwrap())
}

fn names(state: &Value) -> Vec<&str> {
    state["routes"].as_array().unwrap().iter().map(|route| route["name"].as_str().unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn first_report_is_full_and_later_ones_are_changes() {
    let world = LiveTest::new(&["tiny", "other"]).await;
    let mut watcher = world.live.watch().unwrap();
    let (event, state) = next(&mut watcher).await;
    assert_eq!((&*event, names(&state)), ("snapshot", vec!["tiny", "other"]));
    assert_eq!(state["names"], json!(["tiny", "other"]));
    assert_eq!(state["held"], json!({ "tiny": [0], "other": [0] }), "one tick is over");
    let about = &state["about"];
    assert_eq!(about["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(
        (&about["port"], &about["draining"], &about["tick"]),
        (&json!(8080), &json!(false), &json!(1))
    );
    assert_eq!(about["peers"], json!({ "connected": 2 }));

    let (event, state) = next(&mut watcher).await;
    assert_eq!((&*event, names(&state)), ("update", vec![]), "the next tick, and nothing has happened");
    assert_eq!((&state["about"]["tick"], &state["names"]), (&json!(2), &Value::Null));

    world.routes.gates.lock().remove(0);
    let (_, state) = next(&mut watcher).await;
    assert_eq!((names(&state), &state["names"]), (vec![], &json!(["other"])), "a reload has taken one away");
}

#[tokio::test(start_paused = true)]
async fn edge_is_sent_at_once_and_later_ones_together() {
    let world = LiveTest::new(&["tiny", "other"]).await;
    let mut watcher = world.live.watch().unwrap();
    next(&mut watcher).await;
    sleep(MIN_UPDATE_INTERVAL).await;

    let before = Instant::now();
    let mut held = world.hold(1);
    let (_, state) = next(&mut watcher).await;
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert_eq!((names(&state), &state["routes"][0]["held"]), (vec!["tiny"], &json!(1)));

    for _ in 0..50 {
        held.extend(world.hold(1));
        sleep(Duration::from_millis(1)).await;
    }
    let (_, state) = next(&mut watcher).await;
    assert_eq!((before.elapsed(), &state["routes"][0]["held"]), (MIN_UPDATE_INTERVAL, &json!(51)));

    sleep(MIN_UPDATE_INTERVAL).await;
    let before = Instant::now();
    world.gate(0).cold_starts().begin(before, 51);
    let (_, state) = next(&mut watcher).await;
    assert_eq!((before.elapsed(), &state["routes"][0]["phase"]), (Duration::ZERO, &json!("signal")));

    sleep(MIN_UPDATE_INTERVAL).await;
    let before = Instant::now();
    world.gate(0).cold_starts().failed("no luck".into(), Vec::new());
    let (_, state) = next(&mut watcher).await;
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert_eq!(state["cold_starts"][0]["reason"], "no luck");
    let (_, state) = next(&mut watcher).await;
    assert_eq!(state["cold_starts"], json!([]), "it was sent before");

    sleep(MIN_UPDATE_INTERVAL).await;
    let before = Instant::now();
    world.draining.store(true, Ordering::Relaxed);
    world.gate(0).drain();
    let (_, state) = next(&mut watcher).await;
    assert_eq!((before.elapsed(), &state["about"]["draining"]), (Duration::ZERO, &json!(true)));
}

#[tokio::test(start_paused = true)]
async fn slow_reader_gets_only_the_newest_state() {
    let world = LiveTest::new(&["tiny"]).await;
    let (mut slow, mut quick) = (world.live.watch().unwrap(), world.live.watch().unwrap());
    next(&mut slow).await;
    next(&mut quick).await;
    let reading = tokio::spawn(async move {
        let mut count = 0;
        while quick.next().await.is_some() {
            count += 1;
        }
        count
    });
    let mut held = Vec::new();
    for _ in 0..60 {
        sleep(TICK_INTERVAL).await;
        held.extend(world.hold(1));
    }
    world.gate(0).cold_starts().begin(Instant::now(), 60);
    world.gate(0).cold_starts().failed("no luck".into(), Vec::new());
    sleep(MIN_UPDATE_INTERVAL).await;
    let (_, state) = next(&mut slow).await;
    assert_eq!((&state["routes"][0]["held"], &state["about"]["tick"]), (&json!(60), &json!(61)));
    assert_eq!(state["cold_starts"].as_array().unwrap().len(), 1, "nothing is lost by it");
    let before = Instant::now();
    let (_, state) = next(&mut slow).await;
    assert!(
        before.elapsed() > Duration::ZERO && state["about"]["tick"] == 62,
        "there was nothing in between"
    );
    world.stopped.cancel();
    assert!(reading.await.unwrap() > 100, "the other watcher got every tick and every change");
}

#[tokio::test(start_paused = true)]
async fn live_viewers_are_bounded_and_get_the_end() {
    let world = LiveTest::new(&["tiny"]).await;
    let mut watchers: Vec<_> = (0..WATCHERS).map(|_| world.live.watch().expect("room")).collect();
    assert!(world.live.watch().is_none());
    watchers.pop();
    watchers.push(world.live.watch().expect("the room of who went away"));
    world.stopped.cancel();
    world.running.await.unwrap();
    for watcher in &mut watchers {
        assert!(watcher.next().await.unwrap().starts_with("event: snapshot"), "who came just before");
        assert_eq!(watcher.next().await, None);
    }
}

#[tokio::test(start_paused = true)]
async fn no_watchers_renders_no_state() {
    let world = LiveTest::new(&["tiny"]).await;
    let mut watcher = world.live.watch().unwrap();
    next(&mut watcher).await;
    drop(watcher);
    sleep(TICK_INTERVAL).await;
    let (looks, version) =
        (world.routes.gate_calls.load(Ordering::Relaxed), world.live.shown.borrow().version());
    let _held = world.hold(3);
    world.gate(0).cold_starts().begin(Instant::now(), 3);
    sleep(TICK_INTERVAL / 2).await;
    assert_eq!(world.routes.gate_calls.load(Ordering::Relaxed), looks, "edges are not even heard");
    sleep(TICK_INTERVAL).await;
    assert_eq!(
        world.routes.gate_calls.load(Ordering::Relaxed),
        looks + 1,
        "one look a tick, for the samples"
    );
    assert_eq!(world.live.shown.borrow().version(), version);
    assert!(world.cold_starts.recent(None, 1).is_empty());
    let mut watcher = world.live.watch().unwrap();
    let (_, state) = next(&mut watcher).await;
    assert_eq!(state["routes"][0]["held"], 3, "a new watcher gets the current state");
}

#[tokio::test(start_paused = true)]
async fn held_history_keeps_two_minutes_of_maxima() {
    let world = LiveTest::new(&["tiny", "other"]).await;
    let mut watcher = world.live.watch().unwrap();
    next(&mut watcher).await;
    for count in [3, 1] {
        let held = world.hold(count);
        sleep(MIN_UPDATE_INTERVAL * 2).await;
        drop(held);
        sleep(TICK_INTERVAL - MIN_UPDATE_INTERVAL * 2).await;
    }
    let state = next(&mut watcher).await.1;
    assert_eq!(
        state["held"],
        json!({ "tiny": 1 }),
        "of the last second, and without those that hold nothing"
    );
    let mut late = world.live.watch().unwrap();
    assert_eq!(next(&mut late).await.1["held"]["tiny"], json!([0, 3, 1]));
    sleep(TICK_INTERVAL * 200).await;
    let history = |state: Value| state["held"]["tiny"].as_array().unwrap().clone();
    assert_eq!(
        history(next(&mut world.live.watch().unwrap()).await.1),
        vec![json!(0); Samples::SAMPLE_WINDOW_SECS]
    );
    world.routes.gates.lock().remove(0);
    sleep(TICK_INTERVAL).await;
    assert_eq!(
        world.live.making.lock().samples.of(&"tiny".into()).count(),
        0,
        "of a route that is gone, nothing"
    );
}
