//! What a scaler is told, who it is, and what may stand in its way.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Period;

/// What a scaler is told of the demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Scaling {
    /// How much of the queue-depth metric one replica is for: KEDA asks for as many replicas as the value has targets.
    /// The default is what vendors of inference gateways commonly recommend for queue depth.
    #[schemars(range(min = 1))]
    pub target: u32,
    /// How many replicas are asked for until the first endpoint is ready. A backlog says little about how many are
    /// needed once one is up, and each is a GPU.
    #[schemars(range(min = 1))]
    pub activation_replicas: u32,
    /// How long demand stays true after the last request, so that a poll cannot miss it. At least twice the
    /// `pollingInterval` of the ScaledObject.
    pub linger: Period,
    /// Whether `vllm:num_requests_waiting` is read from the ready pods and counts, too: then more than one replica needs
    /// no Prometheus.
    pub server_queue: bool,
    /// A second metric: requests per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_rate: Option<RequestRate>,
    /// With `scaleBy: kubernetes`: how long after the last request the workload goes back to zero.
    pub idle_timeout: Period,
    /// What the queue-depth metric counts.
    #[serde(skip)]
    pub counting: Counting,
}

/// A metric of requests per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RequestRate {
    /// Requests per second that one replica is for.
    #[schemars(range(min = 1))]
    pub target: u32,
    /// The span that the rate is taken over.
    #[serde(default = "RequestRate::default_window")]
    pub window: Period,
}

/// What the queue-depth metric counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Counting {
    /// Requests that wait, and of those in flight so much as they fill of `concurrency.max`.
    #[default]
    Queue,
    /// Every request that is held or in flight: what the HTTP Add-on calls concurrency.
    Concurrency,
}

/// Who changes the number of replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ScaleBy {
    /// KEDA, through a ScaledObject that names the route.
    #[default]
    Keda,
    /// This proxy: from zero to one on demand, and back when idle. Only for routes of the cluster.
    Kubernetes,
}

/// An object with a scale, in the namespace of its route.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workload {
    /// Such as `apps/v1`.
    #[serde(default = "Workload::default_api_version")]
    pub api_version: String,
    /// Such as `Deployment`.
    #[serde(default = "Workload::default_kind")]
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// What becomes of requests at zero while the ScaledObject is paused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum WhenPaused {
    /// They are refused with `autoscaling_paused` and the command that resumes it.
    #[default]
    Reject,
    /// They wait, in case that somebody resumes it.
    Hold,
}

/// What stands in the way of a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ObstacleKind {
    /// The ScaledObject is paused, so that nothing scales from zero.
    AutoscalingPaused,
    /// No ScaledObject names the route.
    NoScaledObject,
    /// KEDA has no stream to us.
    NoKedaStream,
    /// KEDA has a stream to us, and drops what we push: its ScaledObject does not list our metric.
    PushDropped,
    /// The image cannot be pulled.
    ImagePull,
    /// The container ends again and again.
    CrashLoop,
    /// No node takes the pod.
    Unschedulable,
    /// A quota or an admission policy refuses the pod.
    Quota,
    /// The container was ended for want of memory.
    OutOfMemory,
    /// The workload cannot be scaled: a right is missing, another scaler owns it, or there is no such workload.
    ScaleRefused,
    /// The Kubernetes API server is not heard, so that what is known of the cluster may be old.
    ApiServerUnreachable,
    /// The Service or InferencePool is missing, or has not the port that the route names.
    NoService,
    /// The Service selects none of the workload's pods.
    NoPodsSelected,
    /// Nothing listens where the Service leads to, though the pod is ready.
    PortRefused,
    /// A volume of the pod cannot be mounted.
    Volume,
    /// The pod runs, and its node does not find it ready.
    NotReady,
    /// The host name of the target, or of the gateway before it, does not resolve.
    NameUnresolved,
    /// The server runs and finds fault with our probe: no such path, or it asks for credentials.
    ProbeRejected,
    /// Our probe has no answer, or one that says that the server is not ready. It mostly loads.
    NotAnswering,
}

