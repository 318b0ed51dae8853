//! Property: a model server receives exactly the requests that a simple parser finds in the bytes of an HTTP/1
//! connection: no smuggled or split request, and no field from elsewhere.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anteroom::{
    admission::Gate,
    coldstart::ColdStarts,
    config::{Config, Limits},
    proxy::{Proxy, RouteTable, Shared, serve_connection},
    state::Endpoint,
    upstream::{Dial, Dialer, Dialing, UpstreamIo},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split},
    runtime::{Builder, Runtime},
    sync::mpsc::{UnboundedSender, unbounded_channel},
    task::yield_now,
};
use tokio_util::sync::CancellationToken;

use super::cuts;

/// Checks an input that is sent by a client. One route buffers its bodies, the other streams them.
pub fn holds(input: &[u8]) {
    // HTTP/2 is a different format, and the limits on input are tested elsewhere.
    if input.starts_with(b"PRI * HTTP/2") || input.len() > MAX_INPUT_BYTES {
        return;
    }
    let requests = requests(input);
    STAGE.with(|stage| {
        let [bytes, parts] = cuts::of(input);
        for table in &stage.tables {
            let runs =
                [vec![input], parts.clone()].into_iter().chain((input.len() < 500).then(|| bytes.clone()));
            for parts in runs {
                let mut left = requests.iter();
                for seen in stage.run(table, &parts) {
                    assert!(
                        left.any(|request| request.is(&seen)),
                        "in {} parts the server saw {seen:?}, and there is {requests:?}",
                        parts.len()
                    );
                }
            }
        }
    });
}

const MAX_INPUT_BYTES: usize = 16 << 10;

/// Buffer size per direction, enough for everything that is sent.
const PIPE_BYTES: usize = 4 << 20;

/// Turns of all tasks without progress after which the exchange is considered complete.
const QUIET_TURNS: usize = 50;

const EMPTY_JSON_RESPONSE: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";

/// Fields that the proxy removes, replaces or adds.
const PROXY_FIELDS: &[&str] =
    &["connection", "content-length", "host", "te", "transfer-encoding", "via", "x-request-id"];

#[derive(Debug, PartialEq)]
struct RawRequest {
    method: Vec<u8>,
    target: Vec<u8>,
    /// Names in lower case, with values.
    fields: Vec<(Vec<u8>, Vec<u8>)>,
    body: Vec<u8>,
}

struct ProxyFixture {
    runtime: Runtime,
    tables: Vec<Arc<Shared>>,
}

/// A model server that forwards its requests to a channel.
struct RecordingServer(UnboundedSender<RawRequest>);

thread_local! {
    static STAGE: ProxyFixture = ProxyFixture::new();
}

// === impl ProxyFixture ===

