//! Comparison of the replay with the real gate, hold queue, endpoint tracking and scaler (`scaleBy: kubernetes`), on a paused
//! clock with a simulated cluster.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::{
    admission::Gate,
    bench::advise::{draw::SeededDraws, synthetic::office_week},
    coldstart::ColdStarts,
    domain::{
        ClusterTarget, Concurrency, EndpointSource, Hold, Period, Policy, Readiness, ScaleBy, Scaling,
        ServicePort, Target, Workload,
    },
    hold::ReleaseOutcome,
    scaler::{Options, Shutdown, supervise},
    state::{
        Discovered, DiscoveredEndpoint, Discovery, Protocol, Replicas, Scale, ScaleError,
        ScaleFuture as Answer,
    },
};

/// Simulated cluster whose pod becomes ready after a drawn start-up time.
struct SimulatedCluster {
    began: Instant,
    start_ups: Vec<u64>,
    pods: watch::Sender<Arc<Discovered>>,
    state: Mutex<SimulatedClusterState>,
}

#[derive(Default)]
struct SimulatedClusterState {
    wanted: u32,
    version: u64,
    starting: Option<AbortOnDropHandle<()>>,
    starts: usize,
}

fn pods(ready: bool) -> Arc<Discovered> {
    let pod = DiscoveredEndpoint {
        address: "10.0.0.1:8000".into(),
        protocol: Protocol::Http1,
        ready: true,
        terminating: false,
        ..DiscoveredEndpoint::default()
    };
    Arc::new(Discovered {
        is_synced: true,
        endpoints: if ready { vec![pod] } else { Vec::new() },
        ..Discovered::default()
    })
}

impl Discovery for SimulatedCluster {
    fn watch(&self, _: &ClusterTarget) -> watch::Receiver<Arc<Discovered>> {
        self.pods.subscribe()
    }
}

impl Scale for SimulatedCluster {
    fn replicas<'a>(&'a self, _: &'a str, _: &'a Workload) -> Answer<'a, Replicas> {
        let state = self.state.lock();
        let seen = Replicas { wanted: state.wanted, version: Some(state.version.to_string()) };
        Box::pin(async { Ok(seen) })
    }

    fn set<'a>(&'a self, _: &'a str, _: &'a Workload, seen: &'a Replicas, replicas: u32) -> Answer<'a, ()> {
        let mut state = self.state.lock();
        if seen.version != Some(state.version.to_string()) {
            return Box::pin(async { Err(ScaleError::Conflict) });
        }
        state.version += 1;
        state.wanted = replicas;
        state.starting = None;
        if replicas == 0 {
            self.pods.send_replace(pods(false));
        } else {
            state.starts += 1;
            let (ready, pods_of) = (Instant::now() + self.start_up(), self.pods.clone());
            state.starting = Some(AbortOnDropHandle::new(tokio::spawn(async move {
                sleep_until(ready).await;
                pods_of.send_replace(pods(true));
            })));
        }
        Box::pin(async { Ok(()) })
    }
}

impl SimulatedCluster {
    /// Draws the start-up time like the replay.
    fn start_up(&self) -> Duration {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap();
        Duration::from_millis(SeededDraws::new(1, &self.start_ups).draw(now, 0))
    }
}

/// Sends a request through the real gate.
async fn fate(gate: Arc<Gate>, began: Instant, arrival: Arrival, hold: Duration) -> RequestFate {
    let came = began + Duration::from_millis(arrival.at);
    sleep_until(came).await;
    let permit = match gate.enter() {
        Some((permit, _)) => permit,
        None => {
            let Ok(mut ticket) = gate.hold(1, true) else { return RequestFate::Rejected };
            match timeout_at(came + hold, ticket.released()).await {
                Ok(ReleaseOutcome::Dispatch(permit)) => permit,
                Ok(_) => panic!("neither dispatched nor timed out"),
                Err(_) => return RequestFate::TimedOut,
            }
        }
    };
    let waited = u64::try_from(came.elapsed().as_millis()).unwrap();
    permit.first_byte();
    sleep(Duration::from_millis(arrival.service)).await;
    RequestFate::Served(waited)
}

