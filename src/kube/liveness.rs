//! Detects, reports and replaces dead connections to the API server.
//!
//! A half-open connection (the peer or a load balancer has dropped it without a packet) is indistinguishable from an
//! idle one. So each watch asks the API server for a short timeout, and is abandoned if it does not end in time. Over
//! HTTP/1.1 each watch has a connection of its own, so a dead watch delays no other request.

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

/// Watch timeout in seconds, if there are few watches. With [`MAX_WATCH_JITTER_SECS`] and [`WATCH_MARGIN`], a dead connection is
/// detected within 28 s.
const MIN_WATCH_TIMEOUT_SECS: u64 = 20;
/// Upper bound of the random seconds added to a watch timeout, so that watches begun together do not end together.
const MAX_WATCH_JITTER_SECS: u64 = 5;
/// Upper bound of a watch timeout in seconds; the default of kube.
const MAX_WATCH_TIMEOUT_SECS: u64 = 290;
/// Target rate of watch restarts. Above 100 watches the timeout grows to keep it.
const MAX_WATCH_RESTARTS_PER_SEC: u64 = 5;
/// Time a watch may exceed its timeout, or be silent thereafter, before it is abandoned.
const WATCH_MARGIN: Duration = Duration::from_secs(3);
/// Timeout for the response head of a watch, which the API server sends before the first change.
const WATCH_HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for the response head of other requests, and for pauses within their bodies. The API server itself times out
/// after 60 s; an earlier retry is equivalent.
const API_IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// A lost watch that is not retried for this long counts as abandoned.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);
/// Minimum duration of a loss before it is reported as an obstacle: most are resolved by the first retry.
const OBSTACLE_GRACE: Duration = Duration::from_secs(5);

/// State of the connections to the API server.
#[derive(Default)]
pub struct Liveness {
    /// Open watches.
    open: AtomicUsize,
    /// Losses since the start of the process.
    losses: AtomicU64,
    /// Currently lost watches, by path and selectors.
    lost: Mutex<HashMap<Box<str>, LostWatch>>,
}

/// A lost watch that has not been resumed.
struct LostWatch {
    since: Instant,
    tried: Instant,
    error: Arc<str>,
}

/// Service that abandons requests without an answer in time.
#[derive(Clone)]
pub(super) struct LivenessService<S> {
    inner: S,
    liveness: Arc<Liveness>,
}

/// Kind of request, which determines the permitted silence.
#[derive(Clone, Debug, PartialEq, Eq)]
enum RequestPurpose {
    /// A watch, with its key.
    Watch(Box<str>),
    /// A followed container log, which may be idle indefinitely.
    Log,
    Other,
}

/// Reason for abandoning a request.
#[derive(Debug, Error)]
enum SilenceError {
    #[error("the API server did not answer within {}", humantime::format_duration(*.0))]
    Head(Duration),
    #[error("the API server has sent nothing for {}; the connection is considered lost", humantime::format_duration(*.0))]
    Body(Duration),
}

/// Response body that fails after too long a silence.
pub(super) struct LivenessBody<B> {
    /// `None` once abandoned.
    inner: Option<Pin<Box<B>>>,
    /// `None` means no limit.
    deadline: Option<IdleDeadline>,
    /// Counts the open watch.
    watch: Option<OpenWatch>,
}

/// Deadline of a body. Bytes that arrive late move it to `idle` after them.
struct IdleDeadline {
    sleep: Pin<Box<Sleep>>,
    /// Minimum silence after the last bytes before the body fails.
    idle: Duration,
    last: Instant,
}

struct OpenWatch {
    liveness: Arc<Liveness>,
    key: Box<str>,
}

// === impl Liveness ===

impl Liveness {
    /// Wraps `inner` in a service that reports here.
    pub(super) fn wrap_service<S>(self: &Arc<Self>, inner: S) -> LivenessService<S> {
        LivenessService { inner, liveness: self.clone() }
    }

    /// Returns the numbers of open watches, of losses so far, and of watches currently lost.
    pub fn counts(&self) -> (usize, u64, usize) {
        let lost = self.lost.lock().values().filter(|loss| loss.is_wanted()).count();
        (self.open.load(Ordering::Relaxed), self.losses.load(Ordering::Relaxed), lost)
    }

    /// Describes a lasting loss that affects `namespace` (`None`: any namespace) or cluster-wide objects.
    pub fn describe_loss(&self, namespace: Option<&str>) -> Option<String> {
        let part = namespace.map(|namespace| format!("/namespaces/{namespace}/"));
        let concerns =
            |key: &str| !key.contains("/namespaces/") || part.as_ref().is_none_or(|part| key.contains(part));
        let lost = self.lost.lock();
        let lasting = lost.iter().filter(|(key, loss)| {
            loss.is_wanted() && loss.since.elapsed() >= OBSTACLE_GRACE && concerns(key)
        });
        let (key, loss) = lasting.min_by_key(|(key, loss)| (loss.since, key.len()))?;
        let what = key.split('?').next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        Some(format!(
            "The watch of {what} is interrupted, so a pod that becomes ready may go unnoticed: {}. The last known state \
             stays in use; check that the Kubernetes API server is up and reachable",
            loss.error
        ))
    }

