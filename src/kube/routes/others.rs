//! Objects referenced by InterceptorRoutes: ConfigMaps with response bodies, and fallback Services.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use kube::runtime::watcher;

use crate::kube::{
    Cluster, Watched,
    interceptor_route::{BODY_LABEL, References},
};

/// Watches of referenced kinds, begun with the first reference, so that installations without references need no
/// further permissions.
#[derive(Default)]
pub(super) struct ReferencedObjects {
    config_maps: Option<Watched<ConfigMap>>,
    services: Option<Watched<Service>>,
    wants_config_maps: AtomicBool,
    wants_services: AtomicBool,
}

// === impl ReferencedObjects ===

impl ReferencedObjects {
    pub(super) fn is_settled(&self) -> bool {
        self.config_maps.as_ref().is_none_or(Watched::is_settled)
            && self.services.as_ref().is_none_or(Watched::is_settled)
    }

    /// Cancel-safe.
    pub(super) async fn changed(&mut self) {
        tokio::select! {
            biased; // order does not matter: the caller re-reads everything
            () = changed(&mut self.config_maps) => {}
            () = changed(&mut self.services) => {}
        }
    }

    /// Begins the requested watches. Returns whether any was begun.
    pub(super) fn watch(&mut self, cluster: &Cluster) -> bool {
        let mut new = false;
        if self.wants_config_maps.load(Ordering::Relaxed) && self.config_maps.is_none() {
            let labelled = watcher::Config::default().labels(BODY_LABEL);
            self.config_maps = Some(cluster.watch(labelled));
            new = true;
        }
        if self.wants_services.load(Ordering::Relaxed) && self.services.is_none() {
            self.services = Some(cluster.watch(watcher::Config::default()));
            new = true;
        }
        new
    }
}

impl References for ReferencedObjects {
    fn config_map(&self, namespace: &str, name: &str) -> Option<BTreeMap<String, Bytes>> {
        self.wants_config_maps.store(true, Ordering::Relaxed);
        let found = self.config_maps.as_ref()?.get(namespace, name)?;
        let texts = found.data.iter().flatten().map(|(key, text)| (key.clone(), text.clone().into()));
        let binary =
            found.binary_data.iter().flatten().map(|(key, data)| (key.clone(), data.0.clone().into()));
        Some(texts.chain(binary).collect())
    }

    fn service(&self, namespace: &str, name: &str) -> Option<Arc<Service>> {
        self.wants_services.store(true, Ordering::Relaxed);
        self.services.as_ref()?.get(namespace, name)
    }
}

/// Waits for a change of a watch, if there is one. Cancel-safe.
pub(super) async fn changed<K>(watched: &mut Option<Watched<K>>)
where
    K: kube::runtime::reflector::Lookup<DynamicType: Default + Eq + std::hash::Hash + Clone>
        + Clone
        + 'static,
{
    match watched {
        Some(watched) => watched.changed().await,
        None => std::future::pending().await,
    }
}
