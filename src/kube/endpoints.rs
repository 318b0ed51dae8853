//! The pods of targets: found through Services with their EndpointSlices, through InferencePools, and through the Pods
//! themselves, whichever tells first.

mod dead;
mod merge;
mod pool;
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
    Cluster, Pods, PodsOf,
    parts::{Parts, Select},
    starts::{Sources, Starts},
};
use crate::{
    domain::{ClusterTarget, EndpointSource, ObstacleKind, Roles, ServicePort},
    state::{Discovered, Discovery, Problem},
};
use dead::Dead;
use merge::Departed;
pub(super) use merge::addresses;
use pool::InferencePool;

/// Finds the pods of targets in a cluster. Routes with the same target share what is found.
#[derive(Clone)]
pub struct Endpoints {
    cluster: Cluster,
    pods: Arc<Pods>,
    services: Arc<Parts<Service>>,
    slices: Arc<Parts<EndpointSlice>>,
    sources: Arc<Sources>,
    followed: Arc<Mutex<HashMap<Followed, Weak<Found>>>>,
}

type Found = watch::Sender<Arc<Discovered>>;

/// What is followed, whichever way requests take there.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Followed {
    namespace: String,
    source: EndpointSource,
    roles: Roles,
}

/// The label of an EndpointSlice that names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

// === impl Endpoints ===

impl Endpoints {
    /// Nothing is followed yet.
    pub fn new(cluster: Cluster, pods: Arc<Pods>) -> Self {
        Self {
            services: Arc::new(Parts::new(cluster.clone(), |service| {
                service.metadata.annotations = None;
                service.status = None;
            })),
            slices: Arc::new(Parts::new(cluster.clone(), |_| {})),
            sources: Sources::new(&cluster),
            cluster,
            pods,
            followed: Arc::default(),
        }
    }

    /// Runs until nobody wants to know any more.
    async fn follow(self, target: Followed, found: Arc<Found>) {
        tokio::select! {
            // The end first: what is found is for nobody.
            biased;
            () = self.unwanted(&target, &found) => {}
            () = async {
                match &target.source {
                    EndpointSource::Service { name, port } => {
                        self.follow_service(&target, name, port, &found).await;
                    }
                    EndpointSource::InferencePool { name } => {
                        self.follow_pool(&target, name, &found).await;
                    }
                }
            } => {}
        }
    }

    async fn unwanted(&self, target: &Followed, found: &Found) {
        loop {
            found.closed().await;
            let mut followed = self.followed.lock();
            // Somebody may have asked again in between; under the lock nobody does.
            if found.receiver_count() == 0 {
                followed.remove(target);
                return;
            }
        }
    }

    async fn follow_service(&self, target: &Followed, name: &str, port: &ServicePort, found: &Found) {
        let Followed { namespace, roles, .. } = target;
        let mut services = self.services.watch(namespace, Select::Name(name.to_owned()));
        let of_service = Select::Labels([(SERVICE_NAME.to_owned(), name.to_owned())].into());
        let mut slices = self.slices.watch(namespace, of_service);
        let mut pods = Selected::default();
        let mut departed = Departed::default();
        let mut dead = Dead::default();
        let mut starts = Starts::new(self.sources.clone());
        loop {
            let service = services.all().pop();
            pods.select(&self.pods, namespace, service.as_deref().and_then(merge::selector));
            publish(
                found,
                match (service, services.is_synced()) {
                    (Some(service), _) => {
                        let (slices_now, pods_now) = (slices.all(), pods.all());
                        departed.update(&slices_now, &pods_now);
                        let mut merged =
                            merge::service(&service, port, &slices_now, &pods_now, &departed, roles);
                        // Pods alone do not say which there are no more.
                        merged.is_synced = slices.is_synced() || merged.problem.is_some();
                        let ports = |pod: &Pod| merge::port_on(&service, port, pod).into_iter().collect();
                        starts.update(&pods_now, &merged.endpoints, pods.is_synced(), ports);
                        let dead = dead.update(&pods_now, pods.is_synced(), &merged.endpoints, ports);
                        let selection = Arc::new(selection::of_service(&service, port, &pods_now));
                        let selection = pods.is_synced().then_some(selection);
                        Discovered { starts: starts.all(), selection, dead, ..merged }
                    }
                    (None, true) => missing(format!("the Service {namespace}/{name} does not exist")),
                    (None, false) => unheard(services.failure()),
                },
            );
            tokio::select! {
                biased; // all lead to the same
                () = services.changed() => {}
                () = slices.changed() => {}
                () = pods.changed() => {}
                () = starts.changed() => {}
            }
        }
    }

    async fn follow_pool(&self, target: &Followed, name: &str, found: &Found) {
        let Followed { namespace, roles, .. } = target;
        let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut pools =
            self.cluster.watch_in::<InferencePool>(vec![self.cluster.api(namespace)], only, |pool| {
                pool.metadata.annotations = None;
            });
        let mut pods = Selected::default();
        let mut dead = Dead::default();
        let mut starts = Starts::new(self.sources.clone());
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
                    (Some(Err(why)), _) => missing(format!("the InferencePool {namespace}/{name} {why}")),
                    (None, true) => missing(format!("the InferencePool {namespace}/{name} does not exist")),
                    (None, false) => unheard(pools.failure()),
                },
            );
            tokio::select! {
                biased; // all lead to the same
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
        let target = Followed { namespace, source, roles };
        let mut followed = self.followed.lock();
        if let Some(found) = followed.get(&target).and_then(Weak::upgrade) {
            return found.subscribe();
        }
        let (found, discovered) = watch::channel(Arc::default());
        let found = Arc::new(found);
        followed.insert(target.clone(), Arc::downgrade(&found));
        self.cluster.spawn(self.clone().follow(target, found));
        discovered
    }
}

fn publish(found: &Found, new: Discovered) {
    found.send_if_modified(|known| {
        let changed = **known != new;
        if changed {
            *known = Arc::new(new);
        }
        changed
    });
}

fn missing(why: String) -> Discovered {
    let problem = Some(Problem::lasting(ObstacleKind::NoService, why));
    Discovered { is_synced: true, problem, ..Discovered::default() }
}

fn unheard(failure: Option<Arc<str>>) -> Discovered {
    Discovered { problem: failure.map(Problem::passing), ..Discovered::default() }
}

/// The pods that a Service or pool selects now, if it selects any.
#[derive(Default)]
struct Selected(Option<(String, PodsOf)>);

// === impl Selected ===

impl Selected {
    fn select<'a>(
        &mut self,
        pods: &Pods,
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
