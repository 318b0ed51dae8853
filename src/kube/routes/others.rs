//! What objects of the HTTP Add-on speak of: ConfigMaps with bodies, and Services of a fallback.

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

use super::changed;
use crate::kube::{
    Cluster, Watched,
    interceptor_route::{BODIES, References},
};

/// What objects of the Add-on speak of, watched once one does: who needs no right to it shall need none.
#[derive(Default)]
pub(super) struct Others {
    config_maps: Option<Watched<ConfigMap>>,
    services: Option<Watched<Service>>,
    wants_config_maps: AtomicBool,
    wants_services: AtomicBool,
}

// === impl Others ===

impl Others {
    pub(super) fn is_settled(&self) -> bool {
        self.config_maps.as_ref().is_none_or(Watched::is_settled)
            && self.services.as_ref().is_none_or(Watched::is_settled)
    }

    /// Cancel-safe.
    pub(super) async fn changed(&mut self) {
        tokio::select! {
            biased; // any of them will do
            () = changed(&mut self.config_maps) => {}
            () = changed(&mut self.services) => {}
        }
    }

    /// Begins to watch what has been asked for; whether that is something new.
    pub(super) fn watch(&mut self, cluster: &Cluster) -> bool {
        let mut new = false;
        if self.wants_config_maps.load(Ordering::Relaxed) && self.config_maps.is_none() {
            let labelled = watcher::Config::default().labels(BODIES);
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

impl References for Others {
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
