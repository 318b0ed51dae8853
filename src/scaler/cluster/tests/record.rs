//! Reports of pods, in the record of their cold start.

use super::*;
use crate::{
    coldstart::TargetKind,
    state::{Observation, OutputTail, PodStart},
};

const GATEWAY_URL: &str = "http://envoy:8080";

/// A report of a pod, with the ends of its phases in milliseconds from the start.
struct PodReport {
    name: &'static str,
    address: Option<&'static str>,
    state: ReportedState,
    moments: Vec<(Phase, u64)>,
    tail: Option<OutputTail>,
}

fn pod_report(
    name: &'static str,
    address: Option<&'static str>,
    state: ReportedState,
    moments: &[(Phase, u64)],
) -> PodReport {
    PodReport { name, address, state, moments: moments.to_vec(), tail: None }
}

impl KeeperTest {
    async fn report_pods(&self, pods: &[PodReport]) {
        let endpoints = pods.iter().filter_map(|pod| {
            Some(DiscoveredEndpoint {
                address: pod.address?.into(),
                protocol: Protocol::Http1,
                ready: pod.state == Ready,
                terminating: false,
                ..DiscoveredEndpoint::default()
            })
        });
        let starts = pods.iter().map(|pod| {
            let at = |ms: u64| Observation { at: self.began + Duration::from_millis(ms), stamp: None };
            Arc::new(PodStart {
                name: pod.name.into(),
                address: pod.address.map(Into::into),
                node: Some("gpu-1".into()),
                moments: pod.moments.iter().map(|(phase, ms)| (*phase, at(*ms))).collect(),
                tail: pod.tail.clone(),
                ..PodStart::default()
            })
        });
        let (endpoints, starts) = (endpoints.collect(), starts.collect());
        self.cluster.send_replace(Arc::new(Discovered {
            is_synced: true,
            endpoints,
            starts,
            ..Discovered::default()
        }));
        settle().await;
    }

    /// Returns the phases of the one cold start that has ended, with their durations, and its pod.
    fn record(&self) -> (Vec<(Phase, f64)>, Option<String>) {
        let [record] = self.ended().try_into().unwrap();
        let phases = record.phases.iter().map(|span| (span.name, span.duration_ms)).collect();
        (phases, record.pod.map(|pod| pod.to_string()))
    }
}

use Phase::{Create, Dispatch, FirstByte, Load, Propagate, Pull, Schedule, Start};

#[tokio::test(start_paused = true)]
async fn load_ends_with_the_report_that_opened_the_pod() {
    let stage = KeeperTest::new(Policy::default(), None, &[]).await;
    stage.gate.cold_starts().set_target_kind(TargetKind::Cluster);
    let mut held = stage.hold();
    stage.at(20).await;
    stage.report_pods(&[pod_report("a/x", None, NotReady, &[(Create, 20)])]).await;
    assert_eq!(stage.gate.cold_starts().phase().map(|(phase, _)| phase), Some(Schedule));
    let mut seen = vec![(Create, 20), (Schedule, 25), (Start, 400)];
    stage.at(430).await;
    stage.report_pods(&[pod_report("a/x", Some(A), NotReady, &seen)]).await;
    stage.at(5_000).await;
    // The cluster reports the load late, as another container of the pod was not ready.
    seen.push((Load, 4_900));
    stage.report_pods(&[pod_report("a/x", Some(A), Ready, &seen)]).await;
    released(&mut held).await.first_byte();
    let (phases, pod) = stage.record();
    assert_eq!(
        phases,
        [
            (Create, 20.0),
            (Schedule, 5.0),
            (Start, 375.0),
            (Load, 4_500.0),
            (Propagate, 100.0),
            (Dispatch, 0.0),
            (FirstByte, 0.0)
        ],
        "400 - 25, 4900 - 400, 5000 - 4900"
    );
    assert_eq!(pod.as_deref(), Some("a/x"));
}

#[tokio::test(start_paused = true)]
async fn record_names_the_pod_that_answered_first() {
    let stage = KeeperTest::new(Policy::default(), None, &[]).await;
    let mut held = stage.hold();
    let first = [(Create, 10), (Schedule, 20), (Start, 90)];
    let second = [(Create, 30), (Schedule, 40), (Pull, 60), (Start, 70)];
    stage.at(100).await;
    stage
        .report_pods(&[
            pod_report("a/x", Some(A), NotReady, &first),
            pod_report("a/y", Some(B), NotReady, &second),
        ])
        .await;
    stage.servers.answer(B, ProbeResult::Ready);
    released(&mut held).await.first_byte();
    assert_eq!(stage.ms(), 150, "at its second probe");
    let (phases, pod) = stage.record();
    assert_eq!(
        phases,
        [
            (Create, 30.0),
            (Schedule, 10.0),
            (Pull, 20.0),
            (Start, 10.0),
            (Load, 80.0),
            (Dispatch, 0.0),
            (FirstByte, 0.0)
        ],
        "150 - 70"
    );
    assert_eq!(pod.as_deref(), Some("a/y"));
}

