//! A kind of objects, kept up to date.

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
        utils::Backoff,
        watcher::{self, watcher},
    },
};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use std::hash::Hash;
use tokio::{sync::watch, time::Instant};
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
    /// Whether the API server says that it has no such kind, for each store.
    absences: Arc<[Arc<AtomicBool>]>,
    _ends: Arc<DropGuard>,
}

/// How well the cluster is heard.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hearing {
    Well,
    /// It has no such kind: its definition is not installed, or not yet.
    Absent,
    Badly,
    /// The client says so, and when it is over.
    Lost,
}

/// What can be listed, and kept as it is known.
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

/// What can be watched in the served namespaces, by its type alone.
pub trait Watchable: Storable + Resource<DynamicType = (), Scope = NamespaceResourceScope> {}

impl<K> Watchable for K where K: Storable + Resource<DynamicType = (), Scope = NamespaceResourceScope> {}

/// What a watch has heard, when its store has it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Heard<'a, K> {
    /// This object has changed, or is gone.
    One(&'a K),
    /// All objects have been listed.
    All,
    /// It is heard no more, or why not is new.
    Failure,
}

/// How soon a watch that has broken begins again. The longest pause is what requests may be held for in vain once the
/// API server is back; kube's own goes up to a minute.
pub(super) struct Pauses {
    next: Duration,
    last: Option<Instant>,
}

/// An error and what caused it, in one line: kube keeps the causes of a lost connection apart.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |error| error.source()) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Whether a watch was lost that goes on where it was as soon as the API server is heard again. The client says so, and
/// when that is: the watch itself says nothing before something changes.
pub(super) fn is_taken_up_again(error: &watcher::Error) -> bool {
    use watcher::Error::{WatchFailed, WatchStartFailed};
    matches!(error, WatchStartFailed(cause) | WatchFailed(cause) if !matches!(cause, kube::Error::Api(_)))
}

/// Whether the API server says that it has no such kind.
fn is_absence(error: &watcher::Error) -> bool {
    let watcher::Error::InitialListFailed(kube::Error::Api(status)) = error else { return false };
    status.code == 404
}

// === impl Pauses ===

impl Pauses {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(3);
    /// A watch that begins again says nothing until something changes; after so long without a failure, it has.
    const FORGIVEN: Duration = Duration::from_secs(60);

    /// Of one watch.
    pub(super) const fn new() -> Self {
        Self { next: Self::FIRST, last: None }
    }
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.last.replace(Instant::now()).is_some_and(|last| last.elapsed() >= Self::FORGIVEN) {
            self.next = Self::FIRST;
        }
        let pause = self.next;
        self.next = Self::LONGEST.min(pause * 2);
        // Replicas that lost it at the same moment do not come back in the same moment.
        Some(pause.mul_f64(1.0 + fastrand::f64()))
    }
}

impl Backoff for Pauses {
    /// Called with every event. That a list is about to be asked for is one, too: what fails to be listed, such as a kind
    /// that is not there, would be asked for several times a second for ever.
    fn reset(&mut self) {}
}

// === impl Cluster ===

impl Cluster {
    /// Watches all objects of a kind in the served namespaces, `config` narrowing it down. What the cluster says of who
    /// manages which field is thrown away: it is most of an object.
    pub fn watch<K>(&self, config: watcher::Config) -> Watched<K>
    where
        K: Storable + Resource<Scope = NamespaceResourceScope>,
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
        K: Storable,
    {
        self.watch_heard(apis, config, trim, |_, _| {})
    }

