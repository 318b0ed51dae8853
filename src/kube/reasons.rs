//! Derives at most one obstacle per route from its ScaledObjects, workloads and pods.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    pod_reasons::KubeProblem,
    scaled_objects::{ExternalTrigger, Pause, ScaledObject},
};
use crate::{
    domain::{ObstacleKind, RouteKey, ScaleBy, Workload},
    state::{self, Discovered, PodWarning, Selection},
};

/// Facts by route.
pub type AllFacts = HashMap<RouteKey, Facts>;

/// Known state of the scaler and the workloads of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The configured scaler.
    pub scale_by: ScaleBy,
    /// True if the route is a cluster object with pods as target. Routes of the configuration file and routes to a
    /// `url` may have a scaler that this proxy cannot observe.
    pub is_cluster_route: bool,
    /// Metadata key by which a KEDA trigger names the route: `route` or `interceptorRoute`.
    pub metadata_key: &'static str,
    /// State of KEDA.
    pub keda: KedaState,
    /// ScaledObjects that name the route.
    pub scaled_objects: Vec<ScaledObjectFacts>,
    /// Descriptions of ScaledObjects of the namespace that name no existing route; filled only if none names this one.
    /// Likely misspellings.
    pub orphaned_objects: Vec<String>,
    /// Workloads named by the route, or else by its ScaledObjects.
    pub workloads: Vec<Arc<WorkloadFacts>>,
    /// Reason for the last failure of direct scaling.
    pub direct_scaling_failure: Option<Arc<str>>,
    /// State of the target.
    pub target: TargetFacts,
}

/// State of KEDA in the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KedaState {
    /// Not known yet; the absence of ScaledObjects is inconclusive.
    #[default]
    Unknown,
    /// Not installed.
    Absent,
    /// Installed, and all ScaledObjects are known.
    Known,
}

/// Known state of a ScaledObject that names a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScaledObjectFacts {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Pause state.
    pub pause: Option<Pause>,
    /// Annotations that pause it.
    pub pause_annotations: Vec<&'static str>,
    /// Reason and message of the condition `Ready`, if false.
    pub not_ready: Option<(String, String)>,
    /// The trigger that names the route.
    pub trigger: ExternalTrigger,
    /// True if its status lists a metric of the trigger.
    pub is_listed: bool,
    /// Replicas requested by a push.
    pub pushed_replicas: u32,
}

/// Known state of a workload and its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkloadFacts {
    /// Kind, such as `Deployment`.
    pub kind: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Desired replicas, if known.
    pub replicas: Option<u32>,
    /// Last observed scale-up from zero, while replicas are above zero.
    pub raised: Option<state::Observation>,
    /// True if the object does not exist.
    pub is_missing: bool,
    /// Reason why pods cannot be created, such as a quota.
    pub failure: Option<String>,
    /// Pods relevant to the current start.
    pub pods: Vec<PodFacts>,
}

/// Known state of a pod relevant to the current start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// Name.
    pub name: String,
    /// Labels, formatted as a selector.
    pub labels: String,
    /// Problem of the pod; `None` if it may still become ready.
    pub trouble: Option<KubeProblem>,
}

/// Known state of the Service or pool of a target, and of its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TargetFacts {
    /// Reason why the target cannot have pods.
    pub problem: Option<KubeProblem>,
    /// Selection of its pods.
    pub selection: Option<Arc<Selection>>,
    /// A few addresses that the cluster reports as ready.
    pub ready: Vec<Arc<str>>,
    /// Kubelet warnings by pod name.
    pub warnings: Vec<(Box<str>, PodWarning)>,
}

/// Observations of this proxy about a route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyView {
    /// True if the route has endpoints, ready or not.
    pub pods: bool,
    /// Time for which no replica of the proxy has had a stream from KEDA; `None` if one has, or if unknown.
    pub no_stream_for: Option<Duration>,
    /// Time for which [`Facts::drops_pushes`] has held.
    pub dropped_for: Option<Duration>,
    /// Failure of the connection to the API server.
    pub api_server: Option<String>,
    /// Addresses that have refused connections for some time.
    pub refusing: Vec<Box<str>>,
}

/// Grace period before a missing stream is reported. KEDA opens one within a second after a ScaledObject or the proxy
/// appears, and backs off up to a minute after errors. Also applies to the metric names in the status of a
/// ScaledObject, which precede the stream.
const STREAM_GRACE: Duration = Duration::from_secs(10);

