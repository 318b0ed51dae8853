//! Why a target does not come: from what is known of its ScaledObjects, workloads and pods to at most one obstacle.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    pod_reasons::{Trouble, rank},
    scaled_objects::{Pause, ScaledObject, Trigger},
};
use crate::{
    domain::{ObstacleKind, RouteKey, ScaleBy, Workload},
    state::{self, Discovered, PodWarning, Selection},
};

/// What is known of every route.
pub type AllFacts = HashMap<RouteKey, Facts>;

/// What is known of what scales a route and of what is scaled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Who is to scale it.
    pub scale_by: ScaleBy,
    /// Whether it is a route of the cluster to pods of it: one of the file, or one to a `url`, may be scaled by something
    /// that we know nothing of.
    pub of_cluster: bool,
    /// How a trigger of KEDA's names it: `route`, or `interceptorRoute`.
    pub metadata: &'static str,
    /// What is known of KEDA.
    pub keda: Keda,
    /// The ScaledObjects that name the route.
    pub scaled_objects: Vec<Scaled>,
    /// ScaledObjects of its namespace that name no route at all, where none names this one: one of them may mean it.
    pub strays: Vec<String>,
    /// What is scaled: what the route names, or its ScaledObjects.
    pub workloads: Vec<Arc<WorkloadFacts>>,
    /// Why the workload could not be scaled by ourselves.
    pub refused: Option<Arc<str>>,
    /// What is known of where requests are to go.
    pub target: TargetFacts,
}

/// What is known of KEDA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keda {
    /// Nothing yet, so that no ScaledObject means nothing.
    #[default]
    Unknown,
    /// It is not installed.
    Absent,
    /// All ScaledObjects are known.
    Known,
}

/// What is known of a ScaledObject that names a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scaled {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// How it is paused.
    pub pause: Option<Pause>,
    /// The annotations that do that.
    pub pausing: Vec<&'static str>,
    /// Reason and message of its condition `Ready`, where that is false.
    pub not_ready: Option<(String, String)>,
    /// Where its trigger asks, and whether it has a stream.
    pub trigger: Trigger,
    /// Whether its status lists a metric of that trigger.
    pub is_listed: bool,
    /// The replicas that a push of it asks for.
    pub floor: u32,
}

/// What is known of a workload and its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkloadFacts {
    /// Such as `Deployment`.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// How many replicas are asked for; `None`: not known.
    pub replicas: Option<u32>,
    /// When they were raised from zero, while they are above it and that was seen.
    pub raised: Option<state::Seen>,
    /// Whether there is no such object.
    pub is_missing: bool,
    /// Why its pods cannot be created, such as a quota.
    pub failure: Option<String>,
    /// Its pods that count.
    pub pods: Vec<PodFacts>,
}

/// What is known of a pod that counts for a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// Its name.
    pub name: String,
    /// Its labels, as they are written in a selector.
    pub labels: String,
    /// What is wrong with it; `None`: it may still come.
    pub trouble: Option<Trouble>,
}

/// What is known of a target: of its Service or pool, and of the pods that this selects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TargetFacts {
    /// Why it can have no pods.
    pub problem: Option<Trouble>,
    /// What selects its pods.
    pub selection: Option<Arc<Selection>>,
    /// Addresses that the cluster calls ready; a few of them.
    pub ready: Vec<Arc<str>>,
    /// What nodes say stands in the way of pods, by the names of these.
    pub warnings: Vec<(Box<str>, PodWarning)>,
}

/// What this proxy sees of a target besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Whether it knows of any pods, ready or not.
    pub pods: bool,
    /// How long KEDA has had no stream to any replica of the proxy; `None`: it has one, or that is not known.
    pub no_stream_for: Option<Duration>,
    /// How long [`Facts::drops_pushes`] has been so.
    pub dropped_for: Option<Duration>,
    /// Why the API server is not heard, while it is not.
    pub api_server: Option<String>,
    /// Where nobody has listened for some time.
    pub refusing: Vec<Box<str>>,
}

