//! Connections to the API server that went silent: noticed, reported, and replaced.
//!
//! A connection that is half open (the peer or a load balancer has forgotten it, and no packet says so) looks like a quiet
//! one. So the API server is asked to end each watch soon, and whatever does not end in time is given up. Each watch has
//! an HTTP/1.1 connection of its own, and every request gets another one than a silent watch: there is no shared
//! connection that could hold up what is urgent.

use std::{
    collections::HashMap,
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::{Request, Response, StatusCode, Uri};
use http_body::Frame;
use kube::client::Body;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tower::Service;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How long a watch may last, in seconds, while there are few. With what is added by chance and [`MARGIN`], a silent one
/// is noticed within 28 s.
const WATCH_SECS: u64 = 20;
/// Watches that begin together do not end together: up to so many seconds are added by chance.
const SPREAD_SECS: u64 = 5;
/// The longest that a watch may last: what kube asks for by default.
const MAX_WATCH_SECS: u64 = 290;
/// How many watches may begin again in a second. With more than a hundred of them each lasts longer instead.
const WATCHES_PER_SEC: u64 = 5;
/// How long after its end, or after its last bytes, a watch is given up.
const MARGIN: Duration = Duration::from_secs(3);
/// How long the head of a watch may take. The API server sends it before it looks for changes.
const WATCH_HEAD: Duration = Duration::from_secs(10);
/// How long the head of another answer may take, and how long its body may pause. The API server itself gives up after
/// 60 s; what is asked again comes to the same.
const PAUSE: Duration = Duration::from_secs(30);
/// A watch that was lost and has not been tried again for so long is wanted no more.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// How long a loss must last before it stands in the way of a target: most are over after one try.
const GRACE: Duration = Duration::from_secs(5);

/// What is known of the connections to the API server.
#[derive(Default)]
pub struct Liveness {
    /// Watches that are open.
    open: AtomicUsize,
    /// Watches that were lost, each time.
    losses: AtomicU64,
    /// Watches that are lost now, by path and selectors.
    lost: Mutex<HashMap<Box<str>, Loss>>,
}

/// A watch that was lost and has not been taken up again.
struct Loss {
    since: Instant,
    tried: Instant,
    error: Arc<str>,
}

/// Sends requests, and gives up those that get no answer in time.
#[derive(Clone)]
pub(super) struct Lively<S> {
    inner: S,
    liveness: Arc<Liveness>,
}

/// What a request is for, which decides how long its answer may be silent.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Purpose {
    /// Changes, until the API server ends it.
    Watch(Box<str>),
    /// The log of a container, which may print nothing for long.
    Log,
    Other,
}

/// Why a request was given up.
#[derive(Debug, Error)]
enum Silence {
    #[error("the API server did not answer within {}", humantime::format_duration(*.0))]
    Head(Duration),
    #[error("the API server has sent nothing for {}; the connection is taken for lost", humantime::format_duration(*.0))]
    Body(Duration),
}

/// A body that fails when it has been silent for too long.
pub(super) struct LivelyBody<B> {
    /// `None`: given up.
    inner: Option<Pin<Box<B>>>,
    /// `None`: it may pause for ever.
    bound: Option<Bound>,
    /// Counts an open watch.
    watch: Option<OpenWatch>,
}

/// Until when a body is waited for.
struct Bound {
    sleep: Pin<Box<Sleep>>,
    /// How long after its last bytes it is waited for at least.
    pause: Duration,
    last: Instant,
}

struct OpenWatch {
    liveness: Arc<Liveness>,
    key: Box<str>,
}

// === impl Liveness ===

impl Liveness {
    /// A service that sends requests through `inner`, and reports here.
    pub(super) fn over<S>(self: &Arc<Self>, inner: S) -> Lively<S> {
        Lively { inner, liveness: self.clone() }
    }

    /// How many watches are open, were lost since we came, and are lost now.
    pub fn counts(&self) -> (usize, u64, usize) {
        let lost = self.lost.lock().values().filter(|loss| loss.is_wanted()).count();
        (self.open.load(Ordering::Relaxed), self.losses.load(Ordering::Relaxed), lost)
    }

    /// What has not been known for some time of objects in this namespace, or of the whole cluster, and why.
    pub fn trouble(&self, namespace: Option<&str>) -> Option<String> {
        let part = namespace.map(|namespace| format!("/namespaces/{namespace}/"));
        let concerns =
            |key: &str| !key.contains("/namespaces/") || part.as_ref().is_none_or(|part| key.contains(part));
        let lost = self.lost.lock();
        let lasting = lost
            .iter()
            .filter(|(key, loss)| loss.is_wanted() && loss.since.elapsed() >= GRACE && concerns(key));
        let (key, loss) = lasting.min_by_key(|(key, loss)| (loss.since, key.len()))?;
        let what = key.split('?').next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        Some(format!(
            "Changes of {what} are not heard of, so that a pod that is ready may not be seen: {}. What was known stays; \
             check whether the Kubernetes API server is up and can be reached",
            loss.error
        ))
    }

    /// How long a watch may last.
    fn watch_secs(&self) -> u64 {
        let fair = self.open.load(Ordering::Relaxed) as u64 / WATCHES_PER_SEC;
        let secs = fair.clamp(WATCH_SECS, MAX_WATCH_SECS - SPREAD_SECS);
        secs + fastrand::u64(0..SPREAD_SECS)
    }

