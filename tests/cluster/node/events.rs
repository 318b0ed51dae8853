//! The events that a node writes beside the statuses of its pods: as kubelet does, one after the other, and for nobody
//! who would wait for them.

use std::{sync::Arc, time::SystemTime};

use k8s_openapi::api::core::v1::{Event, Pod};
use kube::{ResourceExt as _, api::PostParams};
use serde_json::json;
use tokio::sync::mpsc;

use super::{Agent, container::Task, status};

// === impl Agent ===

impl Agent {
    /// Of a pod, or of the container of that name in it; `at` is when that was, not by the node's clock.
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
        // Nobody writes it any more when the node has gone.
        let _ = self.events.send(serde_json::from_value(event).unwrap());
    }

    pub(super) fn pod_event(&self, pod: &Pod, kind: &str, reason: &str, message: &str) {
        self.event(pod, "", SystemTime::now(), kind, reason, message);
    }

    /// Writes them in the order in which they came.
    pub(super) async fn write_events(self: Arc<Self>, mut events: mpsc::UnboundedReceiver<Event>) {
        while let Some(event) = events.recv().await {
            let namespace = event.metadata.namespace.clone().unwrap_or_default();
            // Nothing depends on it.
            let _ = self.kube.namespaced::<Event>(&namespace).create(&PostParams::default(), &event).await;
        }
    }
}

// === impl Task ===

impl Task {
    /// Of the container, now.
    pub(super) fn event(&self, kind: &str, reason: &str, message: &str) {
        self.event_at(SystemTime::now(), kind, reason, message);
    }

    /// Of the container, and of a moment that has been noted.
    pub(super) fn event_at(&self, at: SystemTime, kind: &str, reason: &str, message: &str) {
        self.agent.event(&self.pod, &self.container.name, at, kind, reason, message);
    }
}
