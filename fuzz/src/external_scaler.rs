//! Every request to the external scaler gets a response, from KEDA or any other client.

use std::{pin::pin, sync::Arc};

use anteroom::{
    admission::{Directory, Gate},
    coldstart::ColdStarts,
    config::budget,
    domain::{Counting, Period, Policy, RequestRate, Scaling},
    scaler::keda::{
        self,
        proto::{GetMetricsRequest, ScaledObjectRef},
    },
};
use bytes::Bytes;
use futures_util::{FutureExt, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Request};
use http_body_util::{BodyExt, StreamBody};
use prost::Message;
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, codegen::Service};

use super::cuts;

const GRPC_SERVICE_PATH: &str = "/externalscaler.ExternalScaler/";

/// Maximum bytes of a message.
const MAX_MESSAGE_BYTES: usize = budget::GRPC_MESSAGE_BYTES;

/// Checks an input whose first line is the method followed by header fields, such as `grpc-encoding:gzip`, and whose
/// rest is the body with gRPC framing.
pub fn holds(input: &[u8]) {
    let split = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let head = String::from_utf8_lossy(&input[..split]);
    let body = input.get(split + 1..).unwrap_or_default();
    let mut words = head.split_whitespace();
    let method = words.next().unwrap_or_default();
    let fields: HeaderMap = words
        .filter_map(|word| {
            let (name, value) = word.split_once(':')?;
            Some((name.parse::<HeaderName>().ok()?, value.parse::<HeaderValue>().ok()?))
        })
        .collect();
    STAGE.with(|stage| {
        let _entered = stage.runtime.enter();
        let whole = stage.ask(method, &fields, &[body]);
        let Some(whole) = whole else { return };
        for parts in cuts::of(body) {
            assert_eq!(stage.ask(method, &fields, &parts).as_ref(), Some(&whole), "in {} parts", parts.len());
        }
        assert!(ALLOWED.contains(&whole.code), "{whole:?}");
        assert!(
            whole.size <= 8 * input.len() + (8 << 10),
            "{} bytes of an answer to {}",
            whole.size,
            input.len()
        );
        // `?` and `#` end the path.
        let path = method.split(['?', '#']).next().unwrap_or_default();
        if let Some(expected) = expected(path, &fields, body) {
            assert_eq!(whole.code, expected, "{whole:?}");
        }
    });
}

/// Maximum bytes of a Kubernetes object name (RFC 1123 subdomain).
const MAX_NAME_BYTES: usize = 253;

/// Status codes a call may end with. `Unknown` would be an error of ours that nothing maps to a code.
const ALLOWED: &[Code] = &[
    Code::Ok,
    Code::InvalidArgument,
    Code::NotFound,
    Code::ResourceExhausted,
    Code::OutOfRange,
    Code::Unimplemented,
    Code::Internal,
];

#[derive(Debug, PartialEq)]
struct CallResult {
    /// Status code; `Ok` while a stream continues.
    code: Code,
    said: String,
    messages: Vec<u8>,
    /// Bytes of the response, including the head.
    size: usize,
}

struct ScalerFixture {
    runtime: Runtime,
    routes: Arc<Directory>,
}

thread_local! {
    static STAGE: ScalerFixture = ScalerFixture::new();
}

// === impl ScalerFixture ===