    /// As [`Self::watch_in`], and says what is heard, before [`Watched::changed`] does.
    pub(super) fn watch_heard<K>(
        &self,
        apis: Vec<Api<K>>,
        config: watcher::Config,
        trim: impl Fn(&mut K) + Clone + Send + 'static,
        heard: impl Fn(Heard<'_, K>, &Store<K>) + Clone + Send + 'static,
    ) -> Watched<K>
    where
        K: Storable,
    {
        let (changed, changes) = watch::channel(0);
        let failure = Arc::<Mutex<Option<Arc<str>>>>::default();
        let ending = CancellationToken::new();
        let mut absences = Vec::new();
        let stores = apis.into_iter().map(|api| {
            let (reader, writer) = store();
            let (changed, trim, heard) = (changed.clone(), trim.clone(), heard.clone());
            let store = reader.clone();
            let events = watcher(api, config.clone()).backoff(Pauses::new()).modify(move |object| {
                let meta: &mut ObjectMeta = object.meta_mut();
                meta.managed_fields = None;
                trim(object);
            });
            let kind = K::kind(&K::DynamicType::default()).into_owned();
            let (last_failure, absent) = (failure.clone(), Arc::<AtomicBool>::default());
            absences.push(absent.clone());
            let following = async move {
                let mut events = std::pin::pin!(kube::runtime::reflector(writer, events));
                let mut hearing = Hearing::Well;
                while let Some(event) = events.next().await {
                    let now = match &event {
                        Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => continue,
                        Ok(_) => Hearing::Well,
                        Err(error) if is_taken_up_again(error) => Hearing::Lost,
                        Err(error) if is_absence(error) => Hearing::Absent,
                        Err(_) => Hearing::Badly,
                    };
                    let before = std::mem::replace(&mut hearing, now);
                    match event {
                        Ok(event) => {
                            if before != Hearing::Well {
                                match before {
                                    Hearing::Absent => tracing::info!(kind, "the cluster has this kind now"),
                                    Hearing::Badly => tracing::info!(kind, "the cluster is heard again"),
                                    Hearing::Lost | Hearing::Well => {}
                                }
                                absent.store(false, Ordering::Relaxed);
                                *last_failure.lock() = None;
                            }
                            match &event {
                                watcher::Event::Apply(object) | watcher::Event::Delete(object) => {
                                    heard(Heard::One(object), &store);
                                }
                                _ => heard(Heard::All, &store),
                            }
                        }
                        // It is tried again with a growing pause; said once, until it changes.
                        Err(_) if before == now => continue,
                        Err(error) => {
                            let error = chain(&error);
                            match now {
                                Hearing::Absent => tracing::info!(
                                    kind,
                                    "the cluster has no such kind; if it comes, it will be seen"
                                ),
                                Hearing::Badly => {
                                    tracing::warn!(
                                        kind,
                                        error,
                                        "the cluster is not heard: what was known stays"
                                    );
                                }
                                Hearing::Lost | Hearing::Well => {}
                            }
                            absent.store(now == Hearing::Absent, Ordering::Relaxed);
                            *last_failure.lock() =
                                Some(format!("cannot watch {kind} objects: {error}").into());
                            heard(Heard::Failure, &store);
                        }
                    }
                    changed.send_modify(|changes| *changes += 1);
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
        let stores = stores.collect();
        Watched { stores, absences: absences.into(), changes, failure, _ends: Arc::new(ending.drop_guard()) }
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

    /// Whether it is known what there is: every namespace has been listed once, or the cluster has no such kind.
    pub fn is_settled(&self) -> bool {
        use futures_util::FutureExt;
        let listed = |store: &Store<K>| store.wait_until_ready().now_or_never().is_some();
        let mut both = self.stores.iter().zip(self.absences.iter());
        both.all(|(store, absent)| listed(store) || absent.load(Ordering::Relaxed))
    }

    /// Whether every namespace has been listed once.
    pub fn is_synced(&self) -> bool {
        use futures_util::FutureExt;
        self.stores.iter().all(|store| store.wait_until_ready().now_or_never().is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_broke_begins_again_soon_however_often_it_breaks() {
        let mut pauses = Pauses::new();
        // 200 ms doubling to 3 s, and up to as much again by chance.
        for most in [400, 800, 1600, 3200, 6000, 6000, 6000] {
            let pause = pauses.next().unwrap().as_millis();
            assert!((most / 2..=most).contains(&pause), "{pause} of {most} ms");
            // The next list is about to be asked for, and fails as well.
            pauses.reset();
        }
        tokio::time::advance(Duration::from_secs(61)).await;
        assert!(pauses.next().unwrap().as_millis() <= 400);
    }

    #[test]
    fn an_error_says_what_caused_it_and_nothing_twice() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let error = watcher::Error::WatchStartFailed(kube::Error::Service(Box::new(refused)));
        let text = chain(&error);
        assert_eq!(text.matches("connection refused").count(), 1, "{text}");
    }
}
