//! Informers: one watch per kind and namespace, indexed by name and by labels, so that a thousand routes do not need a
//! thousand connections to the API server. A set-based selector cannot be indexed and has a filtered watch of its own.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Weak},
};

use kube::{
    ResourceExt,
    runtime::{
        reflector::{ObjectRef, Store},
        watcher,
    },
};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    Cluster, Watched,
    watch::{StoreChange, Watchable},
};

/// Selector of objects within a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum ObjectSelector {
    /// The object with this name.
    Name(String),
    /// Objects with all of these labels.
    Labels(BTreeMap<String, String>),
    /// Objects matching a set-based selector (`a=b,c in (d, e)`).
    Selector(String),
}

/// Active informers of a kind.
pub(super) struct Informers<K: Watchable> {
    cluster: Cluster,
    /// Drops the unused fields of an object.
    trim: fn(&mut K),
    active: Mutex<ActiveWatches<K>>,
}

struct ActiveWatches<K: Watchable> {
    /// By namespace.
    indexed: HashMap<String, Weak<NamespaceIndex<K>>>,
    filtered: HashMap<(String, ObjectSelector), Weak<Watched<K>>>,
}

/// Current objects of a subset. The watch ends with the last subset that shares it.
pub(super) struct Subset<K: Watchable>(SubsetWatch<K>);

enum SubsetWatch<K: Watchable> {
    Filtered { objects: Watched<K>, _shared: Arc<Watched<K>> },
    Indexed { namespace: Arc<NamespaceIndex<K>>, key: IndexKey, changes: watch::Receiver<u64> },
}

/// All objects of a namespace, indexed.
struct NamespaceIndex<K: Watchable> {
    watched: Watched<K>,
    indexes: Arc<Mutex<Indexes<K>>>,
}

/// Location of a subset: which index, and the key values within it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct IndexKey {
    index: usize,
    values: String,
}

struct Indexes<K: Watchable> {
    /// By name.
    objects: HashMap<String, Arc<K>>,
    by_labels: Vec<LabelIndex<K>>,
}

/// Objects indexed by the values of some labels. There is one index per set of label keys; most selectors of an
/// installation use the same keys.
struct LabelIndex<K: Watchable> {
    /// Sorted label keys. Empty means the object name.
    keys: Vec<String>,
    buckets: HashMap<String, Partition<K>>,
}

/// Objects with equal values of the index keys.
struct Partition<K: Watchable> {
    objects: BTreeMap<String, Arc<K>>,
    changes: watch::Sender<u64>,
}

// === impl Informers ===

impl<K: Watchable> Informers<K> {
    pub(super) fn new(cluster: Cluster, trim: fn(&mut K)) -> Self {
        let active = Mutex::new(ActiveWatches { indexed: HashMap::new(), filtered: HashMap::new() });
        Self { cluster, trim, active }
    }

    /// Watches a subset for the lifetime of the result.
    pub(super) fn watch(&self, namespace: &str, select: ObjectSelector) -> Subset<K> {
        let mut active = self.active.lock();
        if let Some(key) = select.values() {
            let known = active.indexed.get(namespace).and_then(Weak::upgrade);
            let index = known.unwrap_or_else(|| {
                let index = Arc::new(NamespaceIndex::watch(&self.cluster, namespace, self.trim));
                active.indexed.retain(|_, index| index.strong_count() > 0);
                active.indexed.insert(namespace.to_owned(), Arc::downgrade(&index));
                index
            });
            return index.subset(key);
        }
        let key = (namespace.to_owned(), select);
        let known = active.filtered.get(&key).and_then(Weak::upgrade);
        Subset::filtered(known.unwrap_or_else(|| {
            let apis = vec![self.cluster.api(namespace)];
            let objects = Arc::new(self.cluster.watch_in(apis, key.1.config(), self.trim));
            active.filtered.retain(|_, objects| objects.strong_count() > 0);
            active.filtered.insert(key, Arc::downgrade(&objects));
            objects
        }))
    }
}

// === impl ObjectSelector ===

