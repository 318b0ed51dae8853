//! A collector that accepts OTLP over gRPC or HTTP and stores the decoded spans.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::post,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value},
    trace::v1 as otlp,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;

/// A collector in this process.
pub struct Collector {
    pub address: SocketAddr,
    received: Arc<Received>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Received {
    requests: Mutex<Vec<(ExportTraceServiceRequest, BTreeMap<String, String>)>>,
    silent: AtomicBool,
}

/// A received span.
#[derive(Clone, Debug)]
pub struct ReceivedSpan(pub otlp::Span);

/// Spans of one trace.
#[derive(Debug)]
pub struct Trace(pub Vec<ReceivedSpan>);

// === impl Collector ===

impl Collector {
    pub async fn grpc() -> Self {
        Self::start(|listener, received| async move {
            let server =
                tonic::transport::Server::builder().add_service(TraceServiceServer::from_arc(received));
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        })
        .await
    }

    pub async fn http() -> Self {
        Self::start(|listener, received| async move {
            let router = Router::new().route("/v1/traces", post(take)).with_state(received);
            axum::serve(listener, router).await.unwrap();
        })
        .await
    }

    async fn start<F>(serve: impl FnOnce(TcpListener, Arc<Received>) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, received) = (listener.local_addr().unwrap(), Arc::default());
        let task = tokio::spawn(serve(listener, Arc::clone(&received)));
        Self { address, received, task }
    }

    /// Returns the `traces` key of a configuration with this collector.
    pub fn config(&self, more: &str) -> String {
        format!("traces: {{ endpoint: \"http://{}\", {more} }}\n", self.address)
    }

    /// Accepts requests from now on without ever responding.
    pub fn fall_silent(&self) {
        self.received.silent.store(true, Ordering::SeqCst);
    }

    /// Returns all received spans, after checking their resources and scopes.
    pub fn spans(&self) -> Vec<ReceivedSpan> {
        let requests = self.received.requests.lock();
        let resources = requests.iter().flat_map(|(request, _)| &request.resource_spans);
        let scopes = resources.flat_map(|resource| {
            let described = attributes(&resource.resource.as_ref().expect("a resource").attributes);
            assert_eq!(described["service.version"], env!("CARGO_PKG_VERSION"));
            assert!(described.contains_key("telemetry.sdk.language"), "{described:?}");
            &resource.scope_spans
        });
        let spans = scopes.flat_map(|scope| {
            assert_eq!(scope.scope.as_ref().expect("a scope").name, "anteroom");
            scope.spans.iter().cloned().map(ReceivedSpan)
        });
        spans.collect()
    }

    /// Returns the service names of all received resources.
    pub fn services(&self) -> Vec<String> {
        let requests = self.received.requests.lock();
        let resources = requests.iter().flat_map(|(request, _)| &request.resource_spans);
        let names = resources.map(|resource| {
            attributes(&resource.resource.as_ref().unwrap().attributes).remove("service.name").unwrap()
        });
        names.collect()
    }

    /// Returns the metadata or headers of each request.
    pub fn headers(&self) -> Vec<BTreeMap<String, String>> {
        self.received.requests.lock().iter().map(|(_, headers)| headers.clone()).collect()
    }

    /// Returns the spans of a trace.
    pub fn trace(&self, trace_id: &str) -> Trace {
        let mut spans = self.spans();
        spans.retain(|span| span.trace_id() == trace_id);
        Trace(spans)
    }