/// How long something may stand in the way of a start before the requests that wait are told. Until then it may pass:
/// images are pushed late, nodes are added, quotas are freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FailureGrace {
    /// The image cannot be pulled.
    pub image_pull: Period,
    /// The container ends again and again.
    pub crash_loop: Period,
    /// No node takes the pod. A new node takes minutes.
    pub unschedulable: Period,
    /// A quota or an admission policy refuses the pod, or the workload cannot be scaled.
    pub quota: Period,
    /// The container was ended for want of memory.
    pub out_of_memory: Period,
    /// A volume of the pod cannot be mounted.
    pub volume: Period,
    /// The Service is missing, has not the port, selects none of the pods, or leads to a port that nothing listens on.
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
            // Adding a node took 284 s and its initialisation 126 s (kaito issue 2325).
            unschedulable: Period::from_secs(600),
            quota: Period::from_secs(60),
            out_of_memory: Period::from_secs(30),
            // The node tries again after up to 122 s, and detaching a disk from a node that died takes longer.
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
    /// Which of its keys cannot be what it says: the API server is asked at a path that is made of them, where a slash or
    /// a question mark would lead to another object, of another namespace perhaps.
    pub fn misnamed(&self) -> Option<&'static str> {
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
    /// Every kind, the one that explains most first.
    pub const ALL: [Self; 19] = [
        Self::AutoscalingPaused,
        // Whatever else is known may be over.
        Self::ApiServerUnreachable,
        Self::NoScaledObject,
        Self::ScaleRefused,
        Self::NoService,
        Self::OutOfMemory,
        Self::CrashLoop,
        Self::Volume,
        Self::ImagePull,
        Self::Quota,
        Self::Unschedulable,
        Self::NoPodsSelected,
        Self::PortRefused,
        Self::NotReady,
        Self::NoKedaStream,
        Self::PushDropped,
        Self::NameUnresolved,
        Self::ProbeRejected,
        Self::NotAnswering,
    ];

    /// Whether our own probes find it, and not the cluster.
    pub const fn is_seen_by_probes(self) -> bool {
        matches!(self, Self::NameUnresolved | Self::ProbeRejected | Self::NotAnswering)
    }

    /// Whether it keeps a target from coming up by all that is known; one that does not answer may only need its time.
    pub const fn hinders(self) -> bool {
        !matches!(self, Self::NotAnswering)
    }

    /// Its name in metrics, records, logs and conditions.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AutoscalingPaused => "autoscaling_paused",
            Self::NoScaledObject => "no_scaled_object",
            Self::NoKedaStream => "no_keda_stream",
            Self::PushDropped => "push_dropped",
            Self::ImagePull => "image_pull",
            Self::CrashLoop => "crash_loop",
            Self::Unschedulable => "unschedulable",
            Self::Quota => "quota",
            Self::OutOfMemory => "out_of_memory",
            Self::ScaleRefused => "scale_refused",
            Self::ApiServerUnreachable => "api_server_unreachable",
            Self::NoService => "no_service",
            Self::NoPodsSelected => "no_pods_selected",
            Self::PortRefused => "port_refused",
            Self::Volume => "volume",
            Self::NotReady => "not_ready",
            Self::NameUnresolved => "name_unresolved",
            Self::ProbeRejected => "probe_rejected",
            Self::NotAnswering => "not_answering",
        }
    }
}

// === impl FailureGrace ===

impl FailureGrace {
    /// How long this may last; `None`: until the deadline of each request.
    pub const fn of(&self, kind: ObstacleKind) -> Option<Period> {
        match kind {
            ObstacleKind::ImagePull => Some(self.image_pull),
            ObstacleKind::CrashLoop => Some(self.crash_loop),
            ObstacleKind::Unschedulable => Some(self.unschedulable),
            // The cluster says no, too.
            ObstacleKind::Quota | ObstacleKind::ScaleRefused => Some(self.quota),
            ObstacleKind::OutOfMemory => Some(self.out_of_memory),
            ObstacleKind::Volume => Some(self.volume),
            ObstacleKind::NoService | ObstacleKind::NoPodsSelected | ObstacleKind::PortRefused => {
                Some(self.service)
            }
            // A model may load for longer than any bound but `readiness.activationTimeout`.
            ObstacleKind::NotReady
            | ObstacleKind::AutoscalingPaused
            | ObstacleKind::NoScaledObject
            | ObstacleKind::NoKedaStream
            | ObstacleKind::PushDropped
            | ObstacleKind::ApiServerUnreachable
            // A Service may be on its way.
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
    fn a_workload_whose_name_leads_elsewhere_is_none() {
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
            assert_eq!(fine.misnamed(), None, "{fine:?}");
        }
        for (key, wrong) in [
            // GET and PATCH of another namespace's scale, had it been put into the path.
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
            assert_eq!(wrong.misnamed(), Some(key), "{wrong:?}");
        }
    }
}