/// Reasons of the condition `Ready` that prevent KEDA from scaling, regardless of the metrics of its triggers.
const CANNOT_SCALE: [&str; 3] =
    ["ScaledObjectCheckFailed", "ErrorGettingCurrentReplicas", "ErrorScalingTarget"];

// === impl ScaledObjectFacts ===

impl ScaledObjectFacts {
    /// Extracts the facts of a ScaledObject that names a route with `trigger`.
    pub fn new(object: &ScaledObject, trigger: ExternalTrigger) -> Self {
        Self {
            namespace: object.namespace().to_owned(),
            name: object.name().to_owned(),
            pause: object.pause(),
            pause_annotations: object.active_pause_annotations(),
            not_ready: object.not_ready().map(|(reason, message)| (reason.to_owned(), message.to_owned())),
            is_listed: object.lists_metric_of(&trigger),
            pushed_replicas: object.push_replicas(),
            trigger,
        }
    }

    const fn is_pushed(&self) -> bool {
        self.pause.is_none() && self.trigger.pushes
    }

    /// Returns the command that resumes scaling temporarily.
    fn resume_command(&self) -> String {
        format!("anteroom session start {} -n {} --for 2h", self.name, self.namespace)
    }
}

// === impl WorkloadFacts ===

impl WorkloadFacts {
    /// Creates facts with the identity only.
    pub fn unknown(namespace: &str, workload: &Workload) -> Self {
        Self {
            kind: workload.kind.clone(),
            namespace: namespace.to_owned(),
            name: workload.name.clone(),
            ..Self::default()
        }
    }

    fn full_name(&self) -> String {
        format!("{} `{}/{}`", self.kind, self.namespace, self.name)
    }
}

// === impl Facts ===

impl Facts {
    /// Returns the obstacle to the first endpoint of `route`. If several apply, returns the one that explains most.
    pub fn obstacle(&self, route: &RouteKey, view: &ProxyView) -> Option<KubeProblem> {
        let scaling_obstacle = if self.is_at_zero(view) { self.scaling_obstacle(route, view) } else { None };
        let api_server = view.api_server.clone();
        let api_server =
            api_server.map(|message| KubeProblem::new(ObstacleKind::ApiServerUnreachable, message));
        let all = scaling_obstacle
            .into_iter()
            .chain(api_server)
            .chain(self.pods_obstacle())
            .chain(self.target_obstacle(view));
        all.min_by_key(|trouble| trouble.kind)
    }

    /// Returns the earliest last scale-up from zero among the workloads.
    pub fn raised(&self) -> Option<&state::Observation> {
        self.workloads.iter().filter_map(|workload| workload.raised.as_ref()).min_by_key(|raised| raised.at)
    }

    /// Returns whether every workload has at least `floor` desired replicas; `None` if unknown.
    pub fn has_replicas(&self, floor: u32) -> Option<bool> {
        let known: Option<Vec<u32>> = self.workloads.iter().map(|workload| workload.replicas).collect();
        known.filter(|known| !known.is_empty()).map(|known| known.iter().all(|replicas| *replicas >= floor))
    }

    /// Returns the first ScaledObject whose pushes KEDA drops; `None` if it accepts those of at least one.
    pub fn drops_pushes(&self) -> Option<&ScaledObjectFacts> {
        let pushed = || self.scaled_objects.iter().filter(|scaled| scaled.is_pushed());
        pushed().next().filter(|_| pushed().all(|scaled| !scaled.is_listed))
    }

    /// Returns whether zero replicas are desired, as far as known.
    fn is_at_zero(&self, view: &ProxyView) -> bool {
        let known: Vec<u32> = self.workloads.iter().filter_map(|workload| workload.replicas).collect();
        if known.is_empty() { !view.pods } else { known.iter().all(|replicas| *replicas == 0) }
    }

    fn scaling_obstacle(&self, route: &RouteKey, view: &ProxyView) -> Option<KubeProblem> {
        if self.scale_by == ScaleBy::Kubernetes {
            let message = self.direct_scaling_failure.as_ref()?.to_string();
            return Some(KubeProblem::new(ObstacleKind::ScaleRefused, message));
        }
        if self.scaled_objects.is_empty() {
            return self.no_scaled_object(route);
        }
        self.paused()
            .or_else(|| self.cannot_scale())
            .or_else(|| self.no_stream(view))
            .or_else(|| self.pushes_dropped(view))
    }