impl ObjectSelector {
    /// Parses a selector; equality-based ones become [`ObjectSelector::Labels`].
    pub(super) fn of(selector: &str) -> Self {
        let plain = |text: &str| !text.is_empty() && !text.contains(['=', '!', ' ', '(', ')']);
        let pairs = selector.split(',').map(|term| {
            let (key, value) = term.split_once('=')?;
            (plain(key) && (value.is_empty() || plain(value))).then(|| (key.to_owned(), value.to_owned()))
        });
        let pairs: Option<BTreeMap<_, _>> = pairs.collect();
        // A repeated key selects nothing, which a map cannot express.
        match pairs.filter(|pairs| pairs.len() == selector.split(',').count()) {
            Some(pairs) => Self::Labels(pairs),
            None => Self::Selector(selector.to_owned()),
        }
    }

    fn config(&self) -> watcher::Config {
        match self {
            Self::Selector(selector) => watcher::Config::default().labels(selector),
            Self::Name(_) | Self::Labels(_) => watcher::Config::default(),
        }
    }

    /// Returns the index keys and values, or `None` if the selection cannot be indexed.
    fn values(&self) -> Option<(Vec<String>, String)> {
        match self {
            Self::Name(name) => Some((Vec::new(), name.clone())),
            Self::Labels(labels) if !labels.is_empty() => {
                let values: Vec<_> = labels.values().map(String::as_str).collect();
                Some((labels.keys().cloned().collect(), values.join(",")))
            }
            // An empty label selector matches all objects of the namespace, so there are no keys to index.
            Self::Labels(_) | Self::Selector(_) => None,
        }
    }
}

/// Returns the values of an object under `keys`, if it has all. Label values cannot contain a comma.
fn values<K: Watchable>(object: &K, keys: &[String]) -> Option<String> {
    if keys.is_empty() {
        return object.meta().name.clone();
    }
    let labels = object.meta().labels.as_ref()?;
    let values: Option<Vec<_>> = keys.iter().map(|key| labels.get(key).map(String::as_str)).collect();
    Some(values?.join(","))
}

// === impl NamespaceIndex ===

impl<K: Watchable> NamespaceIndex<K> {
    fn watch(cluster: &Cluster, namespace: &str, trim: fn(&mut K)) -> Self {
        let indexes = Arc::new(Mutex::new(Indexes { objects: HashMap::new(), by_labels: Vec::new() }));
        let indexes_in_watch = indexes.clone();
        let change =
            move |change: StoreChange<'_, K>, store: &Store<K>| indexes_in_watch.lock().apply(change, store);
        let all = watcher::Config::default();
        let watched = cluster.watch_with(vec![cluster.api(namespace)], all, trim, change);
        Self { watched, indexes }
    }

    fn subset(self: Arc<Self>, (keys, values): (Vec<String>, String)) -> Subset<K> {
        let mut indexes = self.indexes.lock();
        let key = IndexKey { index: indexes.index(keys), values };
        let changes = indexes.by_labels[key.index].bucket(&key.values).changes.subscribe();
        drop(indexes);
        Subset(SubsetWatch::Indexed { namespace: self, key, changes })
    }
}

// === impl Indexes ===

impl<K: Watchable> Indexes<K> {
    /// Returns the position of the index by these keys, building it if needed.
    fn index(&mut self, keys: Vec<String>) -> usize {
        if let Some(known) = self.by_labels.iter().position(|index| index.keys == keys) {
            return known;
        }
        let mut index = LabelIndex { keys, buckets: HashMap::new() };
        for (name, object) in &self.objects {
            index.insert(name, object);
        }
        self.by_labels.push(index);
        self.by_labels.len() - 1
    }

    fn apply(&mut self, change: StoreChange<'_, K>, store: &Store<K>) {
        match change {
            StoreChange::Object(object) => {
                self.remove(&object.name_any());
                // The object is absent if it was deleted.
                if let Some(object) = store.get(&ObjectRef::from_obj(object)) {
                    self.insert(object.name_any(), object);
                }
            }
            StoreChange::Listed => {
                let before: Vec<_> = self.objects.keys().cloned().collect();
                before.iter().for_each(|name| self.remove(name));
                for object in store.state() {
                    self.insert(object.name_any(), object);
                }
                // Notifies empty buckets as well: they are now known to be empty.
                self.by_labels.iter().for_each(LabelIndex::notify_all);
            }
            StoreChange::Failed => self.by_labels.iter().for_each(LabelIndex::notify_all),
        }
    }

