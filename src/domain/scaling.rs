//! The metrics reported to a scaler, the controller that scales, and the obstacles to a start.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strum::{IntoStaticStr, VariantArray};

use super::Period;

/// Metrics reported to the scaler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Scaling {
    /// Queue depth per replica: KEDA requests the value divided by this. The default follows the usual recommendation
    /// of inference-gateway vendors.
    #[schemars(range(min = 1))]
    pub target: u32,
    /// Replicas requested until the first endpoint is ready. A backlog at zero says little about the replicas needed
    /// later, and each one is a GPU.
    #[schemars(range(min = 1))]
    pub activation_replicas: u32,
    /// Time that demand stays true after the last request, so that polling cannot miss it. Use at least twice the
    /// `pollingInterval` of the ScaledObject.
    pub linger: Period,
    /// Scrape `vllm:num_requests_waiting` from ready pods and add it to the queue depth. Scaling beyond one replica
    /// then needs no Prometheus. A pod whose `vllm:num_requests_running` reaches what it was sent gets more requests,
    /// even if none has been answered.
    pub server_queue: bool,
    /// Second metric: requests per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_rate: Option<RequestRate>,
    /// With `scaleBy: kubernetes`: time after the last request until the workload is scaled to zero.
    pub idle_timeout: Period,
    /// Requests counted by the queue-depth metric.
    #[serde(skip)]
    pub counting: Counting,
}

/// Metric of requests per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RequestRate {
    /// Requests per second per replica.
    #[schemars(range(min = 1))]
    pub target: u32,
    /// Time window of the average.
    #[serde(default = "RequestRate::default_window")]
    pub window: Period,
}

/// Requests counted by the queue-depth metric.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Counting {
    /// Held requests, plus those in flight in proportion to `concurrency.max`.
    #[default]
    Queue,
    /// All held and in-flight requests: the HTTP Add-on's concurrency metric.
    Concurrency,
}

/// Controller that changes the number of replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ScaleBy {
    /// KEDA, through a ScaledObject that names the route.
    #[default]
    Keda,
    /// The proxy itself: from zero to one on demand, and back when idle. Only for routes of the cluster.
    Kubernetes,
}

/// An object with a scale subresource, in the namespace of its route.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workload {
    /// API group and version, such as `apps/v1`.
    #[serde(default = "Workload::default_api_version")]
    pub api_version: String,
    /// Kind, such as `Deployment`.
    #[serde(default = "Workload::default_kind")]
    pub kind: String,
    /// Name of the object.
    pub name: String,
}

/// Handling of requests while the target is at zero and its ScaledObject is paused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum WhenPaused {
    /// Reject with `autoscaling_paused`; the message has the command that resumes autoscaling.
    #[default]
    Reject,
    /// Hold requests until autoscaling is resumed or they time out.
    Hold,
}

/// Kind of an obstacle to the start of a target. If several apply, the first in this order is reported: it explains
/// most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[derive(IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum ObstacleKind {
    /// The ScaledObject is paused.
    AutoscalingPaused,
    /// The Kubernetes API server is unreachable; everything below may be stale.
    ApiServerUnreachable,
    /// No ScaledObject names the route.
    NoScaledObject,
    /// The workload cannot be scaled: no permission, another scaler owns it, or it does not exist.
    ScaleRefused,
    /// The Service or InferencePool does not exist or lacks the route's port.
    NoService,
    /// The container was OOM-killed.
    OutOfMemory,
    /// The container exits repeatedly.
    CrashLoop,
    /// A volume of the pod cannot be mounted.
    Volume,
    /// The image cannot be pulled.
    ImagePull,
    /// A quota or an admission policy rejects the pod.
    Quota,
    /// No node accepts the pod.
    Unschedulable,
    /// The Service selects none of the workload's pods.
    NoPodsSelected,
    /// The pod is ready, but nothing listens on the Service's target port.
    PortRefused,
    /// The pod runs but is not ready.
    NotReady,
    /// KEDA has no open stream to the scaler.
    NoKedaStream,
    /// KEDA drops pushes because the ScaledObject's status does not list the metric.
    PushDropped,
    /// The host name of the target or its gateway does not resolve.
    NameUnresolved,
    /// The server rejects the probe: wrong path or missing credentials.
    ProbeRejected,
    /// The probe gets no answer or "not ready"; usually the model is loading.
    NotAnswering,
}

/// Time that an obstacle to the start may last before held requests fail. Until then it may pass: images are pushed
/// late, nodes are added, quotas are raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FailureGrace {
    /// The image cannot be pulled.
    pub image_pull: Period,
    /// The container exits repeatedly.
    pub crash_loop: Period,
    /// No node accepts the pod; adding one takes minutes.
    pub unschedulable: Period,
    /// A quota or an admission policy rejects the pod, or the workload cannot be scaled.
    pub quota: Period,
    /// The container was OOM-killed.
    pub out_of_memory: Period,
    /// A volume of the pod cannot be mounted.
    pub volume: Period,
    /// The Service does not exist, lacks the port, selects none of the pods, or leads to a port on which nothing
    /// listens.
    pub service: Period,
}

impl Default for Scaling {
    fn default() -> Self {
        Self {
            target: 5,
            activation_replicas: 1,
            // Twice KEDA's default pollingInterval of 30 s.
            linger: Period::from_secs(60),
            server_queue: false,
            request_rate: None,
            idle_timeout: Period::from_secs(300),
            counting: Counting::Queue,
        }
    }
}

