//! Fake API server for tests that lists and watches arbitrary objects over real connections.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt;
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;

use super::Cluster;

/// Generous limit of any wait.
const WAIT_TIMEOUT: Duration = Duration::from_secs(30);

/// Handle of the server.
pub(super) struct FakeApi {
    address: SocketAddr,
    state: Arc<FakeServer>,
    serving: Mutex<CancellationToken>,
}

struct FakeServer {
    inner: Mutex<FakeObjects>,
    /// Number of open watches.
    watching: watch::Sender<usize>,
}

#[derive(Default)]
struct FakeObjects {
    version: u64,
    /// Objects by collection path and name.
    objects: HashMap<String, BTreeMap<String, Value>>,
    events: Vec<(u64, String, Value)>,
    watchers: Vec<FakeWatch>,
    lists: usize,
}

struct FakeWatch {
    path: String,
    selector: Selector,
    events: mpsc::UnboundedSender<Result<Frame<Bytes>, Infallible>>,
}

#[derive(Clone, Debug, Default)]
struct Selector {
    name: Option<String>,
    labels: Vec<(String, String)>,
}

/// Counts an open watch.
struct Open(Arc<FakeServer>);

// === impl FakeApi ===

impl FakeApi {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let state = Arc::new(FakeServer { inner: Mutex::default(), watching: watch::Sender::new(0) });
        let fake = Self { address: listener.local_addr().unwrap(), state, serving: Mutex::default() };
        fake.serve(listener);
        fake
    }

    /// Creates a cluster handle for this server.
    pub(super) fn cluster(&self) -> Cluster {
        let config = kube::Config::new(format!("http://{}", self.address).parse().unwrap());
        let liveness = Arc::default();
        let client = super::connect::client(config, &liveness).unwrap();
        Cluster::with(client, liveness, &crate::config::Kubernetes::default())
    }

    fn serve(&self, listener: TcpListener) {
        let serving = CancellationToken::new();
        *self.serving.lock() = serving.clone();
        let state = self.state.clone();
        tokio::spawn(serving.run_until_cancelled_owned(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let state = state.clone();
                let service = service_fn(move |request| {
                    let state = state.clone();
                    async move { Ok::<_, Infallible>(state.answer(&request)) }
                });
                connections.spawn(async move {
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await
                });
            }
        }));
    }

    /// Closes all connections and the listener until [`Self::come_back`] is called with the returned address.
    pub(super) async fn go_away(&self) -> SocketAddr {
        self.serving.lock().cancel();
        self.watches(0).await;
        self.address
    }

    pub(super) async fn come_back(&self, address: SocketAddr) {
        let listener = loop {
            // Until the old listener is closed.
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        self.serve(listener);
    }

    /// Creates or replaces an object of a collection such as `/api/v1/namespaces/ml/pods`.
    pub(super) fn put(&self, path: &str, mut object: Value) {
        let mut inner = self.state.inner.lock();
        inner.version += 1;
        object["metadata"]["resourceVersion"] = inner.version.to_string().into();
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let former = inner.objects.entry(path.into()).or_default().insert(name, object.clone());
        inner.tell(path, if former.is_some() { "MODIFIED" } else { "ADDED" }, object);
    }

    pub(super) fn delete(&self, path: &str, name: &str) {
        let mut inner = self.state.inner.lock();
        inner.version += 1;
        let version = inner.version;
        let removed = inner.objects.get_mut(path).and_then(|all| all.remove(name));
        let mut object = removed.expect("an object to delete");
        object["metadata"]["resourceVersion"] = version.to_string().into();
        inner.tell(path, "DELETED", object);
    }

    /// Waits for `count` open watches.
    pub(super) async fn watches(&self, count: usize) {
        let mut watching = self.state.watching.subscribe();
        let waited =
            tokio::time::timeout(WAIT_TIMEOUT, watching.wait_for(|open| *open == count)).await.map(drop);
        assert!(waited.is_ok(), "{} watches instead of {count}", *self.state.watching.borrow());
    }

    pub(super) fn lists(&self) -> usize {
        self.state.inner.lock().lists
    }
}

impl Drop for FakeApi {
    fn drop(&mut self) {
        self.serving.lock().cancel();
    }
}

// === impl FakeServer ===

impl FakeServer {
    fn answer(self: &Arc<Self>, request: &Request<Incoming>) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
        let query = query(request.uri().query().unwrap_or_default());
        let path = request.uri().path().to_owned();
        let selector = Selector::of(&query);
        let mut inner = self.inner.lock();
        if !query.contains_key("watch") {
            inner.lists += 1;
            let all = inner.objects.get(&path).into_iter().flat_map(BTreeMap::values);
            let items: Vec<_> = all.filter(|object| selector.selects(object)).cloned().collect();
            let version = inner.version.to_string();
            let list = json!({ "kind": "List", "apiVersion": "v1",
                "metadata": { "resourceVersion": version }, "items": items });
            return Response::new(Full::from(list.to_string()).boxed_unsync());
        }
        let Some(since) = query.get("resourceVersion").and_then(|version| version.parse::<u64>().ok()) else {
            let mut bad = Response::new(Full::default().boxed_unsync());
            *bad.status_mut() = StatusCode::BAD_REQUEST;
            return bad;
        };
        let (events, body) = mpsc::unbounded_channel();
        let watcher = FakeWatch { path, selector, events };
        for (_, path, event) in inner.events.iter().filter(|(version, ..)| *version > since) {
            watcher.tell(path, event);
        }
        inner.watchers.push(watcher);
        self.watching.send_modify(|open| *open += 1);
        let open = Open(self.clone());
        let body = UnboundedReceiverStream::new(body);
        let body = StreamExt::map(body, move |frame| {
            let _ = &open;
            frame
        });
        Response::new(StreamBody::new(body).boxed_unsync())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.watching.send_modify(|open| *open -= 1);
    }
}

// === impl FakeObjects ===

impl FakeObjects {
    fn tell(&mut self, path: &str, kind: &str, object: Value) {
        let event = json!({ "type": kind, "object": object });
        self.watchers.retain(|watcher| watcher.tell(path, &event));
        self.events.push((self.version, path.into(), event));
    }
}

// === impl FakeWatch ===

impl FakeWatch {
    fn tell(&self, path: &str, event: &Value) -> bool {
        if path == self.path && self.selector.selects(&event["object"]) {
            return self.events.send(Ok(Frame::data(format!("{event}\n").into()))).is_ok();
        }
        !self.events.is_closed()
    }
}

// === impl Selector ===

impl Selector {
    fn of(query: &HashMap<String, String>) -> Self {
        let pairs = |key: &str| {
            let terms = query.get(key).map(String::as_str).unwrap_or_default().split(',');
            let pairs = terms.filter_map(|term| term.split_once('='));
            pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect::<Vec<_>>()
        };
        let name = pairs("fieldSelector").into_iter().find(|(key, _)| key == "metadata.name");
        Self { name: name.map(|(_, name)| name), labels: pairs("labelSelector") }
    }

    fn selects(&self, object: &Value) -> bool {
        let meta = &object["metadata"];
        self.name.as_ref().is_none_or(|name| meta["name"] == **name)
            && self.labels.iter().all(|(key, value)| meta["labels"][key] == **value)
    }
}

fn query(text: &str) -> HashMap<String, String> {
    let decode = |text: &str| {
        let text = text.replace('+', " ");
        percent_encoding::percent_decode_str(&text).decode_utf8().unwrap().into_owned()
    };
    text.split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}