impl ScalerFixture {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
        let _entered = runtime.enter();
        let routes = Arc::new(Directory::default());
        let rate = Scaling {
            request_rate: Some(RequestRate { target: 20, window: Period::from_secs(60) }),
            counting: Counting::Concurrency,
            ..Scaling::default()
        };
        let cold_starts = ColdStarts::new(|_| {});
        let gate = |name: &str, policy| Gate::new(name.into(), policy, cold_starts.clone());
        routes.publish([
            gate("tiny", Policy::default()),
            gate("ml/llama", Policy { scaling: rate, ..Policy::default() }),
        ]);
        drop(_entered);
        Self { runtime, routes }
    }

    /// Returns the immediate response; streams send more later. `None` if HTTP cannot carry the method and fields.
    fn ask(&self, method: &str, fields: &HeaderMap, parts: &[&[u8]]) -> Option<CallResult> {
        let frames: Vec<_> = parts
            .iter()
            .map(|part| Ok::<_, Status>(http_body::Frame::data(Bytes::copy_from_slice(part))))
            .collect();
        let mut request = Request::post(format!("{GRPC_SERVICE_PATH}{method}"))
            .header("content-type", "application/grpc")
            .body(StreamBody::new(stream::iter(frames)))
            .ok()?;
        request.headers_mut().extend(fields.clone());
        let mut service = keda::service(self.routes.clone(), CancellationToken::new());
        let answered =
            service.call(request).now_or_never().expect("an answer needs nothing but the question");
        let (head, body) = answered.expect("it cannot fail").into_parts();
        assert_eq!(head.status, 200, "gRPC tells what is wrong otherwise");
        let mut size = weight(&head.headers);
        let mut status = Status::from_header_map(&head.headers);
        let mut messages = Vec::new();
        let mut body = pin!(body);
        while let Some(frame) = body.frame().now_or_never().flatten() {
            let frame = frame.expect("what is wrong is in a trailer");
            if let Some(data) = frame.data_ref() {
                messages.extend_from_slice(data);
            }
            if let Some(trailers) = frame.trailers_ref() {
                size += weight(trailers);
                status = Status::from_header_map(trailers);
            }
        }
        Some(CallResult {
            code: status.as_ref().map_or(Code::Ok, Status::code),
            said: status.map(|status| status.message().to_owned()).unwrap_or_default(),
            size: size + messages.len(),
            messages,
        })
    }
}

fn weight(fields: &HeaderMap) -> usize {
    fields.iter().map(|(name, value)| name.as_str().len() + value.len()).sum()
}

/// Returns the expected status code if the input is a single complete request.
fn expected(method: &str, fields: &HeaderMap, body: &[u8]) -> Option<Code> {
    if !fields.is_empty() {
        return None;
    }
    let length = u32::from_be_bytes(body.get(1..5)?.try_into().ok()?) as usize;
    let message = &body[5..];
    if body[0] != 0 || message.len() != length {
        return None;
    }
    if !["IsActive", "StreamIsActive", "GetMetricSpec", "StreamMetricSpec", "GetMetrics"].contains(&method) {
        return Some(Code::Unimplemented);
    }
    if length > MAX_MESSAGE_BYTES {
        return Some(Code::OutOfRange);
    }
    let (object, metric) = if method == "GetMetrics" {
        match GetMetricsRequest::decode(message) {
            Ok(asked) => (asked.scaled_object_ref.unwrap_or_default(), asked.metric_name),
            Err(_) => return Some(Code::Internal),
        }
    } else {
        match ScaledObjectRef::decode(message) {
            Ok(object) => (object, String::new()),
            Err(_) => return Some(Code::Internal),
        }
    };
    let named =
        |key: &str| object.scaler_metadata.get(key).map(|name| name.trim()).filter(|name| !name.is_empty());
    let (name, is_route) = match (named("route"), named("interceptorRoute")) {
        (Some(name), None) => (name, true),
        (None, Some(name)) => (name, false),
        _ => return Some(Code::InvalidArgument),
    };
    // Names that no object and no route can have are rejected; a route with any other name may be created later.
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte);
    let is_foreign = |(namespace, _): (&str, &str)| !is_route || namespace != object.namespace;
    if [&object.namespace, &object.name].iter().any(|name| name.len() > MAX_NAME_BYTES)
        || name.len() > MAX_NAME_BYTES
        || name.split_once('/').is_some_and(is_foreign)
        || !name.bytes().all(is_plain)
    {
        return Some(Code::InvalidArgument);
    }
    if method.starts_with("Stream") {
        return Some(Code::Ok);
    }
    let metrics = match (format!("{}/{name}", object.namespace).as_str(), name) {
        ("ml/llama", _) => ["llama-concurrency", "llama-request-rate"],
        (_, "tiny") if is_route => ["tiny-queue-depth"; 2],
        // A route name may include the object's own namespace, so this is the route `llama` as well. The status is not
        // predicted.
        (_, "ml/llama") if is_route && object.namespace == "ml" => return None,
        // Unknown routes are served in case they are created later; their metrics are unknown.
        _ => return metric.is_empty().then_some(Code::Ok),
    };
    Some(match metric.as_str() {
        "" => Code::Ok,
        metric if metrics.contains(&metric) => Code::Ok,
        _ => Code::NotFound,
    })
}