    /// Returns the only trace. Panics if there are several.
    pub fn only_trace(&self) -> Trace {
        let spans = self.spans();
        let first = spans.first().expect("a span").trace_id();
        assert!(spans.iter().all(|span| span.trace_id() == first), "{spans:#?}");
        Trace(spans)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Received {
    async fn keep(&self, request: ExportTraceServiceRequest, headers: &HeaderMap) {
        if self.silent.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let text = |value: &axum::http::HeaderValue| value.to_str().unwrap_or_default().to_owned();
        let headers = headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect();
        self.requests.lock().push((request, headers));
    }
}

#[tonic::async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let headers = request.metadata().clone().into_headers();
        self.keep(request.into_inner(), &headers).await;
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn take(
    State(received): State<Arc<Received>>,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, Vec<u8>) {
    let is_protobuf = headers.get("content-type").is_some_and(|kind| kind == "application/x-protobuf");
    match ExportTraceServiceRequest::decode(body) {
        Ok(request) if is_protobuf => {
            received.keep(request, &headers).await;
            (StatusCode::OK, ExportTraceServiceResponse::default().encode_to_vec())
        }
        _ => (StatusCode::BAD_REQUEST, Vec::new()),
    }
}

fn attributes(all: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &any_value::Value| match value {
        any_value::Value::StringValue(text) => text.clone(),
        any_value::Value::BoolValue(flag) => flag.to_string(),
        any_value::Value::IntValue(number) => number.to_string(),
        any_value::Value::DoubleValue(number) => number.to_string(),
        other => panic!("{other:?}"),
    };
    let mut seen = BTreeMap::new();
    for attribute in all {
        let value = attribute.value.as_ref().and_then(|value| value.value.as_ref()).expect("a value");
        let twice = seen.insert(attribute.key.clone(), text(value));
        assert!(twice.is_none(), "{} twice", attribute.key);
    }
    seen
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

// === impl ReceivedSpan ===

impl ReceivedSpan {
    pub fn trace_id(&self) -> String {
        hex(&self.0.trace_id)
    }

    pub fn id(&self) -> String {
        hex(&self.0.span_id)
    }

    /// Returns the id of the parent span; empty for a root span.
    pub fn parent(&self) -> String {
        hex(&self.0.parent_span_id)
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub fn kind(&self) -> otlp::span::SpanKind {
        self.0.kind()
    }

    pub fn attributes(&self) -> BTreeMap<String, String> {
        attributes(&self.0.attributes)
    }

    /// Returns an attribute, or an empty string if it is missing.
    pub fn get(&self, key: &str) -> String {
        self.attributes().remove(key).unwrap_or_default()
    }

    pub fn events(&self) -> Vec<&str> {
        self.0.events.iter().map(|event| event.name.as_str()).collect()
    }

    pub fn is_error(&self) -> bool {
        self.0.status.as_ref().is_some_and(|status| status.code() == otlp::status::StatusCode::Error)
    }

    /// Returns start and end in nanoseconds since 1970.
    pub fn times(&self) -> (u64, u64) {
        (self.0.start_time_unix_nano, self.0.end_time_unix_nano)
    }

    pub fn nanoseconds(&self) -> u64 {
        self.0.end_time_unix_nano - self.0.start_time_unix_nano
    }
}

// === impl Trace ===

impl Trace {
    /// Returns the span of the request itself.
    pub fn server(&self) -> &ReceivedSpan {
        let [server] = self.of_kind(otlp::span::SpanKind::Server).try_into().expect("one server span");
        server
    }

    /// Returns the spans of the attempts, in order.
    pub fn attempts(&self) -> Vec<&ReceivedSpan> {
        self.of_kind(otlp::span::SpanKind::Client)
    }

    /// Returns the spans in which the request was held, in order.
    pub fn holds(&self) -> Vec<&ReceivedSpan> {
        self.of_kind(otlp::span::SpanKind::Internal)
            .into_iter()
            .filter(|span| span.name() == "hold")
            .collect()
    }

    fn of_kind(&self, kind: otlp::span::SpanKind) -> Vec<&ReceivedSpan> {
        let mut spans: Vec<_> = self.0.iter().filter(|span| span.kind() == kind).collect();
        spans.sort_by_key(|span| span.times());
        spans
    }

    /// Returns the spans within another, in order.
    pub fn within(&self, parent: &ReceivedSpan) -> Vec<&ReceivedSpan> {
        let mut spans: Vec<_> = self.0.iter().filter(|span| span.parent() == parent.id()).collect();
        spans.sort_by_key(|span| span.times());
        spans
    }

    /// Checks the invariants of every trace: only the server span has a remote parent or none, every other span lies
    /// within another, and span ids are unique.
    pub fn is_whole(&self) {
        let server = self.server();
        let mut ids = BTreeMap::new();
        for span in &self.0 {
            assert!(span.times().0 <= span.times().1, "{span:#?}");
            assert!(ids.insert(span.id(), span).is_none(), "{} twice", span.id());
        }
        for span in self.0.iter().filter(|span| span.id() != server.id()) {
            let parent = ids.get(&span.parent()).unwrap_or_else(|| panic!("no parent of {span:#?}"));
            let ((start, end), (from, to)) = (span.times(), parent.times());
            assert!(from <= start && end <= to, "{} is not within {}", span.name(), parent.name());
        }
    }
}