/// How long KEDA may have no stream before that is said: it opens one within a second after a ScaledObject comes or we
/// do, and backs off up to a minute after errors. The same for the list of metrics in a ScaledObject's status, which
/// comes before the stream.
const STREAM_GRACE: Duration = Duration::from_secs(10);

/// Ready's reasons that mean that KEDA cannot scale, whatever the triggers say.
const CANNOT_SCALE: [&str; 3] =
    ["ScaledObjectCheckFailed", "ErrorGettingCurrentReplicas", "ErrorScalingTarget"];

// === impl Scaled ===

impl Scaled {
    /// What is known of an object that names a route with this trigger.
    pub fn new(object: &ScaledObject, trigger: Trigger) -> Self {
        Self {
            namespace: object.namespace().to_owned(),
            name: object.name().to_owned(),
            pause: object.pause(),
            pausing: object.pausing(),
            not_ready: object.not_ready().map(|(reason, message)| (reason.to_owned(), message.to_owned())),
            is_listed: object.lists(&trigger),
            floor: object.floor(),
            trigger,
        }
    }

    /// Whether demand is pushed to it.
    const fn is_pushed(&self) -> bool {
        self.pause.is_none() && self.trigger.pushes
    }

    /// The command that has it scale for some time.
    fn resume(&self) -> String {
        format!("anteroom session start {} -n {} --for 2h", self.name, self.namespace)
    }
}

// === impl WorkloadFacts ===

impl WorkloadFacts {
    /// Nothing is known of it but what it is called.
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
    /// What stands in the way of the first endpoint of `route`; of several things that which explains most.
    pub fn obstacle(&self, route: &RouteKey, seen: &Seen) -> Option<Trouble> {
        let of_scaling = if self.is_at_zero(seen) { self.of_scaling(route, seen) } else { None };
        let unheard = seen.api_server.clone();
        let unheard = unheard.map(|message| Trouble::new(ObstacleKind::ApiServerUnreachable, message));
        let all = of_scaling.into_iter().chain(unheard).chain(self.of_pods()).chain(self.of_target(seen));
        all.min_by_key(|trouble| rank(trouble.kind))
    }

    /// When what is scaled was raised from zero last; of several workloads, which the first was.
    pub fn raised(&self) -> Option<&state::Seen> {
        self.workloads.iter().filter_map(|workload| workload.raised.as_ref()).min_by_key(|raised| raised.at)
    }

    /// Whether everything that is scaled is to have so many replicas; `None`: not known.
    pub fn has_replicas(&self, floor: u32) -> Option<bool> {
        let known: Option<Vec<u32>> = self.workloads.iter().map(|workload| workload.replicas).collect();
        known.filter(|known| !known.is_empty()).map(|known| known.iter().all(|replicas| *replicas >= floor))
    }

    /// The first ScaledObject whose pushes KEDA drops, if there is none that takes them.
    pub fn drops_pushes(&self) -> Option<&Scaled> {
        let pushed = || self.scaled_objects.iter().filter(|scaled| scaled.is_pushed());
        pushed().next().filter(|_| pushed().all(|scaled| !scaled.is_listed))
    }

    /// Whether nothing is asked for, as far as is known.
    fn is_at_zero(&self, seen: &Seen) -> bool {
        let known: Vec<u32> = self.workloads.iter().filter_map(|workload| workload.replicas).collect();
        if known.is_empty() { !seen.pods } else { known.iter().all(|replicas| *replicas == 0) }
    }

    fn of_scaling(&self, route: &RouteKey, seen: &Seen) -> Option<Trouble> {
        if self.scale_by == ScaleBy::Kubernetes {
            let message = self.refused.as_ref()?.to_string();
            return Some(Trouble::new(ObstacleKind::ScaleRefused, message));
        }
        if self.scaled_objects.is_empty() {
            return self.unnamed(route);
        }
        self.paused()
            .or_else(|| self.cannot_scale())
            .or_else(|| self.unheard(seen))
            .or_else(|| self.dropped(seen))
    }

