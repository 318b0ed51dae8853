//! Discovers the endpoints of cluster targets from Services, EndpointSlices, InferencePools and Pods. Pods are watched
//! directly as well, because EndpointSlices lag behind them.

mod dead;
mod merge;
mod pool;
mod protocol;
mod selection;

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use k8s_openapi::api::{
    core::v1::{Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::runtime::watcher;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    Cluster, PodWatches, PodsOf,
    informer::{Informers, ObjectSelector},
    starts::{StartSources, StartingPods},
};
use crate::{
    domain::{ClusterTarget, EndpointSource, ObstacleKind, Roles, ServicePort},
    state::{Discovered, Discovery, DiscoveryProblem},
};
use dead::DeadAddresses;
use merge::DeletedPods;
use pool::InferencePool;

/// Endpoint discovery for cluster targets. Routes with equal targets share one discovery task.
#[derive(Clone)]
pub struct Endpoints {
    cluster: Cluster,
    pods: Arc<PodWatches>,
    services: Arc<Informers<Service>>,
    slices: Arc<Informers<EndpointSlice>>,
    sources: Arc<StartSources>,
    active: Arc<Mutex<HashMap<DiscoveryKey, Weak<DiscoveredSender>>>>,
}

type DiscoveredSender = watch::Sender<Arc<Discovered>>;

/// The part of a target that determines its endpoints.
#[derive(Clone, PartialEq, Eq, Hash)]
struct DiscoveryKey {
    namespace: String,
    source: EndpointSource,
    roles: Roles,
}

/// Label of an EndpointSlice with the name of its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

// === impl Endpoints ===

impl Endpoints {
    /// Starts without a watch.
    pub fn new(cluster: Cluster, pods: Arc<PodWatches>) -> Self {
        Self {
            services: Arc::new(Informers::new(cluster.clone(), |service| {
                service.metadata.annotations = None;
                service.status = None;
            })),
            slices: Arc::new(Informers::new(cluster.clone(), |_| {})),
            sources: StartSources::new(&cluster),
            cluster,
            pods,
            active: Arc::default(),
        }
    }

    /// Publishes the endpoints of `target` until the last receiver is dropped.
    async fn discover(self, target: DiscoveryKey, found: Arc<DiscoveredSender>) {
        tokio::select! {
            // Unsubscription first: no receiver is left for further results.
            biased;
            () = self.unsubscribed(&target, &found) => {}
            () = async {
                match &target.source {
                    EndpointSource::Service { name, port } => {
                        self.discover_service(&target, name, port, &found).await;
                    }
                    EndpointSource::InferencePool { name } => {
                        self.discover_pool(&target, name, &found).await;
                    }
                }
            } => {}
        }
    }

    async fn unsubscribed(&self, target: &DiscoveryKey, found: &DiscoveredSender) {
        loop {
            found.closed().await;
            let mut active = self.active.lock();
            // A new receiver may have subscribed in between; holding the lock prevents further ones.
            if found.receiver_count() == 0 {
                active.remove(target);
                return;
            }
        }
    }

    async fn discover_service(
        &self,
        target: &DiscoveryKey,
        name: &str,
        port: &ServicePort,
        found: &DiscoveredSender,
    ) {
        let DiscoveryKey { namespace, roles, .. } = target;
        let mut services = self.services.watch(namespace, ObjectSelector::Name(name.to_owned()));
        let of_service = ObjectSelector::Labels([(SERVICE_NAME.to_owned(), name.to_owned())].into());
        let mut slices = self.slices.watch(namespace, of_service);
        let mut pods = SelectedPods::default();
        let mut deleted = DeletedPods::default();
        let mut dead = DeadAddresses::default();
        let mut starts = StartingPods::new(self.sources.clone());
        loop {
            let service = services.all().pop();
            pods.select(&self.pods, namespace, service.as_deref().and_then(merge::selector));
            publish(
                found,
                match (service, services.is_synced()) {
                    (Some(service), _) => {
                        let (slices_now, pods_now) = (slices.all(), pods.all());
                        deleted.update(&slices_now, &pods_now);
                        let mut merged =
                            merge::service(&service, port, &slices_now, &pods_now, &deleted, roles);
                        // Pods alone cannot show that an endpoint of the last known slices was removed.
                        merged.is_synced = slices.is_synced() || merged.problem.is_some();
                        let ports = |pod: &Pod| merge::port_on(&service, port, pod).into_iter().collect();
                        starts.update(&pods_now, &merged.endpoints, pods.is_synced(), ports);
                        let dead = dead.update(&pods_now, pods.is_synced(), &merged.endpoints, ports);
                        let selection = Arc::new(selection::of_service(&service, port, &pods_now));
                        let selection = pods.is_synced().then_some(selection);
                        Discovered { starts: starts.all(), selection, dead, ..merged }
                    }
                    (None, true) => invalid_target(format!("the Service {namespace}/{name} does not exist")),
                    (None, false) => not_synced(services.failure()),
                },
            );
            tokio::select! {
                biased; // order does not matter: each branch re-evaluates everything
                () = services.changed() => {}
                () = slices.changed() => {}
                () = pods.changed() => {}
                () = starts.changed() => {}
            }
        }
    }

    async fn discover_pool(&self, target: &DiscoveryKey, name: &str, found: &DiscoveredSender) {
        let DiscoveryKey { namespace, roles, .. } = target;
        let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut pools =
            self.cluster.watch_in::<InferencePool>(vec![self.cluster.api(namespace)], only, |pool| {
                pool.metadata.annotations = None;
            });
        let mut pods = SelectedPods::default();
        let mut dead = DeadAddresses::default();
        let mut starts = StartingPods::new(self.sources.clone());
        loop {
            let pool = pools.get(namespace, name).map(|pool| pool::read(&pool));
            let selector = pool.as_ref().and_then(|pool| pool.as_ref().ok()).map(|pool| &pool.selector);
            pods.select(&self.pods, namespace, selector);
            publish(
                found,
                match (pool, pools.is_synced()) {
                    (Some(Ok(pool)), _) => {
                        let pods_now = pods.all();
                        let merged = merge::pool(&pool, &pods_now, roles);
                        let ports = |pod: &Pod| merge::active_ports(&pool, pod);
                        starts.update(&pods_now, &merged.endpoints, pods.is_synced(), ports);
                        let dead = dead.update(&pods_now, pods.is_synced(), &merged.endpoints, ports);
                        let selection = selection::of_pool(&format!("{namespace}/{name}"), &pool, &pods_now);
                        let selection = pods.is_synced().then(|| Arc::new(selection));
                        Discovered {
                            is_synced: pods.is_synced(),
                            starts: starts.all(),
                            selection,
                            dead,
                            ..merged
                        }
                    }
                    (Some(Err(why)), _) => {
                        invalid_target(format!("the InferencePool {namespace}/{name} {why}"))
                    }
                    (None, true) => {
                        invalid_target(format!("the InferencePool {namespace}/{name} does not exist"))
                    }
                    (None, false) => not_synced(pools.failure()),
                },
            );
            tokio::select! {
                biased; // order does not matter: each branch re-evaluates everything
                () = pools.changed() => {}
                () = pods.changed() => {}
                () = starts.changed() => {}
            }
        }
    }
}

impl Discovery for Endpoints {
    fn watch(&self, target: &ClusterTarget) -> watch::Receiver<Arc<Discovered>> {
        let ClusterTarget { namespace, source, roles, .. } = target.clone();
        let target = DiscoveryKey { namespace, source, roles };
        let mut active = self.active.lock();
        if let Some(found) = active.get(&target).and_then(Weak::upgrade) {
            return found.subscribe();
        }
        let (found, discovered) = watch::channel(Arc::default());
        let found = Arc::new(found);
        active.insert(target.clone(), Arc::downgrade(&found));
        self.cluster.spawn(self.clone().discover(target, found));
        discovered
    }
}

fn publish(found: &DiscoveredSender, new: Discovered) {
    found.send_if_modified(|known| {
        let changed = **known != new;
        if changed {
            *known = Arc::new(new);
        }
        changed
    });
}

fn invalid_target(why: String) -> Discovered {
    let problem = Some(DiscoveryProblem::lasting(ObstacleKind::NoService, why));
    Discovered { is_synced: true, problem, ..Discovered::default() }
}

fn not_synced(failure: Option<Arc<str>>) -> Discovered {
    Discovered { problem: failure.map(DiscoveryProblem::passing), ..Discovered::default() }
}

/// Watch of the pods that a Service or pool currently selects; `None` without a selector.
#[derive(Default)]
struct SelectedPods(Option<(String, PodsOf)>);

// === impl SelectedPods ===

impl SelectedPods {
    fn select<'a>(
        &mut self,
        pods: &PodWatches,
        namespace: &str,
        selector: Option<impl IntoIterator<Item = (&'a String, &'a String)>>,
    ) {
        let labels = selector.map(merge::labels);
        if labels.as_ref() != self.0.as_ref().map(|(labels, _)| labels) {
            self.0 = labels.map(|labels| {
                let pods = pods.watch(namespace, &labels);
                (labels, pods)
            });
        }
    }

    fn all(&self) -> Vec<Arc<Pod>> {
        self.0.as_ref().map_or_else(Vec::new, |(_, pods)| pods.all())
    }

    fn is_synced(&self) -> bool {
        self.0.as_ref().is_none_or(|(_, pods)| pods.is_synced())
    }

    async fn changed(&mut self) {
        match &mut self.0 {
            Some((_, pods)) => pods.changed().await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests;
