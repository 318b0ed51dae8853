//! Measurements of cold starts, one after the other in the real cluster, and the time spent in each phase.
//!
//! All times are CLOCK_REALTIME of the one machine, taken by this process when it observes an event; times within
//! Anteroom are from its own cold-start records, which use CLOCK_MONOTONIC.

mod cycle;
mod figures;
mod machine;
mod sight;

use std::sync::Arc;

use serde_json::json;

use crate::{
    anteroom::Anteroom,
    envoy::Envoy,
    model::{ModelDeployment, ScaledObjectManifest},
    routes::model_route,
    scenario::Scenario,
    serving::ReplicaChanges,
    wait,
    world::TestCluster,
};
pub(crate) use cycle::CycleTimes;
use figures::FigureTable;
use sight::{ObservedPods, Tap};

/// Name of the model, its Service, its route and its ScaledObject.
const MODEL: &str = "tiny";
/// Replicas of Anteroom. Two is the chart's default.
const REPLICAS: u8 = 2;
/// Number of the gateway's address.
const GATEWAY_HOST_NUMBER: u8 = 40;

/// Way in which the model is woken and reached.
#[derive(Clone, Copy)]
pub(crate) struct WakePath {
    /// Name of the way, and prefix of its namespace.
    pub(crate) name: &'static str,
    what: &'static str,
    /// Requests go to the replica without a stream of KEDA.
    by_peer: bool,
    /// Envoy is between Anteroom and the pods.
    by_gateway: bool,
    /// Anteroom patches the scale itself.
    is_direct: bool,
}

/// All measured ways.
pub(crate) const WAKE_PATHS: &[WakePath] = &[
    WakePath { name: "keda", what: "to the replica that KEDA listens to", ..PLAIN },
    WakePath { name: "peer", what: "to the other replica: its peer pushes", by_peer: true, ..PLAIN },
    WakePath { name: "envoy", what: "through Envoy as the gateway", by_gateway: true, ..PLAIN },
    WakePath { name: "kubernetes", what: "without KEDA: `scaleBy: kubernetes`", is_direct: true, ..PLAIN },
];
const PLAIN: WakePath = WakePath { name: "", what: "", by_peer: false, by_gateway: false, is_direct: false };

/// A model behind two replicas of Anteroom, and observers of it.
struct MeasurementSetup {
    it: Scenario,
    way: WakePath,
    anteroom: Anteroom,
    replicas: ReplicaChanges,
    pods: ObservedPods,
    /// A stream of the scaler besides KEDA's, and the index of the replica that serves it.
    tap: Option<(usize, Tap)>,
    _envoy: Option<Envoy>,
}

/// Measures `number` cold starts for each way, prints the tables, and writes them and all samples into a file of the
/// run.
pub(crate) async fn run(world: Arc<TestCluster>, number: usize, filters: &[String]) {
    let machine = machine::describe(&world);
    println!("\n{}", machine["text"].as_str().unwrap_or_default());
    let mut ways = Vec::new();
    for &way in WAKE_PATHS {
        if !filters.is_empty() && !filters.iter().any(|filter| way.name.contains(filter)) {
            continue;
        }
        let it = Scenario::new(world.clone(), way.name).await;
        let samples = measure_cold_starts(&it, way, number).await;
        let table = FigureTable::of(&samples);
        println!("\n{} cold starts, {} (load average {}):\n\n{table}", number, way.what, machine::load());
        ways.push(json!({ "way": way.name, "figures": table.json(), "samples": samples }));
        it.clean_up().await;
    }
    let file = world.plane.folders.run.join("cold-starts.json");
    let all = json!({ "machine": machine, "ways": ways });
    std::fs::write(&file, serde_json::to_string_pretty(&all).unwrap()).unwrap();
    println!("\nall samples: {}", file.display());
}

/// Measures `number` cold starts of a model, one after the other.
pub(crate) async fn measure_cold_starts(it: &Scenario, way: WakePath, number: usize) -> Vec<CycleTimes> {
    let mut stage = MeasurementSetup::set(it, way).await;
    let mut samples = Vec::new();
    for round in 0..number {
        stage.await_everything_at_zero().await;
        stage.load(load_time(round)).await;
        samples.push(wait::within("a cold start", wait::WAIT_LIMIT, stage.cold_start(round)).await);
    }
    samples
}

