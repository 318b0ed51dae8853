//! Bounds of the calls of a listener: time until the message is complete, bytes, and the number of calls that wait for
//! the message or for the client to read.

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, Uri};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};
use tonic::{Extensions, Status, body::Body, service::Routes};
use tower::{Layer, Service};

use crate::{
    config::budget::{GRPC_CALLS, GRPC_MESSAGE_BYTES, GRPC_REFLECTIONS},
    places::{InUseGuard, Place, Places, Source},
};

/// Connection of a call.
#[derive(Clone)]
pub struct Caller {
    pub(super) source: Source,
    /// Open calls of the connection.
    pub(super) open_calls: Arc<AtomicUsize>,
    /// Closes the connection when cancelled.
    pub(super) connection: CancellationToken,
    calls: Arc<CallPlaces>,
    /// True if the call has the place of a stream, and so needs none of [`CallPlaces`].
    has_stream_place: Arc<AtomicBool>,
}

/// Bounded places for the calls of a listener.
pub(super) struct CallPlaces {
    /// Calls with an incomplete message or an unread response, and streams of health.
    calls: Arc<Places>,
    /// Streams of reflection, each of which may keep a response of some 10 KiB.
    reflections: Arc<Places>,
}

/// A place among the bounded number of streams of a service; released when dropped.
pub struct StreamPlace(#[expect(dead_code, reason = "given back when dropped")] Place);

/// Layer that wraps the services of a listener.
#[derive(Clone, Copy)]
pub(super) struct CallLayer;

#[derive(Clone)]
pub(super) struct Calls {
    services: Routes,
}

/// A response that has not been sent to its end.
struct OpenAnswer {
    body: Body,
    /// Place of the call, with a future that resolves on its eviction.
    place: Option<(Place, Cancelled)>,
    _ends_request: Option<DropGuard>,
    _in_use: InUseGuard,
}

/// Request messages of a call, which may continue while the response is sent. They end with the response, since the
/// service reads them in a separate task.
struct OpenRequest {
    body: Body,
    ended: Cancelled,
}

type Cancelled = Pin<Box<WaitForCancellationFutureOwned>>;

/// Time from the head of a call to the end of its only message. Messages are small and sent with their heads.
pub(super) const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Divisor of the places of calls: one source may take at most this fraction of them.
const CALLS_PER_SOURCE_DIVISOR: usize = 2;

/// Bytes that gRPC puts before a message.
const GRPC_MESSAGE_PREFIX_BYTES: usize = 5;

/// Maximum length of a path, in bytes: that of existing methods, with room to spare.
const MAX_PATH_BYTES: usize = 128;

/// Prefix of the paths of both versions of reflection.
const REFLECTION_PATH_PREFIX: &str = "/grpc.reflection.";

/// Fields that tonic and the services read while or after they wait for the message; tonic reads the timeout before.
const KEPT_CALL_HEADERS: [&str; 2] = ["authorization", "grpc-encoding"];

// === impl Caller ===

impl Caller {
    pub(super) fn new(source: Source, place: &Place, calls: Arc<CallPlaces>) -> Self {
        let (uses, connection) = (place.uses().clone(), place.evicted().clone());
        Self { source, open_calls: uses, connection, calls, has_stream_place: Arc::default() }
    }

    /// Returns the connection of a call. Calls in memory have a default one without a source.
    pub fn of(extensions: &Extensions) -> Self {
        extensions.get().cloned().unwrap_or_default()
    }

    /// Returns the source of the connection.
    pub const fn source(&self) -> Source {
        self.source
    }

    fn enter(&self, places: &Arc<Places>) -> Place {
        places.enter(self.source, CancellationToken::new())
    }
}

impl Default for Caller {
    fn default() -> Self {
        Self {
            source: Source::default(),
            open_calls: Arc::default(),
            connection: CancellationToken::new(),
            calls: Arc::new(CallPlaces::new()),
            has_stream_place: Arc::default(),
        }
    }
}

// === impl CallPlaces ===

impl CallPlaces {
    pub(super) fn new() -> Self {
        let places = |max| Places::new(max, max / CALLS_PER_SOURCE_DIVISOR);
        Self { calls: places(GRPC_CALLS), reflections: places(GRPC_REFLECTIONS) }
    }
}

// === impl StreamPlace ===

impl StreamPlace {
    /// Uses `place` for the caller's stream. If the stream is evicted and does not end, its connection is closed.
    pub fn new(place: Place, caller: &Caller) -> Self {
        place.on_connection(&caller.connection);
        caller.has_stream_place.store(true, Ordering::Relaxed);
        Self(place)
    }
}

// === impl Calls ===

impl Layer<Routes> for CallLayer {
    type Service = Calls;

    fn layer(&self, services: Routes) -> Calls {
        Calls { services }
    }
}

impl Service<Request<Body>> for Calls {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Body>>::poll_ready(&mut self.services, context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Some(mut request) = trim_call(request) else {
            return Box::pin(std::future::ready(Ok(Status::unimplemented("").into_http())));
        };
        let mut caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
        caller.has_stream_place = Arc::default();
        request.extensions_mut().insert(caller.clone());
        let mut ends_request = None;
        if request.uri().path().starts_with(REFLECTION_PATH_PREFIX) {
            let ended = CancellationToken::new();
            let cancelled = Box::pin(ended.clone().cancelled_owned());
            request = request.map(|body| Body::new(OpenRequest { body, ended: cancelled }));
            ends_request = Some(ended.drop_guard());
        }
        Box::pin(answer(caller, ends_request, self.services.call(request)))
    }
}

/// Reduces a call to copies of what is read later: the fields of a head would keep alive the buffer it arrived in, and
/// a table. Returns `None` for a path that no method has.
fn trim_call(request: Request<Body>) -> Option<Request<Body>> {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path();
    if path.len() > MAX_PATH_BYTES {
        return None;
    }
    parts.uri = Uri::try_from(path).ok()?;
    let mut kept = HeaderMap::new();
    for name in KEPT_CALL_HEADERS {
        let value = parts.headers.get(name).and_then(|value| HeaderValue::from_bytes(value.as_bytes()).ok());
        if let Some(value) = value {
            kept.insert(name, value);
        }
    }
    parts.headers = kept;
    let body = Limited::new(body, GRPC_MESSAGE_BYTES + GRPC_MESSAGE_PREFIX_BYTES).map_err(|error| {
        if error.is::<LengthLimitError>() {
            Status::out_of_range(format!("a call may bring at most {GRPC_MESSAGE_BYTES} bytes"))
        } else {
            Status::from_error(error)
        }
    });
    let body = Body::new(body);
    Some(Request::from_parts(parts, body))
}

/// Answers a call. Takes a place only if it has to wait for the message or for the client to read, so that a burst of
/// complete calls evicts nothing.
async fn answer(
    caller: Caller,
    ends_request: Option<DropGuard>,
    answering: impl Future<Output = Result<Response<Body>, Infallible>> + Send,
) -> Result<Response<Body>, Infallible> {
    let in_use = InUseGuard::new(caller.open_calls.clone());
    let places = if ends_request.is_some() { &caller.calls.reflections } else { &caller.calls.calls };
    let mut answering = pin!(answering);
    let mut place = None;
    let response = match poll_fn(|context| Poll::Ready(answering.as_mut().poll(context))).await {
        Poll::Ready(response) => response?,
        Poll::Pending => {
            let waiting = place.insert(caller.enter(places));
            tokio::select! {
                // A complete message is answered even if it arrives late.
                biased;
                response = &mut answering => response?,
                () = waiting.evicted().cancelled() => return Ok(evicted().into_http()),
                () = sleep(MESSAGE_TIMEOUT) => {
                    let seconds = MESSAGE_TIMEOUT.as_secs();
                    let late = format!("the message of this call did not come to its end within {seconds} s");
                    return Ok(Status::deadline_exceeded(late).into_http());
                }
            }
        }
    };
    if caller.has_stream_place.load(Ordering::Relaxed) || http_body::Body::is_end_stream(response.body()) {
        place = None;
    } else if place.is_none() {
        place = Some(caller.enter(places));
    }
    let place = place.map(|place| {
        // From here on, only a client that does not read can keep the call from ending on eviction. Its connection is
        // then closed.
        place.on_connection(&caller.connection);
        let evicted = Box::pin(place.evicted().clone().cancelled_owned());
        (place, evicted)
    });
    Ok(response
        .map(|body| Body::new(OpenAnswer { body, place, _ends_request: ends_request, _in_use: in_use })))
}

fn evicted() -> Status {
    Status::resource_exhausted("too many calls are open, and most of them come from here")
}

// === impl OpenAnswer ===

impl http_body::Body for OpenAnswer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some((_, evicted_at)) = &mut self.place
            && evicted_at.as_mut().poll(context).is_ready()
        {
            self.place = None;
            self.body = Body::empty();
            let mut trailers = HeaderMap::new();
            // The message contains no byte that is invalid in a field.
            let _ = evicted().add_header(&mut trailers);
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

// === impl OpenRequest ===

impl http_body::Body for OpenRequest {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended.as_mut().poll(context).is_ready() {
            return Poll::Ready(None);
        }
        Pin::new(&mut self.body).poll_frame(context)
    }
}
