//! In-process API server for tests, without sockets, so that tests can pause the clock. Lists, watches, gets, creates
//! and patches arbitrary objects, and rejects patches with an outdated resource version.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{Method, Request, Response, StatusCode},
};
use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::Service;

use super::{Cluster, session::ApiServerClock};
use crate::config;

/// Generous limit of any wait.
const WAIT_TIMEOUT: Duration = Duration::from_secs(30);

/// Handle of the server.
#[derive(Clone, Default)]
pub(crate) struct FakeApiServer(Arc<Mutex<ServerState>>);

#[derive(Default)]
struct ServerState {
    version: u64,
    /// Objects by path, such as `/apis/keda.sh/v1alpha1/namespaces/a/scaledobjects/x`.
    objects: BTreeMap<String, Value>,
    /// Watches in order of their start, each removed at its timeout.
    watchers: BTreeMap<u64, FakeWatch>,
    next_watch: u64,
    /// Number of watches that clients read.
    watching: watch::Sender<usize>,
    /// Number of lists read, by collection.
    lists: HashMap<String, usize>,
    /// True while connections are refused.
    is_away: bool,
    /// Watches on half-open connections: no events, no end.
    half_open: Vec<FakeWatch>,
    unanswered: usize,
    /// All changes: version, path, event type and object.
    history: Vec<(u64, String, &'static str, Value)>,
    /// Container logs by pod path.
    logs: BTreeMap<String, ServedLog>,
    /// Changes made through the API: method and path.
    changes: Vec<(String, String)>,
    /// Forbidden requests: method, and a part of the path.
    forbidden: Vec<(&'static str, &'static str)>,
    /// Paths (parts) of objects whose fields belong to another manager.
    owned: Vec<&'static str>,
    /// Groups that are not installed, such as `keda.sh`.
    missing: Vec<&'static str>,
    /// Time reported in the `Date` header.
    clock: Option<ApiServerClock>,
}

struct FakeWatch {
    collection: String,
    selected: QuerySelector,
    events: Chunks,
}

/// Counts a watch while its client reads it.
struct WatchCount(watch::Sender<usize>);

struct QuerySelector {
    name: Option<String>,
    labels: Vec<(String, String)>,
}

#[derive(Default)]
struct ServedLog {
    text: String,
    readers: Vec<Chunks>,
}

type Chunks = mpsc::UnboundedSender<io::Result<Bytes>>;

type ApiResult = Result<Value, (StatusCode, String)>;

/// Known collections; without objects they are empty rather than missing.
const KINDS: [&str; 13] = [
    "configmaps",
    "services",
    "scaledobjects",
    "deployments",
    "statefulsets",
    "pods",
    "nodes",
    "endpointslices",
    "events",
    "modelroutes",
    "interceptorroutes",
    "horizontalpodautoscalers",
    "inferencepools",
];

// === impl FakeApiServer ===

impl FakeApiServer {
    pub(crate) fn client(&self) -> kube::Client {
        kube::Client::new(self.clone(), "default")
    }

    pub(crate) fn cluster(&self) -> Cluster {
        self.cluster_with(&config::Kubernetes::default())
    }

    pub(crate) fn cluster_with(&self, config: &config::Kubernetes) -> Cluster {
        Cluster::served_by(self.clone(), config)
    }

    /// Breaks all connections, and refuses new ones until [`Self::accept_connections`].
    pub(crate) async fn refuse_connections(&self) {
        {
            let mut inner = self.0.lock();
            inner.is_away = true;
            for (_, watcher) in std::mem::take(&mut inner.watchers) {
                let _ = watcher.events.send(Err(io::ErrorKind::ConnectionReset.into()));
            }
        }
        self.await_watch_count(0).await;
    }

    pub(crate) fn accept_connections(&self) {
        self.0.lock().is_away = false;
    }

    /// Waits until clients read `count` watches.
    pub(crate) async fn await_watch_count(&self, count: usize) {
        let mut watching = self.0.lock().watching.subscribe();
        let waited = timeout(WAIT_TIMEOUT, watching.wait_for(|open| *open == count)).await.map(drop);
        assert!(waited.is_ok(), "{} watches instead of {count}", *watching.borrow());
    }