    /// Returns the obstacle if no ScaledObject names the route.
    fn no_scaled_object(&self, route: &RouteKey) -> Option<KubeProblem> {
        let (namespace, name) = route.namespaced().filter(|_| self.is_cluster_route)?;
        let message = match self.keda {
            KedaState::Unknown => return None,
            KedaState::Absent => format!(
                "KEDA is not installed in this cluster, so nothing scales `{route}` from zero: install it, or set \
                 `scaleBy: kubernetes` in the route"
            ),
            KedaState::Known => format!(
                "No ScaledObject names `{route}`, so nothing scales it from zero: give one in namespace \
                 `{namespace}` a trigger of type external-push with the metadata `{}: {name}`{}",
                self.metadata_key,
                self.orphaned_objects.iter().map(|stray| format!("; {stray}")).collect::<String>()
            ),
        };
        Some(KubeProblem::new(ObstacleKind::NoScaledObject, message))
    }

    /// Returns the obstacle if every ScaledObject that names the route is paused at zero.
    fn paused(&self) -> Option<KubeProblem> {
        let holds_zero = |scaled: &ScaledObjectFacts| match scaled.pause {
            Some(Pause::Frozen | Pause::At(0) | Pause::ScaleOut) => true,
            Some(Pause::At(_)) | None => false,
        };
        let scaled = self.scaled_objects.first().filter(|_| self.scaled_objects.iter().all(holds_zero))?;
        let ScaledObjectFacts { namespace, name, pause_annotations, .. } = scaled;
        let without: String = pause_annotations.iter().map(|annotation| format!(" {annotation}-")).collect();
        let message = format!(
            "ScaledObject `{namespace}/{name}` is paused at zero ({}). Resume it for some time with `{}`, or for good \
             with `kubectl annotate scaledobject {name} -n {namespace}{without}`",
            pause_annotations.join(", "),
            scaled.resume_command()
        );
        Some(KubeProblem::new(ObstacleKind::AutoscalingPaused, message))
    }

    /// Returns the obstacle if KEDA reports that it cannot scale.
    fn cannot_scale(&self) -> Option<KubeProblem> {
        let why = |scaled: &ScaledObjectFacts| {
            let (reason, message) = scaled.not_ready.as_ref()?;
            CANNOT_SCALE.contains(&&**reason).then(|| {
                let ScaledObjectFacts { namespace, name, trigger, .. } = scaled;
                format!(
                    "KEDA cannot scale with ScaledObject `{namespace}/{name}` ({reason}): {message}; for this route it \
                     asks `{}`",
                    trigger.address
                )
            })
        };
        let all: Option<Vec<_>> = self.scaled_objects.iter().map(why).collect();
        let message = all?.into_iter().next()?;
        Some(KubeProblem::new(ObstacleKind::ScaleRefused, message))
    }

    /// Returns the obstacle if KEDA has no stream to the proxy.
    fn no_stream(&self, view: &ProxyView) -> Option<KubeProblem> {
        let scaled = self.scaled_objects.iter().find(|scaled| scaled.is_pushed())?;
        view.no_stream_for.filter(|lasted| *lasted >= STREAM_GRACE)?;
        let ScaledObjectFacts { namespace, name, trigger, not_ready, .. } = scaled;
        let detail = not_ready.as_ref().map(|(reason, detail)| format!("; KEDA says: {reason}: {detail}"));
        let message = format!(
            "KEDA has no stream to this proxy, so it does not learn of requests: ScaledObject `{namespace}/{name}` \
             asks `{}`{}, which must be the scaler of this proxy, and KEDA's operator must be running{}",
            trigger.address,
            if is_add_on_scaler(&trigger.address) { " (the HTTP Add-on's own scaler)" } else { "" },
            detail.unwrap_or_default()
        );
        Some(KubeProblem::new(ObstacleKind::NoKedaStream, message))
    }

    /// Returns the obstacle if KEDA has a stream, but drops the pushes on it.
    fn pushes_dropped(&self, view: &ProxyView) -> Option<KubeProblem> {
        view.dropped_for.filter(|lasted| *lasted >= STREAM_GRACE)?;
        let ScaledObjectFacts { namespace, name, trigger, .. } = self.drops_pushes()?;
        let message = format!(
            "KEDA drops what this proxy pushes: `status.externalMetricNames` of ScaledObject `{namespace}/{name}` has no \
             metric of its trigger {index} (`s{index}-...`), so only polling starts the target. Change anything in \
             its `spec`, or restart KEDA's operator, and it will list it (kedacore/keda#8168)",
            index = trigger.index
        );
        Some(KubeProblem::new(ObstacleKind::PushDropped, message))
    }

