//! A pod on its node, from the binding to the end.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod};
use kube::{
    ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    Agent,
    container::{self, Task},
    history::NodeEventKind,
    status::PodConditions,
    volumes::Files,
};

/// Delay before a status that the apiserver did not accept is sent again.
const STATUS_RETRY_DELAY: Duration = Duration::from_millis(200);

/// Runs a pod until it is gone from the node and from the apiserver.
pub(super) async fn run(agent: Arc<Agent>, pods: watch::Receiver<Option<Pod>>) {
    let Some(pod) = pods.borrow().clone() else { return };
    agent.note(&pod, NodeEventKind::Bound);
    let address = match &agent.wire {
        Some(wire) => wire.next(),
        None => agent.ground.addresses.next(&pod.namespace().unwrap_or_default()),
    };
    let containers = pod.spec.as_ref().map(|spec| spec.containers.clone()).unwrap_or_default();
    let mut worker = Worker {
        status: PodConditions::new(agent.clock),
        statuses: containers.iter().map(container::waiting).collect(),
        ready: false,
        deadline: watch::channel(None).0,
        agent,
        pod,
        pods,
        address,
    };
    worker.run(&containers).await;
}

struct Worker {
    agent: Arc<Agent>,
    /// The pod as first received.
    pod: Pod,
    /// Current state of the pod; `None` once it is deleted.
    pods: watch::Receiver<Option<Pod>>,
    address: Ipv4Addr,
    status: PodConditions,
    statuses: Vec<ContainerStatus>,
    ready: bool,
    /// Deadline for the exit of the containers; `None` while they may run.
    deadline: watch::Sender<Option<Instant>>,
}

// === impl Worker ===

impl Worker {
    async fn run(&mut self, containers: &[Container]) {
        let (sender, mut reports) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        for (index, container) in containers.iter().enumerate() {
            let task = Task {
                agent: self.agent.clone(),
                index,
                container: container.clone(),
                address: self.address,
                pods: self.pods.clone(),
                end: self.deadline.subscribe(),
                reports: sender.clone(),
                status: self.statuses[index].clone(),
                pod: self.pod.clone(),
                files: Files::default(),
            };
            tasks.spawn(task.run());
        }
        drop(sender);
        // The pod may have been deleted before the node received it.
        self.apply_deletion();
        let mut said = self.report_status(false).await;
        loop {
            tokio::select! {
                report = reports.recv() => {
                    let Some((index, status)) = report else { break };
                    self.statuses[index] = status;
                    while let Ok((index, status)) = reports.try_recv() {
                        self.statuses[index] = status;
                    }
                    said = self.report_status(false).await;
                }
                Ok(()) = self.pods.changed() => {
                    self.apply_deletion();
                    said &= !self.is_contradicted();
                }
                () = sleep(STATUS_RETRY_DELAY), if !said => said = self.report_status(false).await,
            }
        }
        while !self.report_status(true).await {
            sleep(STATUS_RETRY_DELAY).await;
        }
        self.delete().await;
        self.agent.logs.forget(&self.pod.namespace().unwrap_or_default(), &self.pod.name_any());
        self.agent.note(&self.pod, NodeEventKind::Gone);
    }

    /// Sets the deadline if the pod is being deleted.
    fn apply_deletion(&mut self) {
        let pod = self.pods.borrow_and_update();
        let grace = match pod.as_ref() {
            None => Duration::ZERO,
            Some(pod) if pod.metadata.deletion_timestamp.is_some() => {
                let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or_default();
                Duration::from_secs(grace.unsigned_abs())
            }
            Some(_) => return,
        };
        let end = Instant::now() + grace;
        self.deadline.send_if_modified(|deadline| {
            if deadline.is_none() {
                self.agent.note(&self.pod, NodeEventKind::Terminating);
            }
            // A second deletion can shorten the grace period; an update of the pod must not prolong it.
            let earlier = deadline.is_none_or(|deadline| end < deadline);
            if earlier {
                *deadline = Some(end);
            }
            earlier
        });
    }

    /// Returns true if the object reports a ready pod as not ready: the node controller does so after missed
    /// heartbeats. The kubelet then reports the status again.
    fn is_contradicted(&self) -> bool {
        let pod = self.pods.borrow();
        let status = pod.as_ref().and_then(|pod| pod.status.as_ref());
        let mut conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
        self.ready && conditions.any(|condition| condition.type_ == "Ready" && condition.status == "False")
    }

    /// Reports the pod's status to the apiserver. Returns false if the report must be repeated.
    async fn report_status(&mut self, ended: bool) -> bool {
        let ready = !ended && self.statuses.iter().all(|status| status.ready);
        if ready != self.ready {
            self.ready = ready;
            self.agent.note(&self.pod, if ready { NodeEventKind::Ready } else { NodeEventKind::Unready });
        }
        let address = (self.agent.address, self.address);
        let patch = self.status.patch(&self.pod, address, &self.statuses, ended);
        let pods = self.agent.kube.namespaced::<Pod>(&self.pod.namespace().unwrap_or_default());
        let patched =
            pods.patch_status(&self.pod.name_any(), &PatchParams::default(), &Patch::Strategic(patch)).await;
        match patched {
            Ok(_) => true,
            // Rejected: the pod is deleted, or replaced by another of the same name.
            Err(kube::Error::Api(status)) => (400..500).contains(&status.code),
            Err(_) => false,
        }
    }

    /// Deletes the object once its deletion is requested.
    async fn delete(&mut self) {
        let asked =
            |pod: &Option<Pod>| pod.as_ref().is_none_or(|pod| pod.metadata.deletion_timestamp.is_some());
        if self.pods.wait_for(asked).await.is_err() {
            return;
        }
        let pods = self.agent.kube.namespaced::<Pod>(&self.pod.namespace().unwrap_or_default());
        let preconditions = Preconditions { uid: self.pod.uid(), resource_version: None };
        let now = DeleteParams::default().grace_period(0).preconditions(preconditions);
        while self.pods.borrow_and_update().is_some() {
            match pods.delete(&self.pod.name_any(), &now).await {
                Ok(_) | Err(kube::Error::Api(_)) => return,
                Err(_) => sleep(STATUS_RETRY_DELAY).await,
            }
        }
    }
}