    pub(crate) fn lists(&self, collection: &str) -> usize {
        self.0.lock().lists.get(collection).copied().unwrap_or(0)
    }

    /// Makes all current watches half-open: no further events, and no end.
    pub(crate) fn make_watches_half_open(&self) {
        let mut inner = self.0.lock();
        let watchers = std::mem::take(&mut inner.watchers);
        inner.half_open.extend(watchers.into_values());
    }

    /// Leaves the next `requests` requests without an answer.
    pub(crate) fn leave_unanswered(&self, requests: usize) {
        self.0.lock().unanswered = requests;
    }

    /// Creates or replaces an object, as another client would.
    pub(crate) fn put(&self, path: &str, object: Value) {
        self.0.lock().put(path, object);
    }

    /// Like [`Self::put`], in a collection such as `/api/v1/namespaces/ml/pods`.
    pub(crate) fn put_in(&self, collection: &str, object: Value) {
        let path = format!("{collection}/{}", object["metadata"]["name"].as_str().unwrap());
        self.put(&path, object);
    }

    pub(crate) fn remove(&self, path: &str) {
        let mut inner = self.0.lock();
        inner.version += 1;
        let mut object = inner.objects.remove(path).unwrap();
        object["metadata"]["resourceVersion"] = inner.version.to_string().into();
        inner.notify(path, "DELETED", &object);
    }

    /// Appends to the log of the pod at `path`.
    pub(crate) fn append_log(&self, path: &str, text: &str) {
        let mut inner = self.0.lock();
        let log = inner.logs.entry(path.into()).or_default();
        log.text.push_str(text);
        log.readers.retain(|reader| reader.send(Ok(text.to_owned().into())).is_ok());
    }

    /// Begins the log of a new container run; current readers keep the previous one.
    pub(crate) fn restart_log(&self, path: &str) {
        self.0.lock().logs.remove(path);
    }

    pub(crate) fn object(&self, path: &str) -> Value {
        self.0.lock().objects.get(path).cloned().unwrap_or_default()
    }

    /// Returns the objects whose path contains `part`.
    pub(crate) fn objects(&self, part: &str) -> Vec<Value> {
        self.0
            .lock()
            .objects
            .iter()
            .filter(|(path, _)| path.contains(part))
            .map(|(_, object)| object.clone())
            .collect()
    }

    pub(crate) fn changes(&self) -> Vec<(String, String)> {
        self.0.lock().changes.clone()
    }

    pub(crate) fn forbid(&self, method: &'static str, part: &'static str) {
        self.0.lock().forbidden.push((method, part));
    }

    pub(crate) fn allow_all(&self) {
        self.0.lock().forbidden.clear();
    }

    /// Makes patches of matching objects conflict with another field manager.
    pub(crate) fn take_field_ownership(&self, part: &'static str) {
        self.0.lock().owned.push(part);
    }

    pub(crate) fn uninstall_group(&self, group: &'static str) {
        self.0.lock().missing.push(group);
    }

    pub(crate) fn install_all_groups(&self) {
        self.0.lock().missing.clear();
    }

    pub(crate) fn set_clock(&self, clock: ApiServerClock) {
        self.0.lock().clock = Some(clock);
    }

