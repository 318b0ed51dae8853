//! Stored responses (`/v1/responses`): a later request for one reaches the server that stores it.

use std::{collections::BTreeMap, sync::Arc};

use anteroom::state::Protocol;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::support::{
    TestProxy, TestUpstream,
    cluster::{FakeCluster, FakePodState},
    route, routes, until,
    upstream::{UpstreamCall, answer},
    wire::{WireResponse, chat, get, post},
};

const RESPONSES: &str = "/v1/responses";

/// Model server that stores responses in memory, as vLLM does.
struct ResponsesServer {
    upstream: TestUpstream,
    state: Arc<Mutex<ResponsesServerState>>,
}

#[derive(Default)]
struct ResponsesServerState {
    name: &'static str,
    /// Status of each stored response, by id.
    kept: BTreeMap<String, &'static str>,
    /// Request lines received for stored responses.
    asked: Vec<String>,
}

impl ResponsesServer {
    async fn new(name: &'static str) -> Self {
        Self::on(TestUpstream::warm().await, name)
    }

    fn on(upstream: TestUpstream, name: &'static str) -> Self {
        let state = Arc::new(Mutex::new(ResponsesServerState { name, ..ResponsesServerState::default() }));
        let answering = state.clone();
        let upstream = upstream.automatic(move |call| respond(call, answering.clone()));
        Self { upstream, state }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().asked)
    }

    fn is_now(&self, status: &'static str) {
        self.state.lock().kept.values_mut().for_each(|of| *of = status);
    }
}

async fn respond(mut call: UpstreamCall, state: Arc<Mutex<ResponsesServerState>>) {
    let line = call.head.line().to_owned();
    let body: Value = serde_json::from_str(&call.body().await).unwrap_or_default();
    let (status, text) = {
        let mut state = state.lock();
        if line.contains(RESPONSES) {
            state.asked.push(line.clone());
        }
        state.answer(&line, &body)
    };
    // The events of a stream contain the id.
    let (kind, text) = match body["stream"] == true && status == "200 OK" {
        true => (
            "text/event-stream",
            format!(
                "event: response.created\ndata: {}\n\n",
                json!({"type": "response.created", "response": text})
            ),
        ),
        false => ("application/json", text.to_string()),
    };
    call.finish(answer(status, &[("Content-Type", kind)], &text)).await;
}

impl ResponsesServerState {
    fn answer(&mut self, line: &str, body: &Value) -> (&'static str, Value) {
        let (method, path) = line.split_once(' ').unwrap();
        let Some(rest) = path.strip_prefix(RESPONSES) else { return ("200 OK", json!({})) };
        let unknown = ("404 Not Found", json!({"error": {"message": "no such response", "code": 404}}));
        let is_known = |id: &str| self.kept.contains_key(id);
        if rest.is_empty() {
            if body["previous_response_id"].as_str().is_some_and(|id| !is_known(id)) {
                return unknown;
            }
            let id = format!("resp_{}{}", self.name, self.kept.len());
            let status = if body["background"] == true { "queued" } else { "completed" };
            self.kept.insert(id.clone(), status);
            return (
                "200 OK",
                json!({"id": id, "server": self.name, "status": status, "output": [{"id": "msg_1"}]}),
            );
        }
        let id = rest.trim_start_matches('/').split('/').next().unwrap().to_owned();
        let Some(status) = self.kept.get(&id).copied() else { return unknown };
        if method == "DELETE" {
            self.kept.remove(&id);
        }
        ("200 OK", json!({"id": id, "server": self.name, "status": status}))
    }
}

