//! Pods by their labels.

use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher;

use super::{Cluster, Watched};

impl Cluster {
    /// Follows the pods of a namespace that `selector` selects.
    pub fn pods(&self, namespace: &str, selector: &str) -> Watched<Pod> {
        self.watch_in(vec![self.api(namespace)], watcher::Config::default().labels(selector), |_| {})
    }
}
