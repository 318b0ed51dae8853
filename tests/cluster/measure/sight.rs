//! Observation of a cold start from outside: by a stream beside KEDA's, and by a watch of the pods.

use std::{net::Ipv4Addr, time::SystemTime};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt as _,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, watcher},
    },
};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    push_scaler::wire::{ScaledObjectRef, external_scaler_client::ExternalScalerClient},
    scenario::Scenario,
    wait,
};

/// Stream of the scaler that receives the same messages as KEDA's.
pub(super) struct Tap {
    heard: watch::Receiver<Vec<(SystemTime, bool)>>,
    _task: AbortOnDropHandle<()>,
}

/// Time when a pod was first seen, and first seen with a node.
#[derive(Clone)]
pub(super) struct PodTimes {
    pub(super) pod: String,
    pub(super) created: SystemTime,
    pub(super) scheduled: Option<SystemTime>,
}

/// Observed pods of a scenario.
pub(super) struct ObservedPods {
    births: watch::Receiver<Vec<PodTimes>>,
    _task: AbortOnDropHandle<()>,
}

// === impl Tap ===

impl Tap {
    /// Opens a stream to the replica at this address, as KEDA does for the route `route`.
    pub(super) async fn open(it: &Scenario, address: Ipv4Addr, route: &str) -> Self {
        let reference = ScaledObjectRef {
            name: route.to_owned(),
            namespace: it.namespace.clone(),
            scaler_metadata: [("route".to_owned(), route.to_owned())].into(),
        };
        let mut client = ExternalScalerClient::connect(format!("http://{address}:9090")).await.unwrap();
        let mut stream = client.stream_is_active(reference).await.unwrap().into_inner();
        let (note, heard) = watch::channel(Vec::new());
        let task = tokio::spawn(async move {
            while let Ok(Some(said)) = stream.message().await {
                let now = SystemTime::now();
                note.send_modify(|heard| heard.push((now, said.result)));
            }
        });
        Self { heard, _task: AbortOnDropHandle::new(task) }
    }

    /// Waits until the last message has this value.
    pub(super) async fn await_message(&self, active: bool) {
        let mut heard = self.heard.clone();
        heard.wait_for(|heard| heard.last().is_some_and(|&(_, last)| last == active)).await.unwrap();
    }

    /// Waits for the first `true` at or after `since`, and returns its time.
    pub(super) async fn await_push(&self, since: SystemTime) -> SystemTime {
        let mut heard = self.heard.clone();
        let first =
            |heard: &[(SystemTime, bool)]| heard.iter().find(|&&(at, active)| active && at >= since).copied();
        let heard = heard.wait_for(|heard| first(heard).is_some()).await.unwrap();
        first(&heard).unwrap().0
    }
}

// === impl ObservedPods ===

impl ObservedPods {
    pub(super) fn watch(it: &Scenario) -> Self {
        let (note, births) = watch::channel(Vec::new());
        let pods = it.api::<Pod>();
        let task = tokio::spawn(async move {
            let events = watcher(pods, watcher::Config::default()).backoff(wait::ShortBackoff::default());
            let mut pods = std::pin::pin!(events.applied_objects());
            while let Some(event) = pods.next().await {
                let Ok(pod) = event else { continue };
                let now = SystemTime::now();
                let is_bound = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
                note.send_modify(|births: &mut Vec<PodTimes>| {
                    let name = pod.name_any();
                    let known = births.iter().position(|birth| birth.pod == name);
                    let index = known.unwrap_or_else(|| {
                        births.push(PodTimes { pod: name, created: now, scheduled: None });
                        births.len() - 1
                    });
                    if is_bound {
                        births[index].scheduled.get_or_insert(now);
                    }
                });
            }
        });
        Self { births, _task: AbortOnDropHandle::new(task) }
    }

    /// Waits for a pod that was created at or after `since` and has a node.
    pub(super) async fn await_scheduled_pod(&self, since: SystemTime) -> PodTimes {
        let mut births = self.births.clone();
        let first = |births: &[PodTimes]| {
            births.iter().find(|birth| birth.created >= since && birth.scheduled.is_some()).cloned()
        };
        let births = births.wait_for(|births| first(births).is_some()).await.unwrap();
        first(&births).unwrap()
    }
}
