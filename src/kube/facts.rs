//! Gathers and publishes the facts of all routes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, stream::SelectAll};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_stream::wrappers::WatchStream;

use super::{
    Cluster, PodWatches, SCAN_PAUSE_FACTOR,
    reasons::{AllFacts, Facts, KedaState, ScaledObjectFacts, TargetFacts, WorkloadFacts},
    scale::ScaleRefusals,
    scaled_objects::{ExternalTrigger, ScaledObject, ScaledObjects, resolve_route_name},
    workloads::WorkloadRef,
};
use crate::{
    domain::{ClusterTarget, Route, RouteKey, Target},
    state::{Discovered, Discovery},
};

/// Served routes of the configuration file and the cluster.
pub type AllRoutes = watch::Receiver<Arc<Vec<Arc<Route>>>>;

/// Time during which changes are batched, as a starting pod changes several times in a row; at least
/// [`SCAN_PAUSE_FACTOR`] times the duration of the last scan.
const FACTS_BATCH_DELAY: Duration = Duration::from_millis(20);

type FollowedWorkloads = HashMap<WorkloadRef, watch::Receiver<Arc<WorkloadFacts>>>;

/// Discovered target of each route.
type Targets = HashMap<RouteKey, (ClusterTarget, watch::Receiver<Arc<Discovered>>)>;

/// ScaledObjects by the route they name, with the naming trigger.
type ScaledObjectsByRoute<'a> = HashMap<RouteKey, Vec<(&'a ScaledObject, ExternalTrigger)>>;