fn make(more: &str) -> String {
    post(RESPONSES, &format!(r#"{{"model":"tiny","input":"x"{more}}}"#))
}

fn id_and_server(response: &WireResponse) -> (String, String) {
    assert_eq!(response.status(), 200, "{}", response.text());
    let json = response.json();
    let text = |key: &str| json[key].as_str().unwrap().to_owned();
    (text("id"), text("server"))
}

fn delete(path: &str) -> String {
    get(path).replace("GET", "DELETE")
}

/// Starts three pods of one route, and a proxy that has found them ready.
async fn pods(cluster: &FakeCluster, more: &str) -> ([ResponsesServer; 3], TestProxy) {
    let servers =
        [ResponsesServer::new("a").await, ResponsesServer::new("b").await, ResponsesServer::new("c").await];
    cluster.publish_pods(&servers.each_ref().map(|server| (server.upstream.address, FakePodState::Ready)));
    let proxy = replica(cluster, more).await;
    (servers, proxy)
}

async fn replica(cluster: &FakeCluster, more: &str) -> TestProxy {
    let proxy = cluster.proxy(None, more).await;
    until("three pods", async || {
        let endpoints = proxy.route("tiny").await["endpoints"].as_array().cloned().unwrap_or_default();
        endpoints.iter().filter(|endpoint| endpoint["ready"] == true).count() == 3
    })
    .await;
    proxy
}

#[tokio::test]
async fn stored_responses_go_to_the_pod_that_made_them() {
    let cluster = FakeCluster::speaking(Protocol::Http1);
    let (servers, proxy) = pods(&cluster, "").await;
    let mut client = proxy.client().await;
    let mut made = Vec::new();
    for _ in 0..12 {
        made.push(id_and_server(&client.ask(make("")).await));
    }
    let _ = servers.each_ref().map(ResponsesServer::asked);
    for (id, server) in &made {
        let path = format!("{RESPONSES}/{id}");
        for request in [get(&path), get(&format!("{path}/input_items")), post(&format!("{path}/cancel"), "")]
        {
            assert_eq!(id_and_server(&client.ask(request).await), (id.clone(), server.clone()));
        }
        // Continuations go to the same server, streamed or not.
        let next = id_and_server(&client.ask(make(&format!(r#","previous_response_id":"{id}""#))).await);
        assert_eq!(next.1, *server);
        let stream = client.ask(make(&format!(r#","stream":true,"previous_response_id":"{id}""#))).await;
        let id = stream.text().split("\"id\":\"resp_").nth(1).unwrap().split('"').next().unwrap().to_owned();
        assert_eq!(id_and_server(&client.ask(get(&format!("{RESPONSES}/resp_{id}"))).await).1, *server);
        assert_eq!(id_and_server(&client.ask(delete(&path)).await).1, *server);
        let gone = client.ask(get(&path)).await;
        assert_eq!(
            (gone.status(), gone.json()["error"]["code"].as_u64()),
            (404, Some(404)),
            "the server's own words"
        );
    }
    let asked: usize = servers.iter().map(|server| server.asked().len()).sum();
    assert_eq!(asked, made.len() * 8, "nobody else is asked");
    proxy.stop(&[("completed", 12 + 12 * 8)]).await;
}

#[tokio::test]
async fn other_replica_finds_a_stored_response_by_asking() {
    let cluster = FakeCluster::speaking(Protocol::Http1);
    let (servers, proxy) = pods(&cluster, "").await;
    let mut client = proxy.client().await;
    let mut made = Vec::new();
    for _ in 0..6 {
        made.push(id_and_server(&client.ask(make("")).await));
    }
    let other = replica(&cluster, "").await;
    let mut client = other.client().await;
    for (number, (id, server)) in made.iter().enumerate() {
        let path = format!("{RESPONSES}/{id}");
        match number % 3 {
            0 => assert_eq!(id_and_server(&client.ask(get(&path)).await).1, *server),
            1 => assert_eq!(id_and_server(&client.ask(post(&format!("{path}/cancel"), "")).await).1, *server),
            _ => {
                let next = make(&format!(r#","previous_response_id":"{id}""#));
                assert_eq!(id_and_server(&client.ask(next).await).1, *server);
            }
        }
        // The proxy has learned which server stores the response, so it asks no other.
        let _ = servers.each_ref().map(ResponsesServer::asked);
        assert_eq!(id_and_server(&client.ask(get(&path)).await).1, *server);
        assert_eq!(servers.iter().map(|server| server.asked().len()).sum::<usize>(), 1);
    }
    let unknown = client.ask(get("/v1/responses/resp_nobodys")).await;
    unknown.is_error(404, "unknown_path");
    assert!(unknown.text().contains("resp_nobodys"), "{}", unknown.text());
    // A continuation of an unknown response is left to the server to reject.
    let next = client.ask(make(r#","previous_response_id":"resp_nobodys""#)).await;
    assert_eq!((next.status(), next.json()["error"]["code"].as_u64()), (404, Some(404)));
    proxy.stop(&[("completed", 6)]).await;
    other.stop(&[("completed", 13)]).await;
}

#[tokio::test]
async fn stored_response_is_found_across_routes() {
    let (one, two) = (ResponsesServer::new("one").await, ResponsesServer::new("two").await);
    let config = routes(&[
        route("one", &one.upstream.url(), ""),
        route("tiny", &two.upstream.url(), ""),
        route("down", "http://127.0.0.1:1", ""),
    ]);
    let proxy = TestProxy::start(&config).await;
    let mut client = proxy.client().await;
    let (id, _) = id_and_server(&client.ask(make("")).await);
    assert_eq!(
        client.ask(post("/v1/chat/completions", r#"{"model":"one"}"#)).await.status(),
        200,
        "both are up"
    );
    let path = format!("{RESPONSES}/{id}");
    for request in [get(&path), post(&format!("{path}/cancel"), ""), delete(&path)] {
        assert_eq!(id_and_server(&client.ask(request).await), (id.clone(), "two".into()));
    }
    assert!(one.asked().is_empty());
    proxy.stop(&[("completed", 5)]).await;
}

#[tokio::test]
async fn request_pinned_to_a_busy_pod_lets_others_pass() {
    let mut slow = TestUpstream::warm().await;
    let fast = ResponsesServer::new("fast").await;
    let cluster = FakeCluster::speaking(Protocol::Http1);
    cluster.publish_pods(&[(slow.address, FakePodState::Ready)]);
    let proxy = cluster.proxy(None, "concurrency: { max: 1, rampStart: 1 }").await;
    let mut client = proxy.sent(make("")).await;
    let mut call = slow.call().await;
    call.body().await;
    call.finish(answer("200 OK", &[], r#"{"id":"resp_slow"}"#)).await;
    assert_eq!(client.response().await.status(), 200);
    let mut busy = proxy.sent(chat("busy")).await;
    let call = slow.call().await;
    cluster
        .publish_pods(&[(slow.address, FakePodState::Ready), (fast.upstream.address, FakePodState::Ready)]);
    let mut pinned = proxy.sent(make(r#","previous_response_id":"resp_slow""#)).await;
    proxy.await_tiny_held(1).await;
    for _ in 0..3 {
        assert_eq!(proxy.ask(chat("passes")).await.status(), 200);
    }
    proxy.await_tiny_held(1).await;
    call.echo().await;
    assert_eq!(busy.response().await.status(), 200);
    let mut call = slow.call().await;
    assert!(call.body().await.contains("resp_slow"));
    call.finish(answer("200 OK", &[], "{}")).await;
    assert_eq!(pinned.response().await.status(), 200);
    assert!(fast.asked().is_empty());
    proxy.stop(&[("completed", 6)]).await;
}

#[tokio::test]
async fn background_job_is_demand_while_it_runs() {
    let server = ResponsesServer::new("a").await;
    let proxy = TestProxy::tiny(&server.upstream.url(), "").await;
    let mut client = proxy.client().await;
    let (id, _) = id_and_server(&client.ask(make(r#","background":true,"store":true"#)).await);
    proxy.await_outcome("completed", 200, 1).await;
    let gate = proxy.gate().await;
    assert_eq!((gate.requests(), gate.in_flight()), (1, 0), "the job keeps the target");
    let question = format!("GET {RESPONSES}/{id}");
    until("a question", async || server.asked().contains(&question)).await;
    server.is_now("in_progress");
    until("another", async || server.asked().contains(&question)).await;
    assert_eq!(gate.requests(), 1);
    server.is_now("completed");
    until("the end of the job", async || gate.requests() == 0).await;
    // A job that does not run in the background ends with its response.
    assert_eq!(client.ask(make("")).await.status(), 200);
    proxy.await_outcome("completed", 200, 2).await;
    assert_eq!(gate.requests(), 0);
    proxy.stop(&[("completed", 2)]).await;
}