impl Default for FailureGrace {
    fn default() -> Self {
        Self {
            image_pull: Period::from_secs(120),
            crash_loop: Period::from_secs(60),
            // Adding a node took 284 s, its initialisation 126 s (kaito issue 2325).
            unschedulable: Period::from_secs(600),
            quota: Period::from_secs(60),
            out_of_memory: Period::from_secs(30),
            // The kubelet retries after up to 122 s; detaching a disk from a dead node takes longer.
            volume: Period::from_secs(300),
            service: Period::from_secs(60),
        }
    }
}

// === impl RequestRate ===

impl RequestRate {
    fn default_window() -> Period {
        Period::from_secs(60)
    }
}

// === impl Workload ===

impl Workload {
    /// Returns the first key with an invalid value. The keys become part of a path of the API server, where a slash or
    /// a question mark would address another object, possibly in another namespace.
    pub fn invalid_key(&self) -> Option<&'static str> {
        let is_name = |text: &str| {
            let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
            text.bytes().all(fits) && text.bytes().any(|byte| byte.is_ascii_alphanumeric())
        };
        let is_kind = !self.kind.is_empty() && self.kind.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let is_version = match self.api_version.split_once('/') {
            Some((group, version)) => is_name(group) && is_name(version),
            None => is_name(&self.api_version),
        };
        [("name", is_name(&self.name)), ("kind", is_kind), ("apiVersion", is_version)]
            .into_iter()
            .find_map(|(key, fits)| (!fits).then_some(key))
    }

    fn default_api_version() -> String {
        "apps/v1".into()
    }

    fn default_kind() -> String {
        "Deployment".into()
    }
}

// === impl ObstacleKind ===

impl ObstacleKind {
    /// All kinds, in order.
    pub const ALL: [Self; Self::VARIANTS.len()] = *Self::VARIANTS.first_chunk().unwrap();

    /// Returns whether the proxy's own probes detect this obstacle, rather than the cluster.
    pub const fn is_detected_by_probes(self) -> bool {
        matches!(self, Self::NameUnresolved | Self::ProbeRejected | Self::NotAnswering)
    }

    /// Returns whether this obstacle keeps the target from coming up. A server that does not answer may just need
    /// more time.
    pub const fn prevents_start(self) -> bool {
        !matches!(self, Self::NotAnswering)
    }

    /// Returns the name used in metrics, records, logs and conditions.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

// === impl FailureGrace ===

impl FailureGrace {
    /// Returns the grace period of a kind; `None` lasts until the deadline of each request.
    pub const fn of(&self, kind: ObstacleKind) -> Option<Period> {
        match kind {
            ObstacleKind::ImagePull => Some(self.image_pull),
            ObstacleKind::CrashLoop => Some(self.crash_loop),
            ObstacleKind::Unschedulable => Some(self.unschedulable),
            // The cluster rejects both.
            ObstacleKind::Quota | ObstacleKind::ScaleRefused => Some(self.quota),
            ObstacleKind::OutOfMemory => Some(self.out_of_memory),
            ObstacleKind::Volume => Some(self.volume),
            ObstacleKind::NoService | ObstacleKind::NoPodsSelected | ObstacleKind::PortRefused => {
                Some(self.service)
            }
            // Only `readiness.activationTimeout` bounds the loading of a model.
            ObstacleKind::NotReady
            | ObstacleKind::AutoscalingPaused
            | ObstacleKind::NoScaledObject
            | ObstacleKind::NoKedaStream
            | ObstacleKind::PushDropped
            | ObstacleKind::ApiServerUnreachable
            // The Service may be created later.
            | ObstacleKind::NameUnresolved
            | ObstacleKind::ProbeRejected
            | ObstacleKind::NotAnswering => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workload_with_path_characters_is_misnamed() {
        let workload = |api_version: &str, kind: &str, name: &str| Workload {
            api_version: api_version.into(),
            kind: kind.into(),
            name: name.into(),
        };
        for fine in [
            workload("apps/v1", "Deployment", "vllm"),
            workload("v1", "ReplicationController", "a.b-1"),
            workload("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "0"),
        ] {
            assert_eq!(fine.invalid_key(), None, "{fine:?}");
        }
        for (key, wrong) in [
            // Would GET and PATCH the scale of a workload in another namespace.
            (
                "apiVersion",
                workload("apps/v1/namespaces/other/deployments/vllm/scale?x=", "Deployment", "vllm"),
            ),
            ("apiVersion", workload("apps/v1/namespaces/other", "Deployment", "vllm")),
            ("apiVersion", workload("apps/..", "Deployment", "vllm")),
            ("apiVersion", workload("", "Deployment", "vllm")),
            ("kind", workload("apps/v1", "Deployment/../x", "vllm")),
            ("kind", workload("apps/v1", "", "vllm")),
            ("name", workload("apps/v1", "Deployment", "vllm?x=")),
            ("name", workload("apps/v1", "Deployment", "..")),
            ("name", workload("apps/v1", "Deployment", "a/b")),
            ("name", workload("apps/v1", "Deployment", "")),
        ] {
            assert_eq!(wrong.invalid_key(), Some(key), "{wrong:?}");
        }
    }
}
