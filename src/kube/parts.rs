//! Parts of a kind: the objects that one target is about, out of those of its namespace.
//!
//! A few have a watch each, for which the API server chooses the objects, so that a proxy with a few routes hears nothing
//! of the rest of a namespace. With [`OWN`] of them in a namespace there is one watch of all its objects for all further
//! ones, and they are told apart here: a thousand routes are not a thousand connections to the API server.

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
    watch::{Heard, Watchable},
};

/// Which objects of a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Select {
    /// The one with this name.
    Name(String),
    /// Those with these labels.
    Labels(BTreeMap<String, String>),
    /// Those that this selector of labels means (`a=b,c in (d, e)`). It always has a watch of its own.
    Selector(String),
}

/// The parts of a kind that somebody wants.
pub(super) struct Parts<K: Watchable> {
    cluster: Cluster,
    /// Leaves of each object what is wanted.
    trim: fn(&mut K),
    inner: Mutex<Inner<K>>,
}

struct Inner<K: Watchable> {
    own: HashMap<(String, Select), Weak<Watched<K>>>,
    whole: HashMap<String, Weak<Whole<K>>>,
}

/// Some objects, as they are known now. Their watch ends with the last of those who share it.
pub(super) struct Part<K: Watchable>(Source<K>);

enum Source<K: Watchable> {
    Own { objects: Watched<K>, _shared: Arc<Watched<K>> },
    Whole { whole: Arc<Whole<K>>, place: Place, changes: watch::Receiver<u64> },
}

/// All objects of a namespace, told apart.
struct Whole<K: Watchable> {
    watched: Watched<K>,
    told_apart: Arc<Mutex<ToldApart<K>>>,
}

/// Where a part lies: in which of the ways to tell objects apart, and under which values.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    way: usize,
    values: String,
}

struct ToldApart<K: Watchable> {
    /// By their name.
    objects: HashMap<String, Arc<K>>,
    ways: Vec<Way<K>>,
}

/// Objects by what they have under some keys. As many as there are sets of keys, which are few: most selectors of an
/// installation have the same ones.
struct Way<K: Watchable> {
    /// Of labels, sorted; none: the name.
    keys: Vec<String>,
    piles: HashMap<String, Pile<K>>,
}

/// Those that have the same values.
struct Pile<K: Watchable> {
    objects: BTreeMap<String, Arc<K>>,
    changes: watch::Sender<u64>,
}

/// How many parts of a namespace have a watch of their own.
pub(super) const OWN: usize = 16;

// === impl Parts ===

impl<K: Watchable> Parts<K> {
    pub(super) fn new(cluster: Cluster, trim: fn(&mut K)) -> Self {
        Self { cluster, trim, inner: Mutex::new(Inner { own: HashMap::new(), whole: HashMap::new() }) }
    }

    /// Watches a part, as long as the result lives.
    pub(super) fn watch(&self, namespace: &str, select: Select) -> Part<K> {
        let mut inner = self.inner.lock();
        let key = (namespace.to_owned(), select);
        if let Some(shared) = inner.own.get(&key).and_then(Weak::upgrade) {
            return Part::own(shared);
        }
        inner.own.retain(|_, shared| shared.strong_count() > 0);
        inner.whole.retain(|_, whole| whole.strong_count() > 0);
        let (namespace, select) = key;
        let whole = inner.whole.get(&namespace).and_then(Weak::upgrade);
        let is_full = || inner.own.keys().filter(|(other, _)| *other == namespace).count() >= OWN;
        if let Some(place) = select.values().filter(|_| whole.is_some() || is_full()) {
            let whole = whole.unwrap_or_else(|| {
                let whole = Arc::new(Whole::watch(&self.cluster, &namespace, self.trim));
                inner.whole.insert(namespace, Arc::downgrade(&whole));
                whole
            });
            return whole.part(place);
        }
        let objects = self.cluster.watch_in(vec![self.cluster.api(&namespace)], select.config(), self.trim);
        let shared = Arc::new(objects);
        inner.own.insert((namespace, select), Arc::downgrade(&shared));
        Part::own(shared)
    }
}

// === impl Select ===

