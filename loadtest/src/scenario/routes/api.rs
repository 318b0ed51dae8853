//! API server of a cluster with many routes: serves lists and watches, and accepts statuses and Events.
//!
//! It runs in the rig's event loop, so it uses no time of the measured core and needs no further thread.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};

use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use serde_json::Value;
use slab::Slab;

use super::objects::{ObjectKind, Objects, namespace};
use crate::http::{self, Framing};
use crate::listen;

/// Bits never set in tokens of the backend or the clients.
const API_LISTENER: Token = Token(1 << 40);
const API_TOKEN_BIT: usize = 1 << 41;

/// Bytes per read.
const API_READ_BYTES: usize = 64 * 1024;

#[derive(Debug)]
pub(super) struct ApiServer {
    listener: TcpListener,
    address: SocketAddr,
    connections: Slab<ApiConnection>,
    pub(super) objects: Objects,
    /// Connections that watch the objects of a kind: all, those in a namespace, or one.
    watches: HashMap<WatchScope, Vec<usize>>,
    pub(super) counts: ApiCounts,
    text: String,
}

/// Counts of requests.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub(super) struct ApiCounts {
    pub(super) watches: u64,
    pub(super) lists: u64,
    pub(super) statuses: u64,
    pub(super) events: u64,
    pub(super) told: u64,
    /// Requests for unknown paths.
    pub(super) not_found: BTreeMap<String, u64>,
}

/// Scope of a watch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct WatchScope {
    kind: ObjectKind,
    namespace: Option<String>,
    number: Option<usize>,
}

#[derive(Debug)]
struct ApiConnection {
    stream: TcpStream,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    /// Bytes of the outbox already sent.
    sent: usize,
    watched: Option<WatchScope>,
}

/// A parsed request.
struct ApiRequest<'a> {
    method: &'a str,
    path: &'a str,
    query: &'a str,
    body: &'a [u8],
}

// === impl ApiServer ===

