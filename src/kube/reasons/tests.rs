use super::*;
use crate::domain::RouteKey;
use crate::kube::scaled_objects::{
    PAUSED_ANNOTATION, PAUSED_REPLICAS_ANNOTATION, PAUSED_SCALE_OUT_ANNOTATION,
};

const CHAT_ROUTE_KEY: &str = "team-a/chat";

fn scaled(pause: Option<Pause>) -> ScaledObjectFacts {
    ScaledObjectFacts {
        namespace: "team-a".into(),
        name: "vllm".into(),
        pause,
        pause_annotations: match pause {
            None => Vec::new(),
            Some(Pause::Frozen) => vec![PAUSED_ANNOTATION],
            Some(Pause::At(_)) => vec![PAUSED_REPLICAS_ANNOTATION, PAUSED_ANNOTATION],
            Some(Pause::ScaleOut) => vec![PAUSED_SCALE_OUT_ANNOTATION],
        },
        not_ready: None,
        trigger: ExternalTrigger {
            index: 1,
            route: "chat".into(),
            address: "anteroom:9090".into(),
            pushes: true,
        },
        is_listed: true,
        pushed_replicas: 1,
    }
}

fn workload(replicas: u32, pods: &[Option<ObstacleKind>]) -> WorkloadFacts {
    let trouble = |kind: &ObstacleKind| KubeProblem::new(*kind, format!("pod: {}", kind.name()));
    let pods = pods.iter().zip(0..).map(|(pod, number)| PodFacts {
        name: format!("vllm-{number}"),
        labels: "app=vllm".into(),
        trouble: pod.as_ref().map(trouble),
    });
    WorkloadFacts {
        kind: "Deployment".into(),
        namespace: "team-a".into(),
        name: "vllm".into(),
        replicas: Some(replicas),
        pods: pods.collect(),
        ..WorkloadFacts::default()
    }
}

fn facts(scaled_objects: Vec<ScaledObjectFacts>, workloads: Vec<WorkloadFacts>) -> Facts {
    Facts {
        is_cluster_route: true,
        metadata_key: "route",
        keda: KedaState::Known,
        scaled_objects,
        workloads: workloads.into_iter().map(Arc::new).collect(),
        ..Facts::default()
    }
}

fn obstacle_message(facts: &Facts, seen: ProxyView) -> Option<(ObstacleKind, String)> {
    facts
        .obstacle(&RouteKey::from(CHAT_ROUTE_KEY), &seen)
        .map(|trouble| (trouble.kind, trouble.message.to_string()))
}

fn kind(facts: &Facts) -> Option<ObstacleKind> {
    obstacle_message(facts, ProxyView::default()).map(|(kind, _)| kind)
}

#[test]
fn leftover_pod_at_zero_is_ignored() {
    // An evicted pod of a Deployment remains after the Deployment is scaled to zero.
    let left = Some(ObstacleKind::CrashLoop);
    let at = |replicas, pods: &[_]| kind(&facts(vec![scaled(None)], vec![workload(replicas, pods)]));
    assert_eq!(at(0, &[left]), None, "or the next cold start fails at once");
    assert_eq!(at(1, &[left]), left);
    assert_eq!(at(1, &[left, None]), None);
}

#[test]
fn pause_at_zero_names_object_and_command() {
    for (pause, annotation) in [
        (Pause::Frozen, "autoscaling.keda.sh/paused-"),
        (Pause::At(0), "autoscaling.keda.sh/paused-replicas- autoscaling.keda.sh/paused-"),
        (Pause::ScaleOut, "autoscaling.keda.sh/paused-scale-out-"),
    ] {
        let (kind, message) =
            obstacle_message(&facts(vec![scaled(Some(pause))], vec![workload(0, &[])]), ProxyView::default())
                .unwrap();
        assert_eq!(kind, ObstacleKind::AutoscalingPaused);
        for words in [
            "`team-a/vllm`",
            "`anteroom session start vllm -n team-a --for 2h`",
            &format!("`kubectl annotate scaledobject vllm -n team-a {annotation}`"),
        ] {
            assert!(message.contains(words), "{words} in: {message}");
        }
    }
}