    /// Returns the timeout for a new watch in seconds.
    fn watch_timeout_secs(&self) -> u64 {
        let fair = self.open.load(Ordering::Relaxed) as u64 / MAX_WATCH_RESTARTS_PER_SEC;
        let secs = fair.clamp(MIN_WATCH_TIMEOUT_SECS, MAX_WATCH_TIMEOUT_SECS - MAX_WATCH_JITTER_SECS);
        secs + fastrand::u64(0..MAX_WATCH_JITTER_SECS)
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
        tracing::warn!(watch = key, error = %error, "watch lost; restarting it");
        lost.insert(key.into(), LostWatch { since: now, tried: now, error: error.to_string().into() });
    }

    fn resumed(&self, key: &str) {
        if let Some(loss) = self.lost.lock().remove(key) {
            let after = humantime::format_duration(Duration::from_secs(loss.since.elapsed().as_secs()));
            tracing::info!(watch = key, %after, "watch resumed");
        }
    }
}

impl LostWatch {
    fn is_wanted(&self) -> bool {
        self.tried.elapsed() < ABANDONED_AFTER
    }
}

// === impl RequestPurpose ===

impl RequestPurpose {
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
        if matches!(self, Self::Watch(_)) { WATCH_HEAD_TIMEOUT } else { API_IDLE_TIMEOUT }
    }
}

/// Replaces `timeoutSeconds` in the query.
fn with_timeout(uri: &Uri, secs: u64) -> Option<Uri> {
    let pairs = uri.query()?.split('&').filter(|pair| !pair.starts_with("timeoutSeconds="));
    let query = pairs.chain([&*format!("timeoutSeconds={secs}")]).collect::<Vec<_>>().join("&");
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(format!("{}?{query}", uri.path()).parse().ok()?);
    Uri::from_parts(parts).ok()
}

// === impl LivenessService ===

impl<S, B> Service<Request<Body>> for LivenessService<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<LivenessBody<B>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // Uses the instance that is ready; its clone becomes ready for the next request.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let liveness = self.liveness.clone();
        async move {
            let purpose = RequestPurpose::of(request.uri());
            let began = Instant::now();
            let mut watch_duration = None;
            if matches!(purpose, RequestPurpose::Watch(_)) {
                let secs = liveness.watch_timeout_secs();
                if let Some(uri) = with_timeout(request.uri(), secs) {
                    *request.uri_mut() = uri;
                    watch_duration = Some(Duration::from_secs(secs));
                }
            }
            let answer = match timeout(purpose.head(), inner.call(request)).await {
                Ok(answer) => answer.map_err(Into::into),
                Err(_) => Err(SilenceError::Head(purpose.head()).into()),
            };
            let (head, body) = match (answer, &purpose) {
                (Err(error), RequestPurpose::Watch(key)) => {
                    liveness.lost(key, &super::error_chain::error_chain(&*error));
                    return Err(error);
                }
                (answer, _) => answer?.into_parts(),
            };
            let deadline = match watch_duration {
                Some(watch_duration) => {
                    Some(IdleDeadline::new(began + watch_duration + WATCH_MARGIN, WATCH_MARGIN))
                }
                None => (purpose != RequestPurpose::Log)
                    .then(|| IdleDeadline::new(Instant::now() + API_IDLE_TIMEOUT, API_IDLE_TIMEOUT)),
            };
            let watch = match purpose {
                RequestPurpose::Watch(key) if is_overloaded(head.status) => {
                    liveness.lost(&key, &format_args!("the API server answers {}", head.status));
                    None
                }
                RequestPurpose::Watch(key) => {
                    liveness.resumed(&key);
                    head.status.is_success().then(|| OpenWatch::new(&liveness, key))
                }
                RequestPurpose::Log | RequestPurpose::Other => None,
            };
            Ok(Response::from_parts(head, LivenessBody { inner: Some(Box::pin(body)), deadline, watch }))
        }
        .boxed()
    }
}

fn is_overloaded(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

// === impl LivenessBody ===

impl<B> http_body::Body for LivenessBody<B>
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
            if let Some(deadline) = &mut this.deadline {
                deadline.last = Instant::now();
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let Some(deadline) = &mut this.deadline else { return Poll::Pending };
        while deadline.sleep.as_mut().poll(cx).is_ready() {
            let until = deadline.last + deadline.idle;
            if until > Instant::now() {
                deadline.sleep.as_mut().reset(until);
                continue;
            }
            let silence = SilenceError::Body(Duration::from_secs(deadline.last.elapsed().as_secs()));
            if let Some(watch) = this.watch.take() {
                watch.liveness.lost(&watch.key, &silence);
            }
            // Dropping the body closes the connection.
            this.inner = None;
            return Poll::Ready(Some(Err(silence.into())));
        }
        Poll::Pending
    }
}

// === impl IdleDeadline ===

impl IdleDeadline {
    fn new(until: Instant, idle: Duration) -> Self {
        Self { sleep: Box::pin(sleep_until(until)), idle, last: Instant::now() }
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