    async fn answer(self, request: Request<kube::client::Body>) -> io::Result<Response<Body>> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let is_swallowed = {
            let unanswered = &mut self.0.lock().unanswered;
            let is_swallowed = *unanswered > 0;
            *unanswered = unanswered.saturating_sub(1);
            is_swallowed
        };
        if is_swallowed {
            std::future::pending::<()>().await;
        }
        let mut inner = self.0.lock();
        if inner.is_away {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let query = head.uri.query().unwrap_or_default();
        let path = head.uri.path();
        let date = inner.clock.map(|clock| {
            jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&clock.now()).unwrap()
        });
        let mut response = Response::builder();
        if let Some(date) = date {
            response = response.header("date", date);
        }
        if query.split('&').any(|pair| pair == "watch=true" || pair == "watch=1") {
            return Ok(response.body(inner.watch(&self, path, query)).unwrap());
        }
        if let Some(pod) = path.strip_suffix("/log").filter(|_| !inner.is_forbidden(&head.method, path)) {
            return Ok(response.body(inner.read_log(pod)).unwrap());
        }
        let (status, value) = match inner.answer(&head.method, path, query, &body) {
            Ok(value) => (StatusCode::OK, value),
            Err((status, message)) => (
                status,
                json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message,
                    "reason": status.canonical_reason().unwrap_or_default().replace(' ', ""), "code": status.as_u16() }),
            ),
        };
        Ok(response.status(status).body(value.to_string().into()).unwrap())
    }
}

impl Service<Request<kube::client::Body>> for FakeApiServer {
    type Response = Response<Body>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<kube::client::Body>) -> Self::Future {
        self.clone().answer(request).boxed()
    }
}

// === impl ServerState ===

impl ServerState {
    fn answer(&mut self, method: &Method, path: &str, query: &str, body: &[u8]) -> ApiResult {
        if path == "/version" {
            return Ok(json!({ "major": "1", "minor": "37" }));
        }
        if self.is_forbidden(method, path) {
            return Err((StatusCode::FORBIDDEN, "User \"x\" cannot do that".into()));
        }
        let not_found =
            || (StatusCode::NOT_FOUND, "the server could not find the requested resource".to_owned());
        if self.missing.iter().any(|group| path.contains(group)) {
            return Err(not_found());
        }
        let (plain, is_scale) = path.strip_suffix("/scale").map_or((path, false), |plain| (plain, true));
        let plain = plain.strip_suffix("/status").unwrap_or(plain);
        let last = plain.rsplit('/').next().unwrap_or_default();
        if method == Method::GET && KINDS.contains(&last) {
            *self.lists.entry(plain.to_owned()).or_default() += 1;
            return Ok(self.list(plain, query));
        }
        if method == Method::GET && plain.matches('/').count() == 3 {
            return Ok(json!({ "kind": "APIResourceList", "groupVersion": &plain[6..], "resources": [] }));
        }
        if method == Method::POST {
            let object: Value = serde_json::from_slice(body).unwrap();
            let name = object["metadata"]["name"].as_str().unwrap();
            let path = format!("{plain}/{name}");
            if self.objects.contains_key(&path) {
                return Err((StatusCode::CONFLICT, "it exists already".into()));
            }
            self.changes.push((method.to_string(), path.clone()));
            return Ok(self.put(&path, object));
        }
        let mut object = self.objects.get(plain).cloned().ok_or_else(not_found)?;
        if method == Method::PATCH {
            let patch: Value = serde_json::from_slice(body).unwrap();
            if self.owned.iter().any(|part| path.contains(part)) && !query.contains("force=true") {
                return Err((StatusCode::CONFLICT, "conflict with \"somebody\"".into()));
            }
            let seen = &patch["metadata"]["resourceVersion"];
            if seen.is_string() && *seen != object["metadata"]["resourceVersion"] {
                return Err((StatusCode::CONFLICT, "the object has been modified".into()));
            }
            merge(&mut object, patch);
            self.changes.push((method.to_string(), path.to_owned()));
            object = self.put(plain, object);
        }
        if is_scale {
            return Ok(
                json!({ "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": object["metadata"],
                "spec": { "replicas": object["spec"]["replicas"] } }),
            );
        }
        Ok(object)
    }

    fn put(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let former = self.objects.insert(path.to_owned(), object.clone());
        self.notify(path, if former.is_some() { "MODIFIED" } else { "ADDED" }, &object);
        object
    }

    fn list(&self, collection: &str, query: &str) -> Value {
        let selected = QuerySelector::of(query);
        let items = self.objects.iter().filter(|(path, object)| selected.has(path, collection, object));
        let items: Vec<_> = items.map(|(_, object)| object).collect();
        json!({ "kind": "List", "apiVersion": "v1",
            "metadata": { "resourceVersion": self.version.to_string() }, "items": items })
    }