#[test]
fn pause_with_replicas_is_no_obstacle() {
    let paused = || scaled(Some(Pause::Frozen));
    assert_eq!(kind(&facts(vec![paused()], vec![workload(1, &[None])])), None, "frozen at one");
    assert_eq!(kind(&facts(vec![scaled(Some(Pause::At(2)))], vec![workload(0, &[])])), None, "two will come");
    assert_eq!(
        kind(&facts(vec![paused(), scaled(None)], vec![workload(0, &[])])),
        None,
        "the other one scales"
    );
    let unknown = facts(vec![paused()], Vec::new());
    assert_eq!(kind(&unknown), Some(ObstacleKind::AutoscalingPaused), "no workload is known, and no pod");
    assert_eq!(
        obstacle_message(&unknown, ProxyView { pods: true, ..ProxyView::default() }),
        None,
        "but a pod is there"
    );
}

#[test]
fn missing_scaled_object_is_an_obstacle() {
    let nobody = facts(Vec::new(), Vec::new());
    let (kind, message) = obstacle_message(&nobody, ProxyView::default()).unwrap();
    assert_eq!(kind, ObstacleKind::NoScaledObject);
    for words in ["`team-a/chat`", "namespace `team-a`", "external-push", "`route: chat`"] {
        assert!(message.contains(words), "{words} in: {message}");
    }
    let theirs = Facts { metadata_key: "interceptorRoute", ..nobody.clone() };
    assert!(obstacle_message(&theirs, ProxyView::default()).unwrap().1.contains("`interceptorRoute: chat`"));
    let strays = vec!["ScaledObject `team-a/vllm` names `caht`, which is not a route".to_owned()];
    let misspelt =
        obstacle_message(&Facts { orphaned_objects: strays, ..nobody.clone() }, ProxyView::default())
            .unwrap()
            .1;
    assert!(
        misspelt.ends_with("; ScaledObject `team-a/vllm` names `caht`, which is not a route"),
        "{misspelt}"
    );
    let absent = Facts { keda: KedaState::Absent, ..nobody.clone() };
    let (kind, message) = obstacle_message(&absent, ProxyView::default()).unwrap();
    assert_eq!(kind, ObstacleKind::NoScaledObject);
    assert!(message.contains("KEDA is not installed"), "{message}");
    for (facts, why) in [
        (Facts { keda: KedaState::Unknown, ..nobody.clone() }, "they have not been listed yet"),
        (
            Facts { is_cluster_route: false, ..nobody.clone() },
            "a route of the file may be scaled by anything",
        ),
        (Facts { scale_by: ScaleBy::Kubernetes, ..nobody.clone() }, "we scale it"),
        (Facts { workloads: vec![Arc::new(workload(1, &[None]))], ..nobody.clone() }, "somebody scaled it"),
    ] {
        assert_eq!(obstacle_message(&facts, ProxyView::default()), None, "{why}");
    }
}

#[test]
fn missing_keda_stream_is_an_obstacle() {
    let at_zero = |scaled| facts(vec![scaled], vec![workload(0, &[])]);
    let seconds =
        |seconds| ProxyView { no_stream_for: Some(Duration::from_secs(seconds)), ..ProxyView::default() };
    let unheard = at_zero(scaled(None));
    assert_eq!(obstacle_message(&unheard, seconds(9)), None);
    let (kind, message) = obstacle_message(&unheard, seconds(10)).unwrap();
    assert_eq!(kind, ObstacleKind::NoKedaStream);
    assert!(message.contains("`team-a/vllm`") && message.contains("`anteroom:9090`"), "{message}");
    let not_ready = Some(("TriggerError".into(), "no such host".into()));
    let told =
        obstacle_message(&at_zero(ScaledObjectFacts { not_ready, ..scaled(None) }), seconds(60)).unwrap().1;
    assert!(told.ends_with("KEDA says: TriggerError: no such host"), "{told}");
    let mut theirs = scaled(None);
    theirs.trigger.address = "keda-add-ons-http-external-scaler.keda:9090".into();
    let told = obstacle_message(&at_zero(theirs), seconds(60)).unwrap().1;
    assert!(told.contains("keda:9090` (the HTTP Add-on's own scaler)"), "{told}");
    let mut polled = scaled(None);
    polled.trigger.pushes = false;
    assert_eq!(obstacle_message(&at_zero(polled), seconds(60)), None, "KEDA opens no stream for `external`");
    let running = facts(vec![scaled(None)], vec![workload(1, &[None])]);
    assert_eq!(obstacle_message(&running, seconds(60)), None, "it has been scaled already");
}