impl Select {
    /// What a selector means, if that is nothing but values of labels.
    pub(super) fn of(selector: &str) -> Self {
        let plain = |text: &str| !text.is_empty() && !text.contains(['=', '!', ' ', '(', ')']);
        let pairs = selector.split(',').map(|term| {
            let (key, value) = term.split_once('=')?;
            (plain(key) && (value.is_empty() || plain(value))).then(|| (key.to_owned(), value.to_owned()))
        });
        let pairs: Option<BTreeMap<_, _>> = pairs.collect();
        // A key with two values selects nothing, which a map does not say.
        match pairs.filter(|pairs| pairs.len() == selector.split(',').count()) {
            Some(pairs) => Self::Labels(pairs),
            None => Self::Selector(selector.to_owned()),
        }
    }

    fn config(&self) -> watcher::Config {
        let config = watcher::Config::default();
        match self {
            Self::Name(name) => config.fields(&format!("metadata.name={name}")),
            Self::Labels(labels) => {
                let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
                config.labels(&labels.join(","))
            }
            Self::Selector(selector) => config.labels(selector),
        }
    }

    /// The keys that it looks at, and the values that it wants there, if that is all there is to it.
    fn values(&self) -> Option<(Vec<String>, String)> {
        match self {
            Self::Name(name) => Some((Vec::new(), name.clone())),
            Self::Labels(labels) if !labels.is_empty() => {
                let values: Vec<_> = labels.values().map(String::as_str).collect();
                Some((labels.keys().cloned().collect(), values.join(",")))
            }
            Self::Labels(_) | Self::Selector(_) => None,
        }
    }
}

/// What an object has under these keys, if it has all. No value of a label has a comma.
fn values<K: Watchable>(object: &K, keys: &[String]) -> Option<String> {
    if keys.is_empty() {
        return object.meta().name.clone();
    }
    let labels = object.meta().labels.as_ref()?;
    let values: Option<Vec<_>> = keys.iter().map(|key| labels.get(key).map(String::as_str)).collect();
    Some(values?.join(","))
}

// === impl Whole ===

impl<K: Watchable> Whole<K> {
    fn watch(cluster: &Cluster, namespace: &str, trim: fn(&mut K)) -> Self {
        let told_apart = Arc::new(Mutex::new(ToldApart { objects: HashMap::new(), ways: Vec::new() }));
        let telling = told_apart.clone();
        let heard = move |heard: Heard<'_, K>, store: &Store<K>| telling.lock().hear(heard, store);
        let all = watcher::Config::default();
        let watched = cluster.watch_heard(vec![cluster.api(namespace)], all, trim, heard);
        Self { watched, told_apart }
    }

    fn part(self: Arc<Self>, (keys, values): (Vec<String>, String)) -> Part<K> {
        let mut told_apart = self.told_apart.lock();
        let place = Place { way: told_apart.way(keys), values };
        let changes = told_apart.ways[place.way].pile(&place.values).changes.subscribe();
        drop(told_apart);
        Part(Source::Whole { whole: self, place, changes })
    }
}

// === impl ToldApart ===

impl<K: Watchable> ToldApart<K> {
    /// The way that tells objects apart by these keys.
    fn way(&mut self, keys: Vec<String>) -> usize {
        if let Some(known) = self.ways.iter().position(|way| way.keys == keys) {
            return known;
        }
        let mut way = Way { keys, piles: HashMap::new() };
        for (name, object) in &self.objects {
            way.put(name, object);
        }
        self.ways.push(way);
        self.ways.len() - 1
    }

    fn hear(&mut self, heard: Heard<'_, K>, store: &Store<K>) {
        match heard {
            Heard::One(object) => {
                self.take(&object.name_any());
                // It is there no more if it was deleted.
                if let Some(object) = store.get(&ObjectRef::from_obj(object)) {
                    self.put(object.name_any(), object);
                }
            }
            Heard::All => {
                let before: Vec<_> = self.objects.keys().cloned().collect();
                before.iter().for_each(|name| self.take(name));
                for object in store.state() {
                    self.put(object.name_any(), object);
                }
                // Also who has none: now that is known.
                self.ways.iter().for_each(Way::tell_all);
            }
            Heard::Failure => self.ways.iter().for_each(Way::tell_all),
        }
    }

