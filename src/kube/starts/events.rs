//! The Events of one pod, while it starts.

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

use crate::kube::{
    Cluster,
    watch::{Pauses, chain},
};

/// Watches Events of pods, one pod a watch: a namespace may have thousands.
pub(super) struct PodEvents {
    cluster: Cluster,
    /// Whether it has been said that there is no right to it.
    is_denied: Arc<AtomicBool>,
}

// === impl PodEvents ===

impl PodEvents {
    pub(super) fn new(cluster: Cluster) -> Self {
        Self { cluster, is_denied: Arc::default() }
    }

    /// What is told of a pod, those Events first that there are already. It ends where there is no right to it.
    pub(super) fn of(&self, namespace: &str, name: &str, uid: &str) -> impl Stream<Item = Event> + use<> {
        let is_denied = self.is_denied.clone();
        let uid = uid.to_owned();
        // By the name alone, which the API server compares before it sends anything; and one page is enough.
        let config = Config::default().fields(&format!("involvedObject.kind=Pod,involvedObject.name={name}"));
        let events = watcher(self.cluster.api::<Event>(namespace), config).backoff(Pauses::new());
        events
            .take_while(move |event| {
                let denied = event.as_ref().err().and_then(denial);
                if let Some(reason) = &denied
                    && !is_denied.swap(true, Ordering::Relaxed)
                {
                    tracing::info!(
                        reason,
                        "cold starts do not tell of images; to have that, grant `list` and `watch` on events"
                    );
                }
                ready(denied.is_none())
            })
            .filter_map(move |event| {
                ready(match event {
                    Ok(watcher::Event::InitApply(event) | watcher::Event::Apply(event)) => Some(event),
                    Ok(_) => None,
                    // It is tried again with a growing pause.
                    Err(error) => {
                        tracing::debug!(error = chain(&error), "events of a pod are not heard of");
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