#[test]
fn pushes_dropped_without_listed_metric() {
    let seconds =
        |seconds| ProxyView { dropped_for: Some(Duration::from_secs(seconds)), ..ProxyView::default() };
    let unlisted = || ScaledObjectFacts { is_listed: false, ..scaled(None) };
    let of = |scaled, replicas| facts(scaled, vec![workload(replicas, &[])]);
    assert_eq!(
        obstacle_message(&of(vec![unlisted()], 0), seconds(9)),
        None,
        "it may have been made just now"
    );
    let (kind, message) = obstacle_message(&of(vec![unlisted()], 0), seconds(10)).unwrap();
    assert_eq!(kind, ObstacleKind::PushDropped);
    for words in ["`team-a/vllm`", "externalMetricNames", "trigger 1 (`s1-...`)", "restart KEDA's operator"] {
        assert!(message.contains(words), "{words} in: {message}");
    }
    let mut polled = unlisted();
    polled.trigger.pushes = false;
    for (facts, why) in [
        (of(vec![scaled(None)], 0), "it is listed"),
        (of(vec![unlisted(), scaled(None)], 0), "another one takes the push"),
        (of(vec![polled], 0), "nothing is pushed"),
        (of(vec![unlisted()], 1), "it has been scaled already"),
    ] {
        assert_eq!(obstacle_message(&facts, seconds(60)), None, "{why}");
    }
    let paused = of(vec![ScaledObjectFacts { is_listed: false, ..scaled(Some(Pause::Frozen)) }], 0);
    assert_eq!(obstacle_message(&paused, seconds(60)).unwrap().0, ObstacleKind::AutoscalingPaused);
}

#[test]
fn has_replicas_requires_all_workloads() {
    let replicas = |workloads: &[Option<u32>], floor| {
        let workloads =
            workloads.iter().map(|replicas| WorkloadFacts { replicas: *replicas, ..workload(0, &[]) });
        facts(vec![scaled(None)], workloads.collect()).has_replicas(floor)
    };
    assert_eq!(replicas(&[], 1), None);
    assert_eq!(replicas(&[Some(1), None], 1), None);
    assert_eq!(replicas(&[Some(1), Some(0)], 1), Some(false));
    assert_eq!(replicas(&[Some(1), Some(2)], 1), Some(true));
    assert_eq!(replicas(&[Some(1)], 2), Some(false), "idle at one, and two are asked for");
}