    /// Nothing scales it.
    fn unnamed(&self, route: &RouteKey) -> Option<Trouble> {
        let (namespace, name) = route.namespaced().filter(|_| self.of_cluster)?;
        let message = match self.keda {
            Keda::Unknown => return None,
            Keda::Absent => format!(
                "KEDA is not installed in this cluster, so that nothing scales `{route}` from zero: install it, or let \
                 the route say `scaleBy: kubernetes`"
            ),
            Keda::Known => format!(
                "No ScaledObject names `{route}`, so that nothing scales it from zero: give one in namespace \
                 `{namespace}` a trigger of type external-push with the metadata `{}: {name}`{}",
                self.metadata,
                self.strays.iter().map(|stray| format!("; {stray}")).collect::<String>()
            ),
        };
        Some(Trouble::new(ObstacleKind::NoScaledObject, message))
    }

    /// Every ScaledObject that names it is paused, and not with replicas.
    fn paused(&self) -> Option<Trouble> {
        let holds_zero = |scaled: &Scaled| match scaled.pause {
            Some(Pause::Frozen | Pause::At(0) | Pause::ScaleOut) => true,
            Some(Pause::At(_)) | None => false,
        };
        let scaled = self.scaled_objects.first().filter(|_| self.scaled_objects.iter().all(holds_zero))?;
        let Scaled { namespace, name, pausing, .. } = scaled;
        let without: String = pausing.iter().map(|annotation| format!(" {annotation}-")).collect();
        let message = format!(
            "ScaledObject `{namespace}/{name}` is paused at zero ({}). Resume it for some time with `{}`, or for good \
             with `kubectl annotate scaledobject {name} -n {namespace}{without}`",
            pausing.join(", "),
            scaled.resume()
        );
        Some(Trouble::new(ObstacleKind::AutoscalingPaused, message))
    }

    /// KEDA says that it cannot scale.
    fn cannot_scale(&self) -> Option<Trouble> {
        let why = |scaled: &Scaled| {
            let (reason, message) = scaled.not_ready.as_ref()?;
            CANNOT_SCALE.contains(&&**reason).then(|| {
                let Scaled { namespace, name, trigger, .. } = scaled;
                format!(
                    "KEDA cannot scale with ScaledObject `{namespace}/{name}` ({reason}): {message}; for this route it \
                     asks `{}`",
                    trigger.address
                )
            })
        };
        let all: Option<Vec<_>> = self.scaled_objects.iter().map(why).collect();
        let message = all?.into_iter().next()?;
        Some(Trouble::new(ObstacleKind::ScaleRefused, message))
    }

    /// KEDA does not listen.
    fn unheard(&self, seen: &Seen) -> Option<Trouble> {
        let scaled = self.scaled_objects.iter().find(|scaled| scaled.is_pushed())?;
        seen.no_stream_for.filter(|lasted| *lasted >= STREAM_GRACE)?;
        let Scaled { namespace, name, trigger, not_ready, .. } = scaled;
        let told = not_ready.as_ref().map(|(reason, told)| format!("; KEDA says: {reason}: {told}"));
        let message = format!(
            "KEDA has no stream to this proxy, so that it does not hear of requests: ScaledObject `{namespace}/{name}` \
             asks `{}`{}, which must lead to the scaler of this proxy, and KEDA's operator must run{}",
            trigger.address,
            if is_of_add_on(&trigger.address) { " (the HTTP Add-on's own scaler)" } else { "" },
            told.unwrap_or_default()
        );
        Some(Trouble::new(ObstacleKind::NoKedaStream, message))
    }

    /// KEDA has a stream, and drops what comes on it.
    fn dropped(&self, seen: &Seen) -> Option<Trouble> {
        seen.dropped_for.filter(|lasted| *lasted >= STREAM_GRACE)?;
        let Scaled { namespace, name, trigger, .. } = self.drops_pushes()?;
        let message = format!(
            "KEDA drops what this proxy pushes: `status.externalMetricNames` of ScaledObject `{namespace}/{name}` has no \
             metric of its trigger {index} (`s{index}-...`), so that only its polls start the target. Change anything in \
             its `spec`, or restart KEDA's operator, and it will list it (kedacore/keda#8168)",
            index = trigger.index
        );
        Some(Trouble::new(ObstacleKind::PushDropped, message))
    }

