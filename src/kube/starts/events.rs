//! Events of a starting pod.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures_util::{Stream, StreamExt, future::ready};
use k8s_openapi::api::core::v1::Event;
use kube::runtime::{
    WatchStreamExt,
    watcher::{self, Config, watcher},
};

use crate::kube::{Cluster, error_chain::error_chain, watch::WatchBackoff};

/// Watches Events with one watch per pod: a namespace may have thousands of Events.
pub(super) struct PodEvents {
    cluster: Cluster,
    /// Set once missing permission has been logged.
    is_denied: Arc<AtomicBool>,
}

// === impl PodEvents ===

impl PodEvents {
    pub(super) fn new(cluster: Cluster) -> Self {
        Self { cluster, is_denied: Arc::default() }
    }

    /// Returns the existing and future Events of a pod. The stream ends if permission is denied.
    pub(super) fn watch(&self, namespace: &str, name: &str, uid: &str) -> impl Stream<Item = Event> + use<> {
        let is_denied = self.is_denied.clone();
        let uid = uid.to_owned();
        // The field selector keeps the list to about one page; the uid is compared below.
        let config = Config::default().fields(&format!("involvedObject.kind=Pod,involvedObject.name={name}"));
        let events = watcher(self.cluster.api::<Event>(namespace), config).backoff(WatchBackoff::new());
        events
            .take_while(move |event| {
                let denied = event.as_ref().err().and_then(denial);
                if let Some(reason) = &denied
                    && !is_denied.swap(true, Ordering::Relaxed)
                {
                    tracing::info!(
                        reason,
                        "cold starts are recorded without image pulls; grant `list` and `watch` on events to include them"
                    );
                }
                ready(denied.is_none())
            })
            .filter_map(move |event| {
                ready(match event {
                    Ok(watcher::Event::InitApply(event) | watcher::Event::Apply(event)) => Some(event),
                    Ok(_) => None,
                    // The watcher retries with backoff.
                    Err(error) => {
                        tracing::debug!(error = error_chain(&error), "event watch of a pod failed; retrying");
                        None
                    }
                })
            })
            .filter(move |event| ready(event.involved_object.uid.as_deref() == Some(&*uid)))
    }
}

fn denial(error: &watcher::Error) -> Option<String> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status)) if matches!(status.code, 401 | 403) => {
            Some(status.message.clone())
        }
        _ => None,
    }
}