impl ProxyFixture {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
        let entered = runtime.enter();
        let tables = ["{ models: [tiny] }", "{}"].map(|matching| {
            let yaml = format!(
                "routes: [{{ name: tiny, match: {matching}, target: {{ url: 'http://127.0.0.1:1' }} }}]"
            );
            let route = Config::parse(&yaml, "routes.yaml").expect("a configuration").routes.remove(0);
            let gate = Gate::new(route.name.clone(), route.policy(), ColdStarts::new(|_| {}));
            let endpoint = Endpoint::new("memory:1", 64);
            gate.target().add(&endpoint);
            gate.target().ready(&endpoint, None);
            let shared = Shared::new(Limits::default());
            shared.table.store(Arc::new(RouteTable::new([(route, gate)])));
            shared
        });
        drop(entered);
        Self { runtime, tables: tables.into() }
    }

    /// Returns the requests that reach the model server when a client sends these parts and waits for the responses.
    fn run(&self, table: &Arc<Shared>, parts: &[&[u8]]) -> Vec<RawRequest> {
        self.runtime.block_on(async {
            let (sender, mut seen) = unbounded_channel();
            let proxy = Proxy::new(table.clone(), Dialer::Other(Arc::new(RecordingServer(sender))));
            let (client, server) = duplex(PIPE_BYTES);
            let serving = tokio::spawn(serve_connection(server, None, proxy, CancellationToken::new()));
            let (mut answers, mut requests) = split(client);
            let came = Arc::new(AtomicUsize::new(0));
            let counter = came.clone();
            let reading = tokio::spawn(async move {
                let mut part = [0; 4096];
                while let Ok(1..) = answers.read(&mut part).await {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
            for part in parts {
                // The proxy may have closed the connection.
                if requests.write_all(part).await.is_err() {
                    break;
                }
                yield_now().await;
            }
            let mut quiet = 0;
            let mut before = (0, 0);
            while quiet < QUIET_TURNS {
                yield_now().await;
                let now = (came.load(Ordering::Relaxed), seen.len());
                quiet = if now == before { quiet + 1 } else { 0 };
                before = now;
            }
            reading.abort();
            serving.abort();
            let _ = serving.await;
            let mut all = Vec::new();
            while let Ok(request) = seen.try_recv() {
                all.push(request);
            }
            all
        })
    }
}

// === impl RecordingServer ===

impl Dial for RecordingServer {
    fn dial(&self, _: &str) -> Dialing {
        let sender = self.0.clone();
        Box::pin(async move {
            let (ours, theirs) = duplex(PIPE_BYTES);
            tokio::spawn(serve(theirs, sender));
            io::Result::Ok(Box::new(ours) as Box<dyn UpstreamIo>)
        })
    }
}

async fn serve(mut io: DuplexStream, sender: UnboundedSender<RawRequest>) {
    let mut bytes = Vec::new();
    loop {
        match next(&bytes) {
            ParseResult::Request(request, rest) => {
                assert!(rest.is_empty(), "nothing follows a request before it is answered: {rest:?}");
                bytes.clear();
                if sender.send(request).is_err() || io.write_all(EMPTY_JSON_RESPONSE).await.is_err() {
                    return;
                }
            }
            ParseResult::Invalid => panic!("the server cannot read {:?}", String::from_utf8_lossy(&bytes)),
            ParseResult::Incomplete => match io.read_buf(&mut bytes).await {
                Ok(1..) => {}
                _ => return,
            },
        }
    }
}

// === impl RawRequest ===

impl RawRequest {
    /// Returns `true` if the server received this request: same method, target and body, and no additional field.
    fn is(&self, seen: &Self) -> bool {
        let is_theirs = |(name, _): &&(Vec<u8>, Vec<u8>)| {
            !name.starts_with(b"x-forwarded-")
                && *name != b"forwarded"
                && !PROXY_FIELDS.iter().any(|ours| ours.as_bytes() == name)
        };
        self.method == seen.method
            && path(&self.target) == seen.target
            && self.body == seen.body
            && seen.fields.iter().filter(is_theirs).all(|field| self.fields.contains(field))
    }
}

/// Returns the path and query of a target in origin or absolute form.
fn path(target: &[u8]) -> Vec<u8> {
    let target = target.split(|byte| *byte == b'#').next().unwrap_or_default();
    let scheme = target.windows(3).position(|window| window == b"://").filter(|_| !target.starts_with(b"/"));
    let Some(scheme) = scheme else { return target.to_vec() };
    let rest = &target[scheme + 3..];
    let path = rest.iter().position(|byte| matches!(byte, b'/' | b'?')).map_or(&b""[..], |at| &rest[at..]);
    if path.starts_with(b"/") { path.to_vec() } else { [b"/", path].concat() }
}

// === the plain reader ===

enum ParseResult<'a> {
    Request(RawRequest, &'a [u8]),
    Incomplete,
    Invalid,
}

/// Returns all requests before the first that is ambiguous or incomplete (RFC 9112).
fn requests(mut bytes: &[u8]) -> Vec<RawRequest> {
    let mut all = Vec::new();
    while let ParseResult::Request(request, rest) = next(bytes) {
        bytes = rest;
        let has_both = ["content-length", "transfer-encoding"]
            .iter()
            .all(|framing| request.fields.iter().any(|(name, _)| name == framing.as_bytes()));
        all.push(request);
        // Section 6.1: the connection must be closed after this request.
        if has_both {
            break;
        }
    }
    all
}

/// Parses the first request. In a head, a line feed alone also ends a line (section 2.2), but nowhere else.
fn next(mut bytes: &[u8]) -> ParseResult<'_> {
    while let [b'\r' | b'\n', rest @ ..] = bytes {
        bytes = rest;
    }
    let mut lines = Vec::new();
    loop {
        let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else { return ParseResult::Incomplete };
        let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
        bytes = &bytes[end + 1..];
        if line.is_empty() {
            break;
        }
        if line.contains(&b'\r') || line.contains(&0) {
            return ParseResult::Invalid;
        }
        lines.push(line);
    }
    let Some((mut request, coding)) = head(&lines) else { return ParseResult::Invalid };
    match coding {
        BodyFraming::Length(length) => {
            let Some((body, rest)) = bytes.split_at_checked(length) else { return ParseResult::Incomplete };
            request.body = body.to_vec();
            ParseResult::Request(request, rest)
        }
        BodyFraming::Chunked => loop {
            let Some(size) = line(&mut bytes) else { return ParseResult::Incomplete };
            let Some(size) = size.and_then(chunk_size) else { return ParseResult::Invalid };
            if size == 0 {
                break trailers(request, bytes);
            }
            let Some((data, rest)) = bytes.split_at_checked(size) else { return ParseResult::Incomplete };
            request.body.extend_from_slice(data);
            match rest {
                [b'\r', b'\n', rest @ ..] => bytes = rest,
                [] | [b'\r'] => return ParseResult::Incomplete,
                _ => return ParseResult::Invalid,
            }
        },
    }
}

fn trailers(request: RawRequest, mut bytes: &[u8]) -> ParseResult<'_> {
    loop {
        match line(&mut bytes) {
            None => return ParseResult::Incomplete,
            Some(None) => return ParseResult::Invalid,
            Some(Some(b"")) => return ParseResult::Request(request, bytes),
            Some(Some(_)) => {}
        }
    }
}