    /// What is wrong with a pod, by its status or by the word of its node.
    fn of_pod(&self, pod: &PodFacts) -> Option<Trouble> {
        let now = Instant::now();
        let warnings =
            self.target.warnings.iter().filter(|(name, warning)| **name == *pod.name && warning.from <= now);
        let mut warnings = warnings.map(|(_, it)| Trouble::new(it.kind, it.message.to_string()));
        pod.trouble.clone().or_else(|| warnings.next())
    }

    /// What is wrong with the way from the route to the pods.
    fn of_target(&self, seen: &Seen) -> Option<Trouble> {
        let TargetFacts { problem, selection, ready, .. } = &self.target;
        if problem.is_some() {
            return problem.clone();
        }
        let selection = selection.as_ref()?;
        let asked = self.workloads.iter().filter(|workload| workload.replicas != Some(0));
        let mut pods = asked.flat_map(|workload| workload.pods.iter().map(move |pod| (workload, pod)));
        if let (0, Some(selector), Some((workload, pod))) = (selection.pods, &selection.selector, pods.next())
        {
            let message = format!(
                "The {} selects none of the pods of {}: it wants the labels {selector}, and pod `{}` has {}",
                selection.name,
                workload.full_name(),
                pod.name,
                if pod.labels.is_empty() { "none" } else { &*pod.labels }
            );
            return Some(Trouble::new(ObstacleKind::NoPodsSelected, message));
        }
        let address = seen.refusing.iter().find(|address| ready.iter().any(|ready| **ready == ***address));
        let address = address.filter(|_| selection.is_probed)?;
        let message =
            format!("Nothing listens at {address}, though the pod there is ready: {}", selection.ports);
        Some(Trouble::new(ObstacleKind::PortRefused, message))
    }

    /// What is wrong with the pods; nothing, if one of them may still come.
    fn of_pods(&self) -> Option<Trouble> {
        // Where none is asked for, what there is was left behind, and says nothing of those that will come.
        let asked = || self.workloads.iter().filter(|workload| workload.replicas != Some(0));
        let pods = || asked().flat_map(|workload| &workload.pods).map(|pod| self.of_pod(pod));
        if pods().any(|trouble| trouble.is_none()) {
            return None;
        }
        let refused = asked().filter_map(|workload| {
            let failure = workload.failure.as_ref()?;
            let message = format!("The pods of {} cannot be created: {failure}", workload.full_name());
            Some(Trouble::new(ObstacleKind::Quota, message))
        });
        let missing = self.workloads.iter().filter(|workload| workload.is_missing).map(|workload| {
            let message = format!("There is no {}, which is to be scaled", workload.full_name());
            Trouble::new(ObstacleKind::ScaleRefused, message)
        });
        pods().flatten().chain(refused).chain(missing).min_by_key(|trouble| rank(trouble.kind))
    }
}

// === impl TargetFacts ===

impl TargetFacts {
    /// What matters here of what was discovered.
    pub fn of(discovered: &Discovered) -> Self {
        const MOST: usize = 16;
        let problem = discovered.problem.as_ref().filter(|_| discovered.is_synced);
        let ready = discovered.endpoints.iter().filter(|endpoint| endpoint.ready && !endpoint.terminating);
        let warnings = discovered.starts.iter().filter_map(|start| {
            let name = start.name.rsplit('/').next().unwrap_or_default();
            Some((name.into(), start.warning.clone()?))
        });
        Self {
            problem: problem.and_then(|problem| {
                let mut message = problem.text.to_string();
                // It begins a sentence.
                if let Some(first) = message.get_mut(..1) {
                    first.make_ascii_uppercase();
                }
                Some(Trouble::new(problem.kind?, message))
            }),
            selection: discovered.selection.clone(),
            ready: ready.map(|endpoint| endpoint.address.clone()).take(MOST).collect(),
            warnings: warnings.collect(),
        }
    }
}

/// Whether the HTTP Add-on's chart names its scaler so.
fn is_of_add_on(address: &str) -> bool {
    ["keda-add-ons-http", "keda-http-add-on"].iter().any(|name| address.starts_with(name))
}

#[cfg(test)]
mod tests;