    fn is_forbidden(&self, method: &Method, path: &str) -> bool {
        self.forbidden.iter().any(|(forbidden, part)| method == forbidden && path.contains(part))
    }

    fn read_log(&mut self, pod: &str) -> Body {
        let (reader, body) = mpsc::unbounded_channel();
        let log = self.logs.entry(pod.to_owned()).or_default();
        let _ = reader.send(Ok(log.text.clone().into()));
        log.readers.push(reader);
        Body::from_stream(UnboundedReceiverStream::new(body))
    }

    fn watch(&mut self, server: &FakeApiServer, collection: &str, query: &str) -> Body {
        let (events, body) = mpsc::unbounded_channel();
        let number =
            |key: &str| query.split('&').find_map(|pair| pair.strip_prefix(key)?.parse::<u64>().ok());
        let watcher = FakeWatch { collection: collection.into(), selected: QuerySelector::of(query), events };
        let since = number("resourceVersion=").unwrap_or_default();
        for (_, path, kind, object) in self.history.iter().filter(|(version, ..)| *version > since) {
            watcher.notify(path, kind, object);
        }
        let end = Duration::from_secs(number("timeoutSeconds=").unwrap_or(290));
        self.next_watch += 1;
        let id = self.next_watch;
        self.watchers.insert(id, watcher);
        let server = server.clone();
        tokio::spawn(async move {
            tokio::time::sleep(end).await;
            server.0.lock().watchers.remove(&id);
        });
        self.watching.send_modify(|open| *open += 1);
        let count = WatchCount(self.watching.clone());
        Body::from_stream(UnboundedReceiverStream::new(body).inspect(move |_| {
            let _ = &count;
        }))
    }

    fn notify(&mut self, path: &str, kind: &'static str, object: &Value) {
        self.history.push((self.version, path.to_owned(), kind, object.clone()));
        self.watchers.retain(|_, watcher| watcher.notify(path, kind, object));
    }
}

// === impl WatchCount ===

impl Drop for WatchCount {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

// === impl FakeWatch ===

impl FakeWatch {
    /// Sends an event if selected. Returns whether the reader is still connected.
    fn notify(&self, path: &str, kind: &str, object: &Value) -> bool {
        let event = json!({ "type": kind, "object": object });
        !self.selected.has(path, &self.collection, object)
            || self.events.send(Ok(format!("{event}\n").into())).is_ok()
    }
}

// === impl QuerySelector ===

impl QuerySelector {
    fn of(query: &str) -> Self {
        let value = |key: &str| query.split('&').find_map(|pair| pair.strip_prefix(key));
        let labels = value("labelSelector=").unwrap_or_default();
        let labels = percent_encoding::percent_decode_str(labels).decode_utf8().unwrap();
        let labels = labels.split(',').filter_map(|term| term.split_once('='));
        Self {
            name: value("fieldSelector=metadata.name%3D").map(str::to_owned),
            labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        }
    }

    fn has(&self, path: &str, collection: &str, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        is_in_collection(path, collection, self.name.as_deref())
            && self.labels.iter().all(|(key, value)| labels[key] == **value)
    }
}

/// Returns whether the object at `path` belongs to `collection`, of one namespace or all.
fn is_in_collection(path: &str, collection: &str, name: Option<&str>) -> bool {
    let Some((of, last)) = path.rsplit_once('/') else { return false };
    let everywhere = match of.split_once("/namespaces/") {
        Some((group, rest)) => rest.split_once('/').map(|(_, kind)| format!("{group}/{kind}")),
        None => None,
    };
    (of == collection || everywhere.as_deref() == Some(collection)) && name.is_none_or(|name| name == last)
}

/// Applies a JSON merge patch (RFC 7386).
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        match value {
            Value::Null => drop(target.as_object_mut().unwrap().remove(&key)),
            value => merge(&mut target[key], value),
        }
    }
}