impl ApiServer {
    pub(super) fn bind(registry: &Registry, objects: Objects) -> io::Result<Self> {
        let mut listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        registry.register(&mut listener, API_LISTENER, Interest::READABLE)?;
        let address = listener.local_addr()?;
        Ok(Self {
            listener,
            address,
            connections: Slab::new(),
            objects,
            watches: HashMap::new(),
            counts: ApiCounts::default(),
            text: String::new(),
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn owns(token: Token) -> bool {
        token == API_LISTENER || token.0 & API_TOKEN_BIT != 0
    }

    pub(super) fn on_event(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        if token == API_LISTENER {
            return self.accept(registry);
        }
        let key = token.0 & !API_TOKEN_BIT;
        let Some(connection) = self.connections.get_mut(key) else { return Ok(()) };
        let open = connection.receive() && self.answer(key);
        // Pending output is sent on every event, as the socket may have room again.
        let open = open && self.connections.get_mut(key).is_some_and(ApiConnection::flush);
        if !open {
            self.close(key);
        }
        Ok(())
    }

    /// Sends pending changes to the watches.
    pub(super) fn send_changes(&mut self) {
        for (kind, number) in self.objects.changes() {
            let mut text = std::mem::take(&mut self.text);
            text.clear();
            text.push_str(r#"{"type":"MODIFIED","object":"#);
            self.objects.write(&mut text, kind, number);
            text.push_str("}\n");
            let of = |namespace, number| WatchScope { kind, namespace, number };
            let there = Some(namespace(number));
            for watched in [of(None, None), of(there.clone(), None), of(there, Some(number))] {
                for key in self.watches.get(&watched).cloned().unwrap_or_default() {
                    self.counts.told += 1;
                    let connection = &mut self.connections[key];
                    connection.chunk(text.as_bytes());
                    if !connection.flush() {
                        self.close(key);
                    }
                }
            }
            self.text = text;
        }
    }

    fn accept(&mut self, registry: &Registry) -> io::Result<()> {
        while let Some(mut stream) = listen::next(&self.listener)? {
            let entry = self.connections.vacant_entry();
            let both = Interest::READABLE | Interest::WRITABLE;
            registry.register(&mut stream, Token(entry.key() | API_TOKEN_BIT), both)?;
            let (inbox, outbox) = (Vec::new(), Vec::new());
            entry.insert(ApiConnection { stream, inbox, outbox, sent: 0, watched: None });
        }
        Ok(())
    }

    fn close(&mut self, key: usize) {
        let Some(connection) = self.connections.try_remove(key) else { return };
        if let Some(watched) = connection.watched
            && let Some(keys) = self.watches.get_mut(&watched)
        {
            keys.retain(|other| *other != key);
        }
    }

    /// Responds to all complete requests on a connection. Returns `false` if the connection has to be closed.
    fn answer(&mut self, key: usize) -> bool {
        loop {
            let inbox = std::mem::take(&mut self.connections[key].inbox);
            let used = match parse_api_request(&inbox) {
                Ok(Some((question, used))) => {
                    self.answer_one(key, &question);
                    used
                }
                Ok(None) => 0,
                Err(_) => return false,
            };
            let connection = &mut self.connections[key];
            connection.inbox = inbox;
            connection.inbox.drain(..used);
            if used == 0 {
                return true;
            }
        }
    }

    fn answer_one(&mut self, key: usize, question: &ApiRequest<'_>) {
        let Some((watched, name, part)) = self.requested_objects(question) else {
            *self.counts.not_found.entry(question.path.to_owned()).or_default() += 1;
            return self.connections[key].respond(404, r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"the server could not find the requested resource","reason":"NotFound","code":404}"#);
        };
        let is_watch = question.query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1"));
        let mut text = std::mem::take(&mut self.text);
        text.clear();
        match (question.method, name, watched) {
            // An Event; accepted but not stored.
            ("GET", None, None) if part == "resources" => {
                self.connections[key].respond(
                    200,
                    r#"{"kind":"APIResourceList","apiVersion":"v1","groupVersion":"keda.sh/v1alpha1","resources":[]}"#,
                );
            }
            ("POST" | "PATCH", None, None) => {
                self.counts.events += 1;
                text.push_str(std::str::from_utf8(question.body).unwrap_or("{}"));
                self.connections[key].respond(201, &text);
            }
            ("PATCH", Some(number), Some(WatchScope { kind: ObjectKind::Route, .. })) if part == "status" => {
                let patch: Value = serde_json::from_slice(question.body).unwrap_or_default();
                self.counts.statuses += 1;
                self.objects.set_status(number, patch["status"].to_string());
                self.objects.write(&mut text, ObjectKind::Route, number);
                self.connections[key].respond(200, &text);
            }
            ("GET", Some(number), Some(watched)) => {
                self.objects.write(&mut text, watched.kind, number);
                self.connections[key].respond(200, &text);
            }
            ("GET", None, Some(watched)) if is_watch => {
                self.counts.watches += 1;
                self.connections[key].begin_watch(watched.clone());
                self.watches.entry(watched).or_default().push(key);
            }
            ("GET", None, Some(watched)) => {
                self.counts.lists += 1;
                self.list(&mut text, &watched);
                self.connections[key].respond(200, &text);
            }
            _ => self.connections[key].respond(405, "{}"),
        }
        self.text = text;
    }

    fn list(&self, text: &mut String, watched: &WatchScope) {
        let version = self.objects.version();
        text.push_str(&format!(
            r#"{{"kind":"List","apiVersion":"v1","metadata":{{"resourceVersion":"{version}"}},"items":["#
        ));
        let all = (0..self.objects.len()).filter(|number| {
            watched.number.is_none_or(|wanted| wanted == *number)
                && watched.namespace.as_ref().is_none_or(|wanted| *wanted == namespace(*number))
        });
        for (at, number) in all.enumerate() {
            if at > 0 {
                text.push(',');
            }
            self.objects.write(text, watched.kind, number);
        }
        text.push_str("]}");
    }

    /// Returns the objects a request addresses, the number of the object named in its path, and the subresource. No
    /// kind means an Event.
    fn requested_objects(
        &self,
        question: &ApiRequest<'_>,
    ) -> Option<(Option<WatchScope>, Option<usize>, &'static str)> {
        let path = question.path.trim_start_matches("/apis/").trim_start_matches("/api/");
        let mut steps: Vec<_> = path.split('/').collect();
        let mut inside = None;
        if let Some(at) = steps.iter().position(|step| *step == "namespaces") {
            inside = steps.get(at + 1).map(|namespace| (*namespace).to_owned());
            steps.drain(at..(at + 2).min(steps.len()));
        }
        let kind = match steps[..] {
            ["anteroom.dev", "v1alpha1", "modelroutes", ..] => ObjectKind::Route,
            ["v1", "services", ..] => ObjectKind::Service,
            ["discovery.k8s.io", "v1", "endpointslices", ..] => ObjectKind::Slice,
            ["keda.sh", "v1alpha1", "scaledobjects", ..] => ObjectKind::Scaled,
            ["keda.sh", "v1alpha1"] => return Some((None, None, "resources")),
            // Includes the PATCH of an Event's count.
            ["events.k8s.io", "v1", "events", ..] if question.method != "GET" => {
                return Some((None, None, ""));
            }
            _ => return None,
        };
        let rest = if kind == ObjectKind::Service { &steps[2..] } else { &steps[3..] };
        let named = |name: &str| self.objects.find(inside.as_deref().unwrap_or_default(), name);
        let selected = selector_name(question.query);
        // A selector that matches nothing gets a number that no object has.
        let number = selected.map(|name| named(name).unwrap_or(usize::MAX));
        let watched = WatchScope { kind, namespace: inside.clone(), number };
        match rest {
            [] => Some((Some(watched), None, "")),
            [name] => Some((Some(watched), Some(named(name)?), "")),
            [name, "status"] => Some((Some(watched), Some(named(name)?), "status")),
            _ => None,
        }
    }
}

/// Returns the object name in a selector by name or by Service.
fn selector_name(query: &str) -> Option<&str> {
    let by_name = "fieldSelector=metadata.name%3D";
    let by_service = "labelSelector=kubernetes.io%2Fservice-name%3D";
    query.split('&').find_map(|pair| pair.strip_prefix(by_name).or_else(|| pair.strip_prefix(by_service)))
}

/// Parses the request at the start of `buf` and returns it with its length.
fn parse_api_request(buf: &[u8]) -> Result<Option<(ApiRequest<'_>, usize)>, http::MalformedHttp> {
    let Some(head) = http::head(buf)? else { return Ok(None) };
    let body = match head.body {
        Framing::None => 0,
        Framing::Length(length) => length,
        // Not sent by any client here. The connection then never completes a request, which is reported.
        Framing::Chunked => usize::MAX / 2,
    };
    let len = head.len + body;
    if buf.len() < len {
        return Ok(None);
    }
    let start = std::str::from_utf8(head.start).unwrap_or_default();
    let mut words = start.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    Ok(Some((ApiRequest { method, path, query, body: &buf[head.len..len] }, len)))
}

// === impl ApiConnection ===

impl ApiConnection {
    /// Reads all available bytes. Returns `false` if the connection was closed.
    fn receive(&mut self) -> bool {
        loop {
            let filled = self.inbox.len();
            self.inbox.resize(filled + API_READ_BYTES, 0);
            let read = self.stream.read(&mut self.inbox[filled..]);
            self.inbox.truncate(filled + read.as_ref().copied().unwrap_or_default());
            match read {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    fn respond(&mut self, status: u16, body: &str) {
        let head = format!(
            "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.outbox.extend_from_slice(head.as_bytes());
        self.outbox.extend_from_slice(body.as_bytes());
    }

    fn begin_watch(&mut self, watched: WatchScope) {
        self.outbox.extend_from_slice(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
        );
        self.watched = Some(watched);
    }

    fn chunk(&mut self, data: &[u8]) {
        self.outbox.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
        self.outbox.extend_from_slice(data);
        self.outbox.extend_from_slice(b"\r\n");
    }

    /// Sends as much as the socket takes. Returns `false` if the connection was closed.
    fn flush(&mut self) -> bool {
        while self.sent < self.outbox.len() {
            match self.stream.write(&self.outbox[self.sent..]) {
                Ok(0) => return false,
                Ok(sent) => self.sent += sent,
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        self.outbox.clear();
        self.sent = 0;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mio::{Events, Poll};

    use super::*;

    /// Sends a request and runs the API until the response contains `enough`.
    fn ask(
        poll: &mut Poll,
        api: &mut ApiServer,
        client: &mut std::net::TcpStream,
        text: &str,
        enough: &str,
    ) -> String {
        client.write_all(text.as_bytes()).unwrap();
        client.set_nonblocking(true).unwrap();
        let mut events = Events::with_capacity(16);
        let mut said = Vec::new();
        for _ in 0..1000 {
            poll.poll(&mut events, Some(Duration::from_millis(10))).unwrap();
            for event in &events {
                api.on_event(poll.registry(), event.token()).unwrap();
            }
            api.send_changes();
            let mut buffer = [0; 4096];
            if let Ok(read) = client.read(&mut buffer) {
                said.extend_from_slice(&buffer[..read]);
            }
            let text = String::from_utf8_lossy(&said);
            let whole = http::head(&said).unwrap().is_some_and(|head| match head.body {
                Framing::Length(length) => said.len() == head.len + length,
                _ => text.contains(enough),
            });
            if whole || !text.starts_with("HTTP") && text.contains(enough) {
                return String::from_utf8(said).unwrap();
            }
        }
        panic!("{enough} has not come, but {}", String::from_utf8_lossy(&said));
    }

    #[test]
    fn objects_are_listed_watched_and_written() {
        let mut poll = Poll::new().unwrap();
        let mut api = ApiServer::bind(poll.registry(), Objects::new(40, 4000)).unwrap();
        let mut client = std::net::TcpStream::connect(api.address()).unwrap();
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        let routes = "/apis/anteroom.dev/v1alpha1/modelroutes";

        let list = ask(&mut poll, &mut api, &mut client, &get(&format!("{routes}?limit=500")), "]}");
        assert_eq!(list.matches("\"kind\":\"ModelRoute\"").count(), 40, "{list}");
        let slices = "/apis/discovery.k8s.io/v1/namespaces/team-3/endpointslices";
        let list = ask(&mut poll, &mut api, &mut client, &get(slices), "]}");
        assert_eq!(list.matches("EndpointSlice").count(), 2, "3 and 23: {list}");
        let one = format!("{slices}?labelSelector=kubernetes.io%2Fservice-name%3Ds23");
        let list = ask(&mut poll, &mut api, &mut client, &get(&one), "]}");
        assert_eq!(list.matches("EndpointSlice").count(), 1, "{list}");
        let absent = ask(&mut poll, &mut api, &mut client, &get("/api/v1/nodes"), "404}");
        assert!(absent.starts_with("HTTP/1.1 404"), "{absent}");

        let mut watcher = std::net::TcpStream::connect(api.address()).unwrap();
        ask(&mut poll, &mut api, &mut watcher, &get(&format!("{routes}?watch=true")), "chunked");
        let body = r#"{"status":{"held":1}}"#;
        let patch = format!(
            "PATCH /apis/anteroom.dev/v1alpha1/namespaces/team-5/modelroutes/r5/status?force=true HTTP/1.1\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let patched = ask(&mut poll, &mut api, &mut client, &patch, "held");
        assert!(patched.contains(r#""status":{"held":1}"#), "{patched}");
        let event = ask(&mut poll, &mut api, &mut watcher, "", "MODIFIED");
        assert!(event.contains("\"r5\"") && event.contains("held"), "{event}");
        assert_eq!((api.counts.watches, api.counts.statuses, api.counts.told), (1, 1, 1));
    }
}