    fn remove(&mut self, name: &str) {
        let Some(object) = self.objects.remove(name) else { return };
        self.by_labels.iter_mut().for_each(|index| index.remove(name, &object));
    }

    fn insert(&mut self, name: String, object: Arc<K>) {
        self.by_labels.iter_mut().for_each(|index| index.insert(&name, &object));
        self.objects.insert(name, object);
    }
}

// === impl LabelIndex ===

impl<K: Watchable> LabelIndex<K> {
    fn bucket(&mut self, values: &str) -> &mut Partition<K> {
        let new = || Partition { objects: BTreeMap::new(), changes: watch::Sender::new(0) };
        self.buckets.entry(values.to_owned()).or_insert_with(new)
    }

    fn insert(&mut self, name: &str, object: &Arc<K>) {
        let Some(values) = values(&**object, &self.keys) else { return };
        let bucket = self.bucket(&values);
        bucket.objects.insert(name.to_owned(), object.clone());
        bucket.notify();
    }

    fn remove(&mut self, name: &str, object: &K) {
        let Some(values) = values(object, &self.keys) else { return };
        let Some(bucket) = self.buckets.get_mut(&values) else { return };
        bucket.objects.remove(name);
        bucket.notify();
        if bucket.objects.is_empty() && bucket.changes.receiver_count() == 0 {
            self.buckets.remove(&values);
        }
    }

    fn notify_all(&self) {
        self.buckets.values().for_each(Partition::notify);
    }
}

// === impl Partition ===

impl<K: Watchable> Partition<K> {
    fn notify(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }
}

// === impl Subset ===

impl<K: Watchable> Subset<K> {
    fn filtered(shared: Arc<Watched<K>>) -> Self {
        Self(SubsetWatch::Filtered { objects: Watched::clone(&shared), _shared: shared })
    }

    /// Returns the current objects.
    pub(super) fn all(&self) -> Vec<Arc<K>> {
        match &self.0 {
            SubsetWatch::Filtered { objects, .. } => objects.all(),
            SubsetWatch::Indexed { namespace, key, .. } => {
                let indexes = namespace.indexes.lock();
                let bucket = indexes.by_labels[key.index].buckets.get(&key.values);
                bucket.map_or_else(Vec::new, |bucket| bucket.objects.values().cloned().collect())
            }
        }
    }

    /// Waits for a change since the last call. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        let changed = match &mut self.0 {
            SubsetWatch::Filtered { objects, .. } => return objects.changed().await,
            SubsetWatch::Indexed { changes, .. } => changes.changed().await,
        };
        if changed.is_err() {
            // The watch has ended: no change will follow.
            std::future::pending().await
        }
    }

    /// Returns the current failure of the watch.
    pub(super) fn failure(&self) -> Option<Arc<str>> {
        self.watched().failure()
    }

    /// Returns whether the initial list has completed.
    pub(super) fn is_synced(&self) -> bool {
        self.watched().is_synced()
    }

    fn watched(&self) -> &Watched<K> {
        match &self.0 {
            SubsetWatch::Filtered { objects, .. } => objects,
            SubsetWatch::Indexed { namespace, .. } => &namespace.watched,
        }
    }
}

impl<K: Watchable> Clone for Subset<K> {
    fn clone(&self) -> Self {
        Self(match &self.0 {
            SubsetWatch::Filtered { objects, _shared } => {
                SubsetWatch::Filtered { objects: objects.clone(), _shared: _shared.clone() }
            }
            SubsetWatch::Indexed { namespace, key, changes } => {
                let (namespace, key, changes) = (namespace.clone(), key.clone(), changes.clone());
                SubsetWatch::Indexed { namespace, key, changes }
            }
        })
    }
}

impl<K: Watchable> Drop for Subset<K> {
    fn drop(&mut self) {
        let SubsetWatch::Indexed { namespace, key, .. } = &self.0 else { return };
        let mut indexes = namespace.indexes.lock();
        let buckets = &mut indexes.by_labels[key.index].buckets;
        // This is the last receiver of the bucket.
        if buckets
            .get(&key.values)
            .is_some_and(|bucket| bucket.objects.is_empty() && bucket.changes.receiver_count() <= 1)
        {
            buckets.remove(&key.values);
        }
    }
}

#[cfg(test)]
mod tests;