/// Returns a load time of about a second, spread evenly over the interval of the probes: otherwise every server would
/// become ready at the same point of that interval.
fn load_time(round: usize) -> String {
    // Steps of the golden ratio are evenly spread for any number of rounds.
    let share = (round as f64 * 0.618_033_988_75).fract();
    format!("{:.0}us", 1_000_000.0 + 50_000.0 * share)
}

// === impl MeasurementSetup ===

impl MeasurementSetup {
    async fn set(it: &Scenario, way: WakePath) -> Self {
        let config =
            json!({ "kubernetes": { "allowedHosts": [it.address(GATEWAY_HOST_NUMBER).to_string()] } });
        let values: &[&str] = if way.is_direct { &["directScaling.enabled=true"] } else { &[] };
        let anteroom = it.anteroom_with(REPLICAS, config, values).await;
        let envoy =
            if way.by_gateway { Some(Envoy::start(it, GATEWAY_HOST_NUMBER, MODEL).await) } else { None };
        let mut model = ModelDeployment::new(MODEL).sim("--load-time 1s");
        // 10 s is Kubernetes' default; the first probe runs when the container starts, and fails. A gateway uses only
        // ready addresses and waits for a successful probe, so it gets the period of `deploy/examples`.
        model.probe_period = if way.by_gateway { 2 } else { 10 };
        if way.is_direct {
            it.deploy(&model).await;
            let spec = json!({
                "scaleBy": "kubernetes",
                "workload": { "kind": "Deployment", "name": MODEL },
                "scaling": { "idleTimeout": "1s", "linger": "1s" },
            });
            it.apply(&model_route(MODEL, spec)).await;
            it.await_route_condition(MODEL, "Scalable", "Direct").await;
        } else {
            let mut scaled = ScaledObjectManifest::of(&model, &anteroom);
            scaled.cooldown = 1;
            let target = match &envoy {
                Some(envoy) => json!({ "target": {
                    "service": { "name": MODEL, "port": 80 },
                    "gateway": format!("http://{}", envoy.address),
                } }),
                None => json!({}),
            };
            it.serve_scaled(&anteroom, &model, target, &scaled).await;
        }
        let (replicas, pods) = (it.replicas(MODEL).await, ObservedPods::watch(it));
        Self { it: it.clone(), way, anteroom, replicas, pods, tap: None, _envoy: envoy }
    }

    /// Waits until nothing is left of the last cold start and all replicas have noticed.
    async fn await_everything_at_zero(&mut self) {
        self.replicas.await_value(0).await;
        self.it.wait_for_pods("no pod", |pods| pods.is_empty().then_some(())).await;
        for replica in &self.anteroom.replicas {
            replica.await_route_idle(&self.it, MODEL).await;
        }
        if self.way.is_direct {
            return;
        }
        // KEDA may have opened a new stream, to another replica. On the replica of the tap, KEDA's is the second
        // stream.
        let with_keda = match &self.tap {
            Some((index, _)) if self.streams(*index).await > 1.0 => *index,
            _ => {
                self.tap = None;
                let with_keda = self.it.stream_of_keda(&self.anteroom, MODEL).await;
                let address = self.anteroom.replicas[with_keda].address;
                self.tap = Some((with_keda, Tap::open(&self.it, address, MODEL).await));
                with_keda
            }
        };
        for replica in &self.anteroom.replicas {
            replica.await_reported_demand(&self.it, MODEL, 0.0).await;
        }
        let (_, tap) = self.tap.as_ref().unwrap();
        wait::within(
            &format!("no demand at replica {with_keda}"),
            wait::WAIT_LIMIT,
            tap.await_message(false),
        )
        .await;
    }

    async fn streams(&self, index: usize) -> f64 {
        self.anteroom.replicas[index].gauge("anteroom_scaler_streams", &self.it, MODEL).await
    }

    /// Sets the load time of the next server.
    async fn load(&self, time: String) {
        let args = ["sim", "--port", "8000", "--load-time", &time];
        let container = json!({ "name": "server", "args": args });
        self.it.change_template(MODEL, &json!({ "spec": { "containers": [container] } })).await;
    }

    /// Returns the index of the replica that gets the requests.
    fn requested_replica_index(&self) -> usize {
        match &self.tap {
            Some((with_keda, _)) if self.way.by_peer => 1 - with_keda,
            Some((with_keda, _)) => *with_keda,
            None => 0,
        }
    }
}
