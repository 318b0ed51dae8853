//! Events that a node writes in addition to the statuses of its pods: in order and without waiting, like the kubelet.

use std::{sync::Arc, time::SystemTime};

use k8s_openapi::api::core::v1::{Event, Pod};
use kube::{ResourceExt as _, api::PostParams};
use serde_json::json;
use tokio::sync::mpsc;

use super::{Agent, container::Task, status};

// === impl Agent ===

impl Agent {
    /// Queues an event of a pod, or of a container unless `container` is empty; `at` is real time, not the node's
    /// clock.
    fn event(&self, pod: &Pod, container: &str, at: SystemTime, kind: &str, reason: &str, message: &str) {
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let at = self.clock.reads(at);
        let stamp = status::time(at);
        let nanos = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let mut object = json!({
            "apiVersion": "v1", "kind": "Pod", "namespace": namespace, "name": name, "uid": pod.uid(),
        });
        if !container.is_empty() {
            object["fieldPath"] = format!("spec.containers{{{container}}}").into();
        }
        let event = json!({
            "metadata": { "name": format!("{name}.{nanos:x}"), "namespace": namespace },
            "involvedObject": object,
            "type": kind, "reason": reason, "message": message, "count": 1,
            "firstTimestamp": stamp, "lastTimestamp": stamp,
            "source": { "component": "kubelet", "host": self.name },
            "reportingComponent": "kubelet", "reportingInstance": self.name,
        });
        // Fails if the node is gone.
        let _ = self.events.send(serde_json::from_value(event).unwrap());
    }

    pub(super) fn pod_event(&self, pod: &Pod, kind: &str, reason: &str, message: &str) {
        self.event(pod, "", SystemTime::now(), kind, reason, message);
    }

    /// Writes the events in order.
    pub(super) async fn write_events(self: Arc<Self>, mut events: mpsc::UnboundedReceiver<Event>) {
        while let Some(event) = events.recv().await {
            let namespace = event.metadata.namespace.clone().unwrap_or_default();
            // Events are best effort.
            let _ = self.kube.namespaced::<Event>(&namespace).create(&PostParams::default(), &event).await;
        }
    }
}

// === impl Task ===

impl Task {
    /// Queues an event of the container with the current time.
    pub(super) fn event(&self, kind: &str, reason: &str, message: &str) {
        self.event_at(SystemTime::now(), kind, reason, message);
    }

    /// Queues an event of the container with the time of a noted moment.
    pub(super) fn event_at(&self, at: SystemTime, kind: &str, reason: &str, message: &str) {
        self.agent.event(&self.pod, &self.container.name, at, kind, reason, message);
    }
}