/// ScaledObjects that name no existing route: namespace to object and name used.
type OrphanedObjects<'a> = BTreeMap<&'a str, BTreeSet<(&'a str, String)>>;

/// Maximum number of orphaned ScaledObjects listed per route.
const MAX_LISTED_ORPHANS: usize = 3;

// === impl Cluster ===

impl Cluster {
    /// Publishes the facts of all routes for the lifetime of the receiver.
    pub fn facts(
        &self,
        mut routes: AllRoutes,
        mut scaled_objects: watch::Receiver<ScaledObjects>,
        mut refusals: ScaleRefusals,
        pods: Arc<PodWatches>,
        discovery: Arc<dyn Discovery>,
    ) -> watch::Receiver<Arc<AllFacts>> {
        let (facts, receiver) = watch::channel(Arc::default());
        let cluster = self.clone();
        self.spawn(async move {
            let mut followed = FollowedWorkloads::new();
            let mut targets = Targets::new();
            let mut objects = scaled_objects.borrow_and_update().clone();
            loop {
                let began = Instant::now();
                let known = routes.borrow_and_update().clone();
                let refused = refusals.borrow_and_update().clone();
                let all = {
                    let listed = objects.all();
                    let (named, strays) =
                        by_route(&known, listed.iter().filter_map(|object| object.0.as_ref().ok()));
                    let keda = keda(&objects);
                    let scaled =
                        |route: &Route| named.get(&route.name).map(Vec::as_slice).unwrap_or_default();
                    let wanted =
                        known.iter().map(|route| (route, scaled(route), workloads(route, scaled(route))));
                    let wanted: Vec<_> = wanted.collect();
                    let all_wanted: HashSet<_> =
                        wanted.iter().flat_map(|(.., workloads)| workloads.iter().cloned()).collect();
                    followed.retain(|workload, _| all_wanted.contains(workload));
                    subscribe_targets(&mut targets, &known, &*discovery);
                    for workload in wanted.iter().flat_map(|(.., workloads)| workloads) {
                        followed
                            .entry(workload.clone())
                            .or_insert_with(|| cluster.follow(workload.clone(), pods.clone()));
                    }
                    let facts = wanted.into_iter().map(|(route, scaled, workloads)| {
                        let facts = Facts {
                            direct_scaling_failure: workloads
                                .iter()
                                .find_map(|workload| refused.get(workload).cloned()),
                            // The receiver is marked unchanged, so that only later changes wake the loop.
                            workloads: workloads
                                .iter()
                                .filter_map(|workload| {
                                    Some(followed.get_mut(workload)?.borrow_and_update().clone())
                                })
                                .collect(),
                            orphaned_objects: stray(&strays, route)
                                .filter(|_| scaled.is_empty())
                                .unwrap_or_default(),
                            target: targets
                                .get_mut(&route.name)
                                .map(|(_, found)| TargetFacts::of(&found.borrow_and_update()))
                                .unwrap_or_default(),
                            ..scaling_facts(route, scaled, keda)
                        };
                        (route.name.clone(), facts)
                    });
                    facts.collect::<AllFacts>()
                };
                facts.send_if_modified(|before| {
                    let changed = **before != all;
                    if changed {
                        *before = Arc::new(all);
                    }
                    changed
                });
                let cost = began.elapsed();
                let of_targets = targets.values().map(|(_, found)| found.clone());
                let of_targets = of_targets.map(|found| WatchStream::from_changes(found).map(drop).boxed());
                let changes = followed
                    .values()
                    .cloned()
                    .map(|facts| WatchStream::from_changes(facts).map(drop).boxed());
                let mut changes: SelectAll<_> = changes.chain(of_targets).collect();
                tokio::select! {
                    biased; // stop first: no reader is left; the order of the others does not matter
                    () = facts.closed() => return,
                    Ok(()) = routes.changed() => {}
                    Ok(()) = scaled_objects.changed() => objects = scaled_objects.borrow_and_update().clone(),
                    Ok(()) = refusals.changed() => {}
                    () = objects.changed() => {}
                    Some(_) = changes.next() => {}
                    else => return,
                }
                sleep(FACTS_BATCH_DELAY.max(cost * SCAN_PAUSE_FACTOR)).await;
            }
        });
        receiver
    }
}

/// Subscribes to the targets of `routes` and drops all other subscriptions.
fn subscribe_targets(targets: &mut Targets, routes: &[Arc<Route>], discovery: &dyn Discovery) {
    let wanted = routes.iter().filter_map(|route| match &route.target {
        Target::Cluster(target) => Some((route.name.clone(), target)),
        _ => None,
    });
    let mut before = std::mem::take(targets);
    for (name, target) in wanted {
        let known = before.remove(&name).filter(|(known, _)| known == target);
        let known = known.unwrap_or_else(|| (target.clone(), discovery.watch(target)));
        targets.insert(name, known);
    }
}

fn scaling_facts(route: &Route, scaled: &[(&ScaledObject, ExternalTrigger)], keda: KedaState) -> Facts {
    Facts {
        scale_by: route.scale_by,
        is_cluster_route: route.name.namespaced().is_some() && !matches!(route.target, Target::Url(_)),
        metadata_key: if route.intercept.is_some() { "interceptorRoute" } else { "route" },
        keda,
        scaled_objects: scaled
            .iter()
            .map(|(object, trigger)| ScaledObjectFacts::new(object, trigger.clone()))
            .collect(),
        ..Facts::default()
    }
}

fn keda(objects: &ScaledObjects) -> KedaState {
    match objects {
        ScaledObjects::Absent => KedaState::Absent,
        known if known.is_complete() => KedaState::Known,
        _ => KedaState::Unknown,
    }
}

fn stray(strays: &OrphanedObjects<'_>, route: &Route) -> Option<Vec<String>> {
    let (namespace, _) = route.name.namespaced()?;
    let describe = |(object, name): &(&str, String)| {
        format!("ScaledObject `{namespace}/{object}` names `{name}`, which is not a route")
    };
    Some(strays.get(namespace)?.iter().take(MAX_LISTED_ORPHANS).map(describe).collect())
}

fn by_route<'a>(
    routes: &[Arc<Route>],
    objects: impl Iterator<Item = &'a ScaledObject>,
) -> (ScaledObjectsByRoute<'a>, OrphanedObjects<'a>) {
    let known: HashSet<&RouteKey> = routes.iter().map(|route| &route.name).collect();
    let (mut by_route, mut strays) = (ScaledObjectsByRoute::new(), OrphanedObjects::new());
    for object in objects {
        for trigger in object.triggers() {
            match resolve_route_name(object.namespace(), &trigger.route, |key| known.contains(key)) {
                Some(key) => by_route.entry(key).or_default().push((object, trigger)),
                None => {
                    strays.entry(object.namespace()).or_default().insert((object.name(), trigger.route));
                }
            }
        }
    }
    for scaled in by_route.values_mut() {
        // Stores have no order; sort so that messages stay stable.
        scaled.sort_by_key(|(object, _)| (object.namespace(), object.name()));
    }
    (by_route, strays)
}

/// Returns the workloads of a route: the one named by the route, else those of its ScaledObjects.
fn workloads(route: &Route, scaled: &[(&ScaledObject, ExternalTrigger)]) -> Vec<WorkloadRef> {
    let namespace = route.name.namespaced().map(|(namespace, _)| namespace);
    if let (Some(workload), Some(namespace)) = (&route.workload, namespace) {
        return vec![WorkloadRef { namespace: namespace.into(), workload: workload.clone() }];
    }
    let workloads = scaled.iter().filter_map(|(object, _)| {
        Some(WorkloadRef { namespace: object.namespace().into(), workload: object.workload()? })
    });
    let mut workloads: Vec<_> = workloads.collect();
    workloads.dedup();
    workloads
}

#[cfg(test)]
mod tests;