    fn lost(&self, key: &str, error: &dyn fmt::Display) {
        let now = Instant::now();
        let mut lost = self.lost.lock();
        lost.retain(|_, loss| loss.is_wanted());
        if let Some(loss) = lost.get_mut(key) {
            loss.tried = now;
            return;
        }
        self.losses.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(watch = key, error = %error, "changes in the cluster are not heard of; the watch begins again");
        lost.insert(key.into(), Loss { since: now, tried: now, error: error.to_string().into() });
    }

    fn heard(&self, key: &str) {
        if let Some(loss) = self.lost.lock().remove(key) {
            let after = humantime::format_duration(Duration::from_secs(loss.since.elapsed().as_secs()));
            tracing::info!(watch = key, %after, "changes in the cluster are heard of again");
        }
    }
}

impl Loss {
    fn is_wanted(&self) -> bool {
        self.tried.elapsed() < FORGOTTEN
    }
}

// === impl Purpose ===

impl Purpose {
    fn of(uri: &Uri) -> Self {
        let pairs = || uri.query().unwrap_or_default().split('&');
        if pairs().any(|pair| matches!(pair, "watch=true" | "watch=1")) {
            let selectors = pairs().filter(|pair| pair.contains("Selector=")).collect::<Vec<_>>().join("&");
            let key = if selectors.is_empty() {
                uri.path().to_owned()
            } else {
                format!("{}?{selectors}", uri.path())
            };
            return Self::Watch(key.into());
        }
        if pairs().any(|pair| pair == "follow=true") { Self::Log } else { Self::Other }
    }

    fn head(&self) -> Duration {
        if matches!(self, Self::Watch(_)) { WATCH_HEAD } else { PAUSE }
    }
}

/// The same, but to last so many seconds.
fn with_timeout(uri: &Uri, secs: u64) -> Option<Uri> {
    let pairs = uri.query()?.split('&').filter(|pair| !pair.starts_with("timeoutSeconds="));
    let query = pairs.chain([&*format!("timeoutSeconds={secs}")]).collect::<Vec<_>>().join("&");
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(format!("{}?{query}", uri.path()).parse().ok()?);
    Uri::from_parts(parts).ok()
}

// === impl Lively ===

impl<S, B> Service<Request<Body>> for Lively<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<LivelyBody<B>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The one that is ready is used, its clone is made ready for the next request.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let liveness = self.liveness.clone();
        async move {
            let purpose = Purpose::of(request.uri());
            let began = Instant::now();
            let mut lasts = None;
            if matches!(purpose, Purpose::Watch(_)) {
                let secs = liveness.watch_secs();
                if let Some(uri) = with_timeout(request.uri(), secs) {
                    *request.uri_mut() = uri;
                    lasts = Some(Duration::from_secs(secs));
                }
            }
            let answer = match timeout(purpose.head(), inner.call(request)).await {
                Ok(answer) => answer.map_err(Into::into),
                Err(_) => Err(Silence::Head(purpose.head()).into()),
            };
            let (head, body) = match (answer, &purpose) {
                (Err(error), Purpose::Watch(key)) => {
                    liveness.lost(key, &super::watch::chain(&*error));
                    return Err(error);
                }
                (answer, _) => answer?.into_parts(),
            };
            let bound = match lasts {
                Some(lasts) => Some(Bound::new(began + lasts + MARGIN, MARGIN)),
                None => (purpose != Purpose::Log).then(|| Bound::new(Instant::now() + PAUSE, PAUSE)),
            };
            let watch = match purpose {
                Purpose::Watch(key) if is_overloaded(head.status) => {
                    liveness.lost(&key, &format_args!("the API server answers {}", head.status));
                    None
                }
                Purpose::Watch(key) => {
                    liveness.heard(&key);
                    head.status.is_success().then(|| OpenWatch::new(&liveness, key))
                }
                Purpose::Log | Purpose::Other => None,
            };
            Ok(Response::from_parts(head, LivelyBody { inner: Some(Box::pin(body)), bound, watch }))
        }
        .boxed()
    }
}

fn is_overloaded(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

// === impl LivelyBody ===

impl<B> http_body::Body for LivelyBody<B>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let Some(inner) = &mut this.inner else { return Poll::Ready(None) };
        if let Poll::Ready(frame) = inner.as_mut().poll_frame(cx) {
            if let Some(bound) = &mut this.bound {
                bound.last = Instant::now();
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let Some(bound) = &mut this.bound else { return Poll::Pending };
        while bound.sleep.as_mut().poll(cx).is_ready() {
            let until = bound.last + bound.pause;
            if until > Instant::now() {
                bound.sleep.as_mut().reset(until);
                continue;
            }
            let silence = Silence::Body(Duration::from_secs(bound.last.elapsed().as_secs()));
            if let Some(watch) = this.watch.take() {
                watch.liveness.lost(&watch.key, &silence);
            }
            // Which closes the connection.
            this.inner = None;
            return Poll::Ready(Some(Err(silence.into())));
        }
        Poll::Pending
    }
}

// === impl Bound ===

impl Bound {
    fn new(until: Instant, pause: Duration) -> Self {
        Self { sleep: Box::pin(sleep_until(until)), pause, last: Instant::now() }
    }
}

// === impl OpenWatch ===

impl OpenWatch {
    fn new(liveness: &Arc<Liveness>, key: Box<str>) -> Self {
        liveness.open.fetch_add(1, Ordering::Relaxed);
        Self { liveness: liveness.clone(), key }
    }
}

impl Drop for OpenWatch {
    fn drop(&mut self) {
        self.liveness.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