/// Takes a line that ends in CRLF. Returns `Some(None)` if the line contains a CR elsewhere or ends in LF alone.
fn line<'a>(bytes: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let line = bytes[..end].strip_suffix(b"\r").filter(|line| !line.contains(&b'\r'));
    *bytes = &bytes[end + 1..];
    Some(line)
}

enum BodyFraming {
    Length(usize),
    Chunked,
}

/// Parses a head and the coding of its body. Returns `None` if it is malformed or the length of the body is ambiguous.
fn head(lines: &[&[u8]]) -> Option<(RawRequest, BodyFraming)> {
    let (start, fields) = lines.split_first()?;
    let words: Vec<_> = start.split(|byte| *byte == b' ').collect();
    let [method, target, version] = words[..] else { return None };
    if !is_token(method) || target.is_empty() || !matches!(version, b"HTTP/1.0" | b"HTTP/1.1") {
        return None;
    }
    let fields: Option<Vec<_>> = fields
        .iter()
        .map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            let name = &line[..colon];
            let value = trim(&line[colon + 1..]).to_vec();
            is_token(name).then(|| (name.to_ascii_lowercase(), value))
        })
        .collect();
    let fields = fields?;
    let all = |wanted: &[u8]| -> Vec<&[u8]> {
        fields.iter().filter(|(name, _)| name == wanted).map(|(_, value)| &value[..]).collect()
    };
    let coding = match (&all(b"transfer-encoding")[..], &all(b"content-length")[..]) {
        ([], []) => BodyFraming::Length(0),
        ([], [first, others @ ..]) if others.iter().all(|other| number(other) == number(first)) => {
            BodyFraming::Length(number(first)?)
        }
        ([coding], _) if coding.eq_ignore_ascii_case(b"chunked") && version == b"HTTP/1.1" => {
            BodyFraming::Chunked
        }
        _ => return None,
    };
    Some((RawRequest { method: method.to_vec(), target: target.to_vec(), fields, body: Vec::new() }, coding))
}

fn is_token(text: &[u8]) -> bool {
    let is_of_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !text.is_empty() && text.iter().all(is_of_token)
}

fn trim(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = text {
        text = rest;
    }
    text
}

fn number(digits: &[u8]) -> Option<usize> {
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| is_number)?.parse().ok()
}

fn chunk_size(line: &[u8]) -> Option<usize> {
    let size = trim_end(line.split(|byte| *byte == b';').next()?);
    let is_size = !size.is_empty() && size.iter().all(u8::is_ascii_hexdigit);
    usize::from_str_radix(std::str::from_utf8(size).ok().filter(|_| is_size)?, 16).ok()
}

fn trim_end(mut text: &[u8]) -> &[u8] {
    while let [rest @ .., b' ' | b'\t'] = text {
        text = rest;
    }
    text
}