#[tokio::test(start_paused = true)]
async fn gateway_delay_counts_as_propagate_phase() {
    let stage = KeeperTest::new(with(8, 2), Some(GATEWAY_URL), &[]).await;
    let mut held = stage.hold();
    stage.at(1_000).await;
    let seen = [(Create, 100), (Start, 600)];
    stage
        .report_pods(&[
            pod_report("a/x", Some(A), NotReady, &seen),
            pod_report("a/y", Some(B), NotReady, &seen),
        ])
        .await;
    stage.servers.answer(A, ProbeResult::Ready);
    for _ in 0..3 {
        let permit = released(&mut held).await;
        // The gateway answers 503 with "no healthy upstream".
        permit.suspect();
        held = stage.gate.readmit(held.place(), 1);
    }
    // Another pod is ready by the time of the retry.
    stage.servers.answer(B, ProbeResult::Ready);
    let permit = released(&mut held).await;
    assert_eq!(stage.ms(), 1_400, "1050 and the back-offs of 50, 100 and 200");
    stage.at(1_430).await;
    permit.first_byte();
    let (phases, pod) = stage.record();
    assert_eq!(
        phases,
        [
            (Create, 100.0),
            (Start, 500.0),
            (Load, 450.0),
            (Propagate, 350.0),
            (Dispatch, 0.0),
            (FirstByte, 30.0)
        ],
        "the pod answered at 1050, the gateway opened for good at 1400"
    );
    assert_eq!(pod.as_deref(), Some("a/x"));
}

#[tokio::test(start_paused = true)]
async fn failed_record_has_lines_of_the_newest_pod() {
    let stage = KeeperTest::new(Policy::default(), None, &[]).await;
    let mut held = stage.hold();
    let (older, newer) = (OutputTail::default(), OutputTail::default());
    older.push("loading".into());
    (0..60).for_each(|line| newer.push(format!("CUDA error {line}")));
    let pod = |name, at, tail: &OutputTail| PodReport {
        tail: Some(tail.clone()),
        ..pod_report(name, None, NotReady, &[(Create, at), (Start, at + 5)])
    };
    stage.at(100).await;
    stage.report_pods(&[pod("a/x", 90, &newer), pod("a/y", 20, &older)]).await;
    stage.gate.target().set_obstacle(Some(Obstacle::new(ObstacleKind::CrashLoop, "it ends")));
    let reason = failed(&mut held).await;
    assert!(reason.starts_with("it ends\nIts last lines:\nCUDA error 50"), "{reason}");
    let [record] = stage.ended().try_into().unwrap();
    assert_eq!(
        (record.last_lines.len(), &*record.last_lines[0]),
        (OutputTail::MAX_TAIL_LINES, "CUDA error 10")
    );
    let last = record.phases.last().unwrap();
    assert_eq!((last.name, last.unfinished), (Load, true));
}

#[tokio::test(start_paused = true)]
async fn pod_that_refuses_fails_its_one_cold_start() {
    let mut policy = Policy::default();
    policy.failure_grace.service = crate::domain::Period::from_secs(5);
    let stage = KeeperTest::new(policy, None, &[]).await;
    stage.gate.cold_starts().set_target_kind(TargetKind::Cluster);
    let mut held = stage.hold();
    stage.at(1_000).await;
    // The kubelet probes another port than that of the Service, which refuses connections.
    let seen = [(Create, 20), (Start, 100), (Load, 900)];
    stage.report_pods(&[pod_report("a/x", Some(A), Ready, &seen)]).await;
    let permit = released(&mut held).await;
    permit.suspect();
    drop(permit);
    held = stage.gate.readmit(held.place(), 1);
    stage.at(2_000).await;
    assert_eq!((stage.ended().len(), stage.status()), (0, "starting"));
    assert_eq!(stage.gate.cold_starts().phase().map(|(phase, _)| phase), Some(Propagate));
    assert!(stage.gate.demand().is_leased(), "it is wanted again");
    stage.gate.target().set_obstacle(Some(Obstacle::new(ObstacleKind::PortRefused, "it refuses")));
    assert!(failed(&mut held).await.starts_with("it refuses"));
    let [record] = stage.ended().try_into().unwrap();
    assert_eq!(
        (record.outcome, record.reason.as_deref()),
        (Some(ColdStartOutcome::Failed), Some("it refuses"))
    );
    let phases = record.phases.iter().map(|span| (span.name, span.duration_ms, span.unfinished));
    assert_eq!(
        phases.collect::<Vec<_>>(),
        [(Create, 20.0, false), (Start, 80.0, false), (Load, 800.0, false), (Propagate, 6_100.0, true)],
        "until 7000, the grace of 5 s after 2000"
    );
}

#[tokio::test(start_paused = true)]
async fn pod_that_dies_unanswered_prolongs_its_cold_start() {
    let stage = KeeperTest::new(Policy::default(), None, &[]).await;
    stage.gate.cold_starts().set_target_kind(TargetKind::Cluster);
    let mut held = stage.hold();
    stage.at(1_000).await;
    let first = [(Create, 20), (Start, 100), (Load, 900)];
    stage.report_pods(&[pod_report("a/x", Some(A), Ready, &first)]).await;
    let permit = released(&mut held).await;
    stage.at(2_000).await;
    let next = [(Create, 1_500), (Start, 1_700)];
    stage.report_pods(&[pod_report("a/y", Some(B), NotReady, &next)]).await;
    permit.suspect();
    drop(permit);
    held = stage.gate.readmit(held.place(), 1);
    stage.servers.answer_after(B, ProbeResult::Ready, 10);
    stage.at(3_000).await;
    released(&mut held).await.first_byte();
    let [record] = stage.ended().try_into().unwrap();
    assert_eq!((record.outcome, record.pod.as_deref()), (Some(ColdStartOutcome::Completed), Some("a/y")));
    let phases: Vec<_> = record.phases.iter().map(|span| (span.name, span.duration_ms)).collect();
    assert_eq!(
        phases,
        [(Create, 1_500.0), (Start, 200.0), (Load, 310.0), (Dispatch, 0.0), (FirstByte, 990.0)],
        "it answered at 2010, and a request at 3000"
    );
}