#[test]
fn keda_scaling_error_is_an_obstacle() {
    let not_ready = |reason: &str| ScaledObjectFacts {
        not_ready: Some((reason.into(), "forbidden".into())),
        ..scaled(None)
    };
    let facts = |reason| facts(vec![not_ready(reason)], vec![workload(0, &[])]);
    let (kind, message) = obstacle_message(&facts("ErrorScalingTarget"), ProxyView::default()).unwrap();
    assert_eq!(kind, ObstacleKind::ScaleRefused);
    for part in ["`team-a/vllm`", "forbidden", "for this route it asks `"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(
        obstacle_message(&facts("TriggerError"), ProxyView::default()),
        None,
        "another trigger may be the broken one"
    );
}

#[test]
fn pods_are_an_obstacle_if_all_have_trouble() {
    use ObstacleKind::{CrashLoop, ImagePull, OutOfMemory, Unschedulable};
    let pods = |pods: &[Option<ObstacleKind>]| kind(&facts(vec![scaled(None)], vec![workload(2, pods)]));
    assert_eq!(pods(&[Some(Unschedulable)]), Some(Unschedulable));
    assert_eq!(pods(&[Some(Unschedulable), Some(ImagePull)]), Some(ImagePull));
    assert_eq!(pods(&[Some(CrashLoop), Some(OutOfMemory)]), Some(OutOfMemory));
    assert_eq!(pods(&[Some(CrashLoop), None]), None, "the other one may come");
    assert_eq!(pods(&[]), None, "they are not there yet");
    let frozen = facts(vec![scaled(Some(Pause::Frozen))], vec![workload(1, &[Some(ImagePull)])]);
    assert_eq!(kind(&frozen), Some(ImagePull), "the pause does not hold it up");
}

#[test]
fn uncreatable_pods_and_missing_workloads_report() {
    let mut refused = workload(1, &[]);
    refused.failure = Some("pods \"vllm-x\" is forbidden: exceeded quota: gpus".into());
    let (kind, message) =
        obstacle_message(&facts(vec![scaled(None)], vec![refused.clone()]), ProxyView::default()).unwrap();
    assert_eq!(kind, ObstacleKind::Quota);
    assert!(message.contains("Deployment `team-a/vllm`") && message.contains("exceeded quota"), "{message}");
    refused.pods = workload(1, &[None]).pods;
    assert_eq!(
        obstacle_message(&facts(vec![scaled(None)], vec![refused]), ProxyView::default()),
        None,
        "one was created"
    );
    let missing = WorkloadFacts { replicas: None, is_missing: true, ..workload(0, &[]) };
    let (kind, message) =
        obstacle_message(&facts(vec![scaled(None)], vec![missing]), ProxyView::default()).unwrap();
    assert_eq!(kind, ObstacleKind::ScaleRefused);
    assert!(message.contains("The workload Deployment `team-a/vllm` does not exist"), "{message}");
}

#[test]
fn direct_scaling_reports_refusal() {
    let mut direct = facts(Vec::new(), vec![workload(0, &[])]);
    direct.scale_by = ScaleBy::Kubernetes;
    assert_eq!(kind(&direct), None);
    direct.direct_scaling_failure = Some("no right".into());
    assert_eq!(
        obstacle_message(&direct, ProxyView::default()),
        Some((ObstacleKind::ScaleRefused, "no right".into()))
    );
}

fn selection(pods: usize, is_probed: bool) -> Option<Arc<Selection>> {
    let ports = "the Service `team-a/vllm` leads port 80 to 8000, and its containers expose 8001 (web)";
    Some(Arc::new(Selection {
        name: "Service `team-a/vllm`".into(),
        selector: Some("app=chat".into()),
        pods,
        ports: ports.into(),
        is_probed,
    }))
}

#[test]
fn service_selecting_no_pod_is_reported() {
    let of = |replicas, pods: &[_], selected| Facts {
        target: TargetFacts { selection: selection(selected, true), ..TargetFacts::default() },
        ..facts(vec![scaled(None)], vec![workload(replicas, pods)])
    };
    let (kind_of, message) = obstacle_message(&of(1, &[None], 0), ProxyView::default()).unwrap();
    assert_eq!(kind_of, ObstacleKind::NoPodsSelected);
    for words in [
        "The Service `team-a/vllm` selects none",
        "Deployment `team-a/vllm`",
        "labels app=chat",
        "`vllm-0` has app=vllm",
    ] {
        assert!(message.contains(words), "{words} in: {message}");
    }
    let crash = Some(ObstacleKind::CrashLoop);
    assert_eq!(kind(&of(1, &[crash], 0)), crash, "that comes first");
    for (facts, why) in [
        (of(1, &[None], 1), "it selects one"),
        (of(1, &[], 0), "there is none yet"),
        (of(0, &[None], 0), "none is asked for"),
    ] {
        assert_eq!(kind(&facts), None, "{why}");
    }
}

#[test]
fn refused_port_of_ready_pod_is_reported() {
    let of = |is_probed, ready: &str| Facts {
        target: TargetFacts {
            selection: selection(1, is_probed),
            ready: vec![ready.into()],
            ..TargetFacts::default()
        },
        ..facts(vec![scaled(None)], vec![workload(1, &[None])])
    };
    let seen = || ProxyView { refusing: vec!["10.0.0.1:8000".into()], ..ProxyView::default() };
    let (kind_of, message) = obstacle_message(&of(true, "10.0.0.1:8000"), seen()).unwrap();
    assert_eq!(kind_of, ObstacleKind::PortRefused);
    for words in ["10.0.0.1:8000", "leads port 80 to 8000", "expose 8001 (web)"] {
        assert!(message.contains(words), "{words} in: {message}");
    }
    assert_eq!(
        obstacle_message(&of(false, "10.0.0.1:8000"), seen()),
        None,
        "without a probe it may still load"
    );
    assert_eq!(
        obstacle_message(&of(true, "10.0.0.2:8000"), seen()),
        None,
        "the cluster does not call that one ready"
    );
    assert_eq!(kind(&of(true, "10.0.0.1:8000")), None);
}

#[test]
fn missing_service_is_reported_at_zero() {
    let problem = Some(KubeProblem::new(ObstacleKind::NoService, "it does not exist"));
    let target = TargetFacts { problem, ..TargetFacts::default() };
    let facts = |pause, replicas, pods: &[_]| Facts {
        target: target.clone(),
        ..facts(vec![scaled(pause)], vec![workload(replicas, pods)])
    };
    assert_eq!(kind(&facts(None, 0, &[])), Some(ObstacleKind::NoService));
    assert_eq!(kind(&facts(None, 1, &[Some(ObstacleKind::Unschedulable)])), Some(ObstacleKind::NoService));
    assert_eq!(kind(&facts(Some(Pause::Frozen), 0, &[])), Some(ObstacleKind::AutoscalingPaused));
}

#[tokio::test(start_paused = true)]
async fn kubelet_warning_counts_once_due() {
    let warning = |kind, after| PodWarning {
        kind,
        message: format!("node: {}", kind.name()).into(),
        from: Instant::now() + Duration::from_secs(after),
    };
    let of = |pods: &[_], warnings| Facts {
        target: TargetFacts { warnings, ..TargetFacts::default() },
        ..facts(vec![scaled(None)], vec![workload(2, pods)])
    };
    let volume = || ("vllm-0".into(), warning(ObstacleKind::Volume, 0));
    assert_eq!(kind(&of(&[None], vec![volume()])), Some(ObstacleKind::Volume));
    assert_eq!(kind(&of(&[None, None], vec![volume()])), None, "the other one may come");
    assert_eq!(
        kind(&of(&[None, Some(ObstacleKind::Unschedulable)], vec![volume()])),
        Some(ObstacleKind::Volume)
    );
    assert_eq!(kind(&of(&[Some(ObstacleKind::CrashLoop)], vec![volume()])), Some(ObstacleKind::CrashLoop));
    let loading = of(&[None], vec![("vllm-0".into(), warning(ObstacleKind::NotReady, 120))]);
    assert_eq!(kind(&loading), None);
    tokio::time::advance(Duration::from_secs(120)).await;
    assert_eq!(kind(&loading), Some(ObstacleKind::NotReady));
}

#[test]
fn api_server_outage_outranks_stale_obstacles() {
    let crash = facts(vec![scaled(None)], vec![workload(1, &[Some(ObstacleKind::CrashLoop)])]);
    let seen =
        ProxyView { api_server: Some("The watch of pods is interrupted".into()), ..ProxyView::default() };
    assert_eq!(
        obstacle_message(&crash, seen).map(|(kind, _)| kind),
        Some(ObstacleKind::ApiServerUnreachable)
    );
}
