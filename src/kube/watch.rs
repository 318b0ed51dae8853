//! Informers: reflector stores for one kind, with change notification and failure state.

use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use kube::{
    Api, Resource,
    api::ObjectMeta,
    core::NamespaceResourceScope,
    runtime::{
        WatchStreamExt,
        reflector::{Lookup, ObjectRef, Store, store},
        watcher::{self, watcher},
    },
};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use std::hash::Hash;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Cluster, error_chain::error_chain};
use crate::domain::Backoff;

/// Current objects of a kind in one or several namespaces. The watch ends with the last clone. Objects remain available
/// while the API server is unreachable.
#[derive(Clone)]
pub struct Watched<K: Lookup<DynamicType: Default + Eq + Hash + Clone> + Clone + 'static> {
    stores: Arc<[Store<K>]>,
    /// Incremented with every change.
    changes: watch::Receiver<u64>,
    failure: Arc<Mutex<Option<Arc<str>>>>,
    /// Per store: whether the API server does not know the kind.
    kind_missing: Arc<[Arc<AtomicBool>]>,
    _cancel: Arc<DropGuard>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum WatchState {
    Healthy,
    /// The API server does not know the kind: its definition is not installed (yet).
    KindMissing,
    Failed,
    /// Interrupted; reported by [`super::Liveness`].
    Interrupted,
}

/// A kind that can be kept in a store.
pub trait Storable:
    Resource<DynamicType: Default + Eq + Hash + Clone + Send + Sync + Unpin>
    + Clone
    + Debug
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
}

impl<K> Storable for K where
    K: Resource<DynamicType: Default + Eq + Hash + Clone + Send + Sync + Unpin>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static
{
}

/// A namespaced kind that can be watched by its type alone.
pub trait Watchable: Storable + Resource<DynamicType = (), Scope = NamespaceResourceScope> {}

impl<K> Watchable for K where K: Storable + Resource<DynamicType = (), Scope = NamespaceResourceScope> {}

/// A change of a store, passed to callbacks after the store has applied it.
#[derive(Clone, Copy, Debug)]
pub(super) enum StoreChange<'a, K> {
    /// An object was applied or deleted.
    Object(&'a K),
    /// The initial list, or a relist, is complete.
    Listed,
    /// The watch failed, or failed for a new reason.
    Failed,
}

/// Backoff of a failed watch. The maximum bounds how long requests are held needlessly after an outage of the API
/// server; the default of kube is a minute.
pub(super) struct WatchBackoff {
    backoff: Backoff,
    last: Option<Instant>,
}

/// Returns whether the watcher resumes the watch by itself from where it was interrupted. The client reports both the
/// loss and the recovery; the watcher itself is silent until the next change.
pub(super) fn is_resumed(error: &watcher::Error) -> bool {
    use watcher::Error::{WatchFailed, WatchStartFailed};
    matches!(error, WatchStartFailed(cause) | WatchFailed(cause) if !matches!(cause, kube::Error::Api(_)))
}

/// Returns whether the API server does not know the kind.
fn is_kind_missing(error: &watcher::Error) -> bool {
    let watcher::Error::InitialListFailed(kube::Error::Api(status)) = error else { return false };
    status.code == 404
}

// === impl WatchBackoff ===

impl WatchBackoff {
    const MIN_DELAY: Duration = Duration::from_millis(200);
    const MAX_DELAY: Duration = Duration::from_secs(3);
    /// A resumed watch yields no event until a change; after this long without a failure it counts as healthy.
    const RESET_AFTER: Duration = Duration::from_secs(60);

    /// Starts with the shortest delay.
    pub(super) fn new() -> Self {
        let backoff = Backoff::new(Self::MIN_DELAY, Self::MAX_DELAY);
        Self { backoff: backoff.with_jitter(fastrand::u64(..)), last: None }
    }
}

impl Iterator for WatchBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.last.replace(Instant::now()).is_some_and(|last| last.elapsed() >= Self::RESET_AFTER) {
            self.backoff.reset();
        }
        Some(self.backoff.failed())
    }
}

impl kube::runtime::utils::Backoff for WatchBackoff {
    /// Does nothing: kube calls this with every event, including the start of a list. A list that keeps failing, as for
    /// a missing kind, would otherwise be retried several times a second.
    fn reset(&mut self) {}
}

// === impl Cluster ===

impl Cluster {
    /// Watches the objects of a kind in the served namespaces, restricted by `config`. Managed fields are dropped: they
    /// make up most of an object.
    pub fn watch<K>(&self, config: watcher::Config) -> Watched<K>
    where
        K: Storable + Resource<Scope = NamespaceResourceScope>,
    {
        self.watch_in(self.apis(), config, |_| {})
    }

    /// Like [`Self::watch`], for the given APIs. `trim` drops unused fields before an object is stored.
    pub fn watch_in<K>(
        &self,
        apis: Vec<Api<K>>,
        config: watcher::Config,
        trim: impl Fn(&mut K) + Clone + Send + 'static,
    ) -> Watched<K>
    where
        K: Storable,
    {
        self.watch_with(apis, config, trim, |_, _| {})
    }