    /// Returns the problem of a pod from its status, else from kubelet warnings that are due.
    fn pod_obstacle(&self, pod: &PodFacts) -> Option<KubeProblem> {
        let now = Instant::now();
        let warnings =
            self.target.warnings.iter().filter(|(name, warning)| **name == *pod.name && warning.from <= now);
        let mut warnings = warnings.map(|(_, it)| KubeProblem::new(it.kind, it.message.to_string()));
        pod.trouble.clone().or_else(|| warnings.next())
    }

    /// Returns a problem between the target and its pods.
    fn target_obstacle(&self, view: &ProxyView) -> Option<KubeProblem> {
        let TargetFacts { problem, selection, ready, .. } = &self.target;
        if problem.is_some() {
            return problem.clone();
        }
        let selection = selection.as_ref()?;
        let wanted = self.workloads.iter().filter(|workload| workload.replicas != Some(0));
        let mut pods = wanted.flat_map(|workload| workload.pods.iter().map(move |pod| (workload, pod)));
        if let (0, Some(selector), Some((workload, pod))) = (selection.pods, &selection.selector, pods.next())
        {
            let message = format!(
                "The {} selects none of the pods of {}: it wants the labels {selector}, and pod `{}` has {}",
                selection.name,
                workload.full_name(),
                pod.name,
                if pod.labels.is_empty() { "none" } else { &*pod.labels }
            );
            return Some(KubeProblem::new(ObstacleKind::NoPodsSelected, message));
        }
        let address = view.refusing.iter().find(|address| ready.iter().any(|ready| **ready == ***address));
        let address = address.filter(|_| selection.is_probed)?;
        let message =
            format!("Nothing listens at {address}, though the pod there is ready: {}", selection.ports);
        Some(KubeProblem::new(ObstacleKind::PortRefused, message))
    }

    /// Returns the problem of the pods, or `None` if one may still become ready.
    fn pods_obstacle(&self) -> Option<KubeProblem> {
        // At zero desired replicas, leftover pods reveal nothing about future ones.
        let wanted = || self.workloads.iter().filter(|workload| workload.replicas != Some(0));
        let pods = || wanted().flat_map(|workload| &workload.pods).map(|pod| self.pod_obstacle(pod));
        if pods().any(|trouble| trouble.is_none()) {
            return None;
        }
        let refused = wanted().filter_map(|workload| {
            let failure = workload.failure.as_ref()?;
            let message = format!("The pods of {} cannot be created: {failure}", workload.full_name());
            Some(KubeProblem::new(ObstacleKind::Quota, message))
        });
        let missing = self.workloads.iter().filter(|workload| workload.is_missing).map(|workload| {
            let message = format!("The workload {} does not exist", workload.full_name());
            KubeProblem::new(ObstacleKind::ScaleRefused, message)
        });
        pods().flatten().chain(refused).chain(missing).min_by_key(|trouble| trouble.kind)
    }
}

// === impl TargetFacts ===

impl TargetFacts {
    /// Extracts the facts from discovered endpoints.
    pub fn of(discovered: &Discovered) -> Self {
        const MAX_READY: usize = 16;
        let problem = discovered.problem.as_ref().filter(|_| discovered.is_synced);
        let ready = discovered.endpoints.iter().filter(|endpoint| endpoint.ready && !endpoint.terminating);
        let warnings = discovered.starts.iter().filter_map(|start| {
            let name = start.name.rsplit('/').next().unwrap_or_default();
            Some((name.into(), start.warning.clone()?))
        });
        Self {
            problem: problem.and_then(|problem| {
                let mut message = problem.text.to_string();
                // The text begins a sentence here.
                if let Some(first) = message.get_mut(..1) {
                    first.make_ascii_uppercase();
                }
                Some(KubeProblem::new(problem.kind?, message))
            }),
            selection: discovered.selection.clone(),
            ready: ready.map(|endpoint| endpoint.address.clone()).take(MAX_READY).collect(),
            warnings: warnings.collect(),
        }
    }
}

/// Returns whether the address is that of the HTTP Add-on's own scaler, per its chart.
fn is_add_on_scaler(address: &str) -> bool {
    ["keda-add-ons-http", "keda-http-add-on"].iter().any(|name| address.starts_with(name))
}

#[cfg(test)]
mod tests;