    fn take(&mut self, name: &str) {
        let Some(object) = self.objects.remove(name) else { return };
        self.ways.iter_mut().for_each(|way| way.take(name, &object));
    }

    fn put(&mut self, name: String, object: Arc<K>) {
        self.ways.iter_mut().for_each(|way| way.put(&name, &object));
        self.objects.insert(name, object);
    }
}

// === impl Way ===

impl<K: Watchable> Way<K> {
    fn pile(&mut self, values: &str) -> &mut Pile<K> {
        let new = || Pile { objects: BTreeMap::new(), changes: watch::Sender::new(0) };
        self.piles.entry(values.to_owned()).or_insert_with(new)
    }

    fn put(&mut self, name: &str, object: &Arc<K>) {
        let Some(values) = values(&**object, &self.keys) else { return };
        let pile = self.pile(&values);
        pile.objects.insert(name.to_owned(), object.clone());
        pile.tell();
    }

    fn take(&mut self, name: &str, object: &K) {
        let Some(values) = values(object, &self.keys) else { return };
        let Some(pile) = self.piles.get_mut(&values) else { return };
        pile.objects.remove(name);
        pile.tell();
        if pile.objects.is_empty() && pile.changes.receiver_count() == 0 {
            self.piles.remove(&values);
        }
    }

    fn tell_all(&self) {
        self.piles.values().for_each(Pile::tell);
    }
}

// === impl Pile ===

impl<K: Watchable> Pile<K> {
    fn tell(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }
}

// === impl Part ===

impl<K: Watchable> Part<K> {
    fn own(shared: Arc<Watched<K>>) -> Self {
        Self(Source::Own { objects: Watched::clone(&shared), _shared: shared })
    }

    /// The objects that are known now.
    pub(super) fn all(&self) -> Vec<Arc<K>> {
        match &self.0 {
            Source::Own { objects, .. } => objects.all(),
            Source::Whole { whole, place, .. } => {
                let told_apart = whole.told_apart.lock();
                let pile = told_apart.ways[place.way].piles.get(&place.values);
                pile.map_or_else(Vec::new, |pile| pile.objects.values().cloned().collect())
            }
        }
    }

    /// Waits until something has changed since the last call. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        let changed = match &mut self.0 {
            Source::Own { objects, .. } => return objects.changed().await,
            Source::Whole { changes, .. } => changes.changed().await,
        };
        if changed.is_err() {
            // The watch has ended, and nothing changes any more.
            std::future::pending().await
        }
    }

    /// Why the cluster is not heard now, if it is not.
    pub(super) fn failure(&self) -> Option<Arc<str>> {
        self.watched().failure()
    }

    /// Whether all that there are have been listed once.
    pub(super) fn is_synced(&self) -> bool {
        self.watched().is_synced()
    }

    fn watched(&self) -> &Watched<K> {
        match &self.0 {
            Source::Own { objects, .. } => objects,
            Source::Whole { whole, .. } => &whole.watched,
        }
    }
}

impl<K: Watchable> Clone for Part<K> {
    fn clone(&self) -> Self {
        Self(match &self.0 {
            Source::Own { objects, _shared } => {
                Source::Own { objects: objects.clone(), _shared: _shared.clone() }
            }
            Source::Whole { whole, place, changes } => {
                Source::Whole { whole: whole.clone(), place: place.clone(), changes: changes.clone() }
            }
        })
    }
}

impl<K: Watchable> Drop for Part<K> {
    fn drop(&mut self) {
        let Source::Whole { whole, place, .. } = &self.0 else { return };
        let mut told_apart = whole.told_apart.lock();
        let piles = &mut told_apart.ways[place.way].piles;
        // Ours is the last receiver: nobody else asks for these values.
        if piles
            .get(&place.values)
            .is_some_and(|pile| pile.objects.is_empty() && pile.changes.receiver_count() <= 1)
        {
            piles.remove(&place.values);
        }
    }
}

#[cfg(test)]
mod tests;