    /// Like [`Self::watch_in`], with a callback that runs before [`Watched::changed`] is notified.
    pub(super) fn watch_with<K>(
        &self,
        apis: Vec<Api<K>>,
        config: watcher::Config,
        trim: impl Fn(&mut K) + Clone + Send + 'static,
        on_change: impl Fn(StoreChange<'_, K>, &Store<K>) + Clone + Send + 'static,
    ) -> Watched<K>
    where
        K: Storable,
    {
        let (changed, changes) = watch::channel(0);
        let failure = Arc::<Mutex<Option<Arc<str>>>>::default();
        let cancel = CancellationToken::new();
        let mut kind_missing = Vec::new();
        let stores = apis.into_iter().map(|api| {
            let (reader, writer) = store();
            let (changed, trim, on_change) = (changed.clone(), trim.clone(), on_change.clone());
            let store = reader.clone();
            let events = watcher(api, config.clone()).backoff(WatchBackoff::new()).modify(move |object| {
                let meta: &mut ObjectMeta = object.meta_mut();
                meta.managed_fields = None;
                trim(object);
            });
            let kind = K::kind(&K::DynamicType::default()).into_owned();
            let (last_failure, missing) = (failure.clone(), Arc::<AtomicBool>::default());
            kind_missing.push(missing.clone());
            let reflect = async move {
                let mut events = std::pin::pin!(kube::runtime::reflector(writer, events));
                let mut state = WatchState::Healthy;
                while let Some(event) = events.next().await {
                    let now = match &event {
                        Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => continue,
                        Ok(_) => WatchState::Healthy,
                        Err(error) if is_resumed(error) => WatchState::Interrupted,
                        Err(error) if is_kind_missing(error) => WatchState::KindMissing,
                        Err(_) => WatchState::Failed,
                    };
                    let before = std::mem::replace(&mut state, now);
                    match event {
                        Ok(event) => {
                            if before != WatchState::Healthy {
                                match before {
                                    WatchState::KindMissing => {
                                        tracing::info!(kind, "kind is now available; watching")
                                    }
                                    WatchState::Failed => tracing::info!(kind, "watch recovered"),
                                    WatchState::Interrupted | WatchState::Healthy => {}
                                }
                                missing.store(false, Ordering::Relaxed);
                                *last_failure.lock() = None;
                            }
                            match &event {
                                watcher::Event::Apply(object) | watcher::Event::Delete(object) => {
                                    on_change(StoreChange::Object(object), &store);
                                }
                                _ => on_change(StoreChange::Listed, &store),
                            }
                        }
                        // The watcher retries with backoff; log only state changes.
                        Err(_) if before == now => continue,
                        Err(error) => {
                            let error = error_chain(&error);
                            match now {
                                WatchState::KindMissing => tracing::info!(
                                    kind,
                                    "kind is not installed; watching for its installation"
                                ),
                                WatchState::Failed => {
                                    tracing::warn!(kind, error, "watch failed; keeping the last known state");
                                }
                                WatchState::Interrupted | WatchState::Healthy => {}
                            }
                            missing.store(now == WatchState::KindMissing, Ordering::Relaxed);
                            *last_failure.lock() =
                                Some(format!("cannot watch {kind} objects: {error}").into());
                            on_change(StoreChange::Failed, &store);
                        }
                    }
                    changed.send_modify(|changes| *changes += 1);
                }
            };
            let cancel = cancel.clone();
            self.spawn(async move {
                tokio::select! {
                    biased; // stop first: no reader is left
                    () = cancel.cancelled() => {}
                    () = reflect => {}
                }
            });
            reader
        });
        let stores = stores.collect();
        Watched {
            stores,
            kind_missing: kind_missing.into(),
            changes,
            failure,
            _cancel: Arc::new(cancel.drop_guard()),
        }
    }
}

// === impl Watched ===

impl<K: Lookup<DynamicType: Default + Eq + Hash + Clone> + Clone + 'static> Watched<K> {
    /// Returns the current objects.
    pub fn all(&self) -> Vec<Arc<K>> {
        self.stores.iter().flat_map(Store::state).collect()
    }

    /// Returns the object `namespace/name`.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        let key = ObjectRef::new(name).within(namespace);
        self.stores.iter().find_map(|store| store.get(&key))
    }

    /// Waits for a change since the last call. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            // The watch has ended: no change will follow.
            std::future::pending().await
        }
    }

    /// Returns the current failure of the watch.
    pub fn failure(&self) -> Option<Arc<str>> {
        self.failure.lock().clone()
    }

    /// Returns whether every namespace has been listed once, or the API server does not know the kind.
    pub fn is_settled(&self) -> bool {
        use futures_util::FutureExt;
        let listed = |store: &Store<K>| store.wait_until_ready().now_or_never().is_some();
        let mut both = self.stores.iter().zip(self.kind_missing.iter());
        both.all(|(store, missing)| listed(store) || missing.load(Ordering::Relaxed))
    }

    /// Returns whether every namespace has been listed once.
    pub fn is_synced(&self) -> bool {
        use futures_util::FutureExt;
        self.stores.iter().all(|store| store.wait_until_ready().now_or_never().is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn watch_backoff_grows_to_3_s_and_resets() {
        let mut pauses = WatchBackoff::new();
        for exact in [200, 400, 800, 1600, 3000, 3000, 3000] {
            let pause = pauses.next().unwrap().as_millis();
            assert!((exact * 4 / 5..=exact * 6 / 5).contains(&pause), "{pause} of {exact} ms");
            // The next list begins, and fails as well.
            kube::runtime::utils::Backoff::reset(&mut pauses);
        }
        tokio::time::advance(Duration::from_secs(61)).await;
        assert!(pauses.next().unwrap().as_millis() <= 240);
    }
}