/// Runs the replay and the proxy with equal inputs. Returns the replay, and fates and number of starts of the proxy.
async fn both(
    arrivals: &[Arrival],
    settings: &ReplaySettings,
    start_ups: &[u64],
) -> (ReplayOutcome, Vec<RequestFate>, usize) {
    let policy = Policy {
        scale_by: ScaleBy::Kubernetes,
        workload: Some(Workload {
            api_version: "apps/v1".into(),
            kind: "Deployment".into(),
            name: "vllm".into(),
        }),
        scaling: Scaling { idle_timeout: Period::from_millis(settings.idle), ..Scaling::default() },
        hold: Hold {
            max_requests: settings.hold_requests,
            timeout: Period::from_millis(settings.hold),
            ..Hold::default()
        },
        // The replay does not model the ramp.
        concurrency: Concurrency { max: settings.concurrency, ramp_start: settings.concurrency },
        readiness: Readiness { probe: false, ..Readiness::default() },
        ..Policy::default()
    };
    let gate = Gate::new("team-a/chat".into(), policy, ColdStarts::new(|_| {}));
    let cluster = Arc::new(SimulatedCluster {
        began: Instant::now(),
        start_ups: start_ups.to_vec(),
        pods: watch::Sender::new(pods(false)),
        state: Mutex::default(),
    });
    let target = Target::Cluster(ClusterTarget {
        namespace: "team-a".into(),
        source: EndpointSource::Service { name: "vllm".into(), port: ServicePort::Number(8000) },
        gateway: None,
        roles: <_>::default(),
    });
    let options = Options { discovery: cluster.clone(), scale: cluster.clone(), ..Options::default() };
    let supervised =
        supervise(gate.clone(), watch::Sender::new(target).subscribe(), options, Shutdown::default());
    let _supervised = AbortOnDropHandle::new(tokio::spawn(supervised));
    let hold = Duration::from_millis(settings.hold);
    let requests: Vec<_> = arrivals
        .iter()
        .map(|arrival| tokio::spawn(fate(gate.clone(), cluster.began, *arrival, hold)))
        .collect();
    let mut fates = Vec::new();
    for request in requests {
        fates.push(request.await.unwrap());
    }
    let starts = cluster.state.lock().starts;
    let replayed = replay(arrivals, 0, settings, |at, nth| SeededDraws::new(1, start_ups).draw(at, nth));
    (replayed, fates, starts)
}

/// Returns the first half of the synthetic Monday, with its nightly job.
fn monday() -> Vec<Arrival> {
    let week = office_week(1);
    let requests = week.requests.iter().take_while(|request| request.at < week.from + 12 * 3_600_000);
    requests
        .map(|request| Arrival {
            at: request.at.abs_diff(week.from),
            service: request.service.unwrap_or_default(),
        })
        .collect()
}

#[tokio::test(start_paused = true)]
async fn replay_matches_the_proxy() {
    let start_ups = [150_000, 200_000, 240_000, 300_000];
    let settings = ReplaySettings {
        floor: 0,
        max_replicas: 1,
        idle: 90_000,
        poll: 1,
        concurrency: 2,
        hold_requests: 6,
        hold: 230_000,
        target: 5,
    };
    let arrivals = monday();
    let (replayed, fates, starts) = both(&arrivals, &settings, &start_ups).await;
    assert_eq!(starts, replayed.cold_starts);
    let count =
        |fates: &[RequestFate], is: fn(&RequestFate) -> bool| fates.iter().filter(|fate| is(fate)).count();
    for is in [
        (|fate: &RequestFate| matches!(fate, RequestFate::Served(waited) if *waited > 0))
            as fn(&RequestFate) -> bool,
        |fate| matches!(fate, RequestFate::Served(0)),
        |fate| *fate == RequestFate::TimedOut,
        |fate| *fate == RequestFate::Rejected,
    ] {
        assert!(count(&fates, is) > 0, "every outcome must occur: {:?}", (starts, arrivals.len()));
    }
    assert_eq!(fates, replayed.fates);
    // Limits under which no request is lost.
    let generous =
        ReplaySettings { idle: 600_000, concurrency: 64, hold_requests: 256, hold: 900_000, ..settings };
    let (replayed, fates, starts) = both(&arrivals, &generous, &start_ups).await;
    assert_eq!((starts, &fates), (replayed.cold_starts, &replayed.fates));
}
