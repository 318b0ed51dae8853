//! A kind of objects, kept up to date.

use std::{fmt::Debug, sync::Arc};

use futures_util::StreamExt;
use kube::{
    Api, Resource,
    api::ObjectMeta,
    runtime::{
        WatchStreamExt,
        reflector::{Lookup, ObjectRef, Store, store},
        watcher::{self, watcher},
    },
};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use std::hash::Hash;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Cluster;

/// The objects of a kind as they are known now, in one or several namespaces. The watch ends when the last clone is
/// dropped. What was known before the API server went away stays known.
#[derive(Clone)]
pub struct Watched<K: Lookup<DynamicType: Default + Eq + Hash + Clone> + Clone + 'static> {
    stores: Arc<[Store<K>]>,
    /// Rises with every change.
    changes: watch::Receiver<u64>,
    failure: Arc<Mutex<Option<Arc<str>>>>,
    _ends: Arc<DropGuard>,
}

// === impl Cluster ===

impl Cluster {
    /// Watches all objects of a kind in the served namespaces, `config` narrowing it down. What the cluster says of who
    /// manages which field is thrown away: it is most of an object.
    pub fn watch<K>(&self, config: watcher::Config) -> Watched<K>
    where
        K: Resource<
                Scope = kube::core::NamespaceResourceScope,
                DynamicType: Default + Eq + Hash + Clone + Send + Sync + Unpin,
            > + Clone
            + Debug
            + DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        self.watch_in(self.apis(), config, |_| {})
    }

    /// As [`Self::watch`], through these, and keeping only what `trim` leaves.
    pub fn watch_in<K>(
        &self,
        apis: Vec<Api<K>>,
        config: watcher::Config,
        trim: impl Fn(&mut K) + Clone + Send + 'static,
    ) -> Watched<K>
    where
        K: Resource<DynamicType: Default + Eq + Hash + Clone + Send + Sync + Unpin>
            + Clone
            + Debug
            + DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        let (changed, changes) = watch::channel(0);
        let failure = Arc::<Mutex<Option<Arc<str>>>>::default();
        let ending = CancellationToken::new();
        let stores = apis.into_iter().map(|api| {
            let (reader, writer) = store();
            let (changed, trim) = (changed.clone(), trim.clone());
            let events = watcher(api, config.clone()).default_backoff().modify(move |object| {
                let meta: &mut ObjectMeta = object.meta_mut();
                meta.managed_fields = None;
                trim(object);
            });
            let kind = K::kind(&K::DynamicType::default()).into_owned();
            let last_failure = failure.clone();
            let following = async move {
                let mut events = std::pin::pin!(kube::runtime::reflector(writer, events));
                let mut failing = false;
                while let Some(event) = events.next().await {
                    match event {
                        Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
                        Ok(_) => {
                            if std::mem::take(&mut failing) {
                                tracing::info!(kind, "the cluster is heard again");
                                *last_failure.lock() = None;
                            }
                            changed.send_modify(|changes| *changes += 1);
                        }
                        // It is tried again with a growing pause; said once, until it goes well.
                        Err(error) if !failing => {
                            failing = true;
                            tracing::warn!(kind, %error, "the cluster is not heard: what was known stays");
                            *last_failure.lock() =
                                Some(format!("cannot watch {kind} objects: {error}").into());
                            changed.send_modify(|changes| *changes += 1);
                        }
                        Err(_) => {}
                    }
                }
            };
            let ending = ending.clone();
            self.spawn(async move {
                tokio::select! {
                    biased; // nobody reads it any more
                    () = ending.cancelled() => {}
                    () = following => {}
                }
            });
            reader
        });
        Watched { stores: stores.collect(), changes, failure, _ends: Arc::new(ending.drop_guard()) }
    }
}

// === impl Watched ===

impl<K: Lookup<DynamicType: Default + Eq + Hash + Clone> + Clone + 'static> Watched<K> {
    /// The objects that are known now.
    pub fn all(&self) -> Vec<Arc<K>> {
        self.stores.iter().flat_map(Store::state).collect()
    }

    /// One of them.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        let key = ObjectRef::new(name).within(namespace);
        self.stores.iter().find_map(|store| store.get(&key))
    }

    /// Waits until something has changed since the last call. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            // The watch has ended, and nothing changes any more.
            std::future::pending().await
        }
    }

    /// Why the cluster is not heard now, if it is not.
    pub fn failure(&self) -> Option<Arc<str>> {
        self.failure.lock().clone()
    }

    /// Whether every namespace has been listed once.
    pub fn is_synced(&self) -> bool {
        use futures_util::FutureExt;
        self.stores.iter().all(|store| store.wait_until_ready().now_or_never().is_some())
    }
}
