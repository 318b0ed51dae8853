//! API paths that report on the model server: the model list, `/version` and `/load`. None of them wakes a server.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use serde_json::json;

use crate::support::{
    TestProxy, TestUpstream, route, routes,
    upstream::{UpstreamCall, answer},
    wire::{WireResponse, chat, get, post},
};

/// Responds as vLLM does: a list of these models, `/version`, and an empty object for anything else.
fn vllm(
    models: &'static [&'static str],
    version: &'static str,
    asked: &Arc<AtomicUsize>,
) -> impl Fn(UpstreamCall) -> HandlerFuture + use<> {
    let asked = asked.clone();
    move |mut call: UpstreamCall| {
        let asked = asked.clone();
        Box::pin(async move {
            let entry = |id: &&str| {
                json!({"id": id, "object": "model", "created": 1, "owned_by": "vllm", "root": "org/base",
                       "parent": null, "max_model_len": 4096, "permission": []})
            };
            let body = match call.head.line() {
                "GET /v1/models" => {
                    asked.fetch_add(1, Ordering::SeqCst);
                    json!({"object": "list", "data": models.iter().map(entry).collect::<Vec<_>>()})
                }
                "GET /version" => json!({ "version": version }),
                _ => json!({}),
            };
            call.body().await;
            let json = [("Content-Type", "application/json")];
            call.finish(answer("200 OK", &json, &body.to_string())).await;
        })
    }
}

type HandlerFuture = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// Returns a chat request for this model.
fn chat_to(model: &str) -> String {
    post("/v1/chat/completions", &format!(r#"{{"model":"{model}"}}"#))
}

fn ids(list: &WireResponse) -> Vec<String> {
    let list = list.json();
    let data = list["data"].as_array().unwrap_or_else(|| panic!("{list}"));
    data.iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn list_has_server_entries_once_ready() {
    let asked = Arc::<AtomicUsize>::default();
    let upstream = TestUpstream::cold().await.automatic(vllm(&["tiny", "foreign"], "1", &asked));
    let config = routes(&[
        route("tiny", &upstream.url(), "match: { models: [tiny, tiny-alias] }"),
        route("big", "http://127.0.0.1:1", ""),
    ]);
    let proxy = TestProxy::start(&config).await;
    let mut client = proxy.client().await;
    // Checks the fields that `vllm bench serve` reads.
    let made_up = client.ask(get("/v1/models")).await.json();
    assert_eq!((&made_up["data"][1]["id"], &made_up["data"][1]["root"]), (&json!("tiny"), &json!("tiny")));
    assert_eq!(upstream.accepted(), 0, "nothing is asked at zero");

    upstream.wake();
    assert_eq!(client.ask(chat("up")).await.status(), 200);
    let list = client.ask(get("/v1/models")).await;
    assert_eq!(ids(&list), ["big", "tiny", "tiny-alias"], "a model that no route names is not served");
    let own = &list.json()["data"][1];
    assert_eq!((&own["root"], &own["max_model_len"]), (&json!("org/base"), &json!(4096)));
    assert_eq!(&client.ask(get("/v1/models/tiny")).await.json(), own);
    client.ask(get("/v1/models/foreign")).await.is_error(404, "model_not_found");
    for _ in 0..20 {
        client.ask(get("/v1/models")).await;
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1, "the server is asked once a minute at most");
    assert_eq!(proxy.metric("anteroom_admitted_requests_total", &[]).await, 1);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn many_lists_at_once_ask_the_server_once() {
    let asked = Arc::<AtomicUsize>::default();
    let upstream = TestUpstream::warm().await.automatic(vllm(&["tiny"], "1", &asked));
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    assert_eq!(proxy.ask(chat("up")).await.status(), 200);
    let mut clients = Vec::new();
    for _ in 0..50 {
        clients.push(proxy.sent(get("/v1/models")).await);
    }
    for mut client in clients {
        assert_eq!(client.response().await.json()["data"][0]["owned_by"], "vllm");
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn route_for_any_model_lists_server_models() {
    let asked = Arc::<AtomicUsize>::default();
    let upstream = TestUpstream::warm().await.automatic(vllm(&["base", "lora"], "1", &asked));
    let proxy = TestProxy::tiny(&upstream.url(), "match: {}").await;
    let mut client = proxy.client().await;
    assert_eq!(ids(&client.ask(get("/v1/models")).await), [""; 0]);
    assert_eq!(client.ask(chat_to("lora")).await.status(), 200);
    assert_eq!(ids(&client.ask(get("/v1/models")).await), ["base", "lora"]);
    assert_eq!(client.ask(get("/v1/models/lora")).await.json()["max_model_len"], 4096);
    client.ask(get("/v1/models/other")).await.is_error(404, "model_not_found");
    // The server stops; requests for its models would still wake it.
    let url = upstream.url();
    drop(upstream);
    assert_eq!(ids(&client.ask(get("/v1/models")).await), ["base", "lora"]);
    // A changed target drops the model list of the old one.
    let other = TestUpstream::cold().await;
    assert_ne!(other.url(), url);
    proxy.reload(&routes(&[route("tiny", &other.url(), "match: {}")])).await;
    crate::support::until("the list to go", async || ids(&proxy.ask(get("/v1/models")).await).is_empty())
        .await;
    assert_eq!(other.accepted(), 0);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn failed_model_list_keeps_the_generated_one() {
    let huge = format!(r#"{{"data":[{{"id":"tiny","x":"{}"}}]}}"#, "x".repeat(300 << 10));
    let bodies = [
        ("401 Unauthorized", "{}"),
        ("200 OK", "[]"),
        ("200 OK", r#"{"data":[{"id":7}]}"#),
        ("200 OK", &huge),
    ];
    for (status, body) in bodies {
        let mut upstream = TestUpstream::warm().await;
        let proxy = TestProxy::tiny(&upstream.url(), "").await;
        let mut client = proxy.sent(chat("up")).await;
        upstream.call().await.echo().await;
        client.response().await;
        client.send(get("/v1/models")).await;
        let mut call = upstream.call().await;
        assert_eq!(call.head.line(), "GET /v1/models");
        call.send(answer(status, &[], body)).await;
        let entry = &client.response().await.json()["data"][0];
        assert_eq!(
            (&entry["id"], &entry["owned_by"]),
            (&json!("tiny"), &json!("anteroom")),
            "{status} {body:.40}"
        );
        // After a failure the list is not requested again for a while.
        assert_eq!(client.ask(get("/v1/models")).await.status(), 200);
        assert_eq!(upstream.pending(), 0);
        proxy.stop(&[("completed", 1)]).await;
    }
}

#[tokio::test]
async fn version_and_load_are_forwarded_without_waking() {
    let asked = Arc::<AtomicUsize>::default();
    let upstream = TestUpstream::cold().await.automatic(vllm(&[], "0.32.0", &asked));
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = proxy.client().await;
    for path in ["/version", "/load"] {
        let refused = client.ask(get(path)).await;
        refused.is_error(404, "unknown_path");
        assert!(refused.text().contains("needs a running model server"), "{}", refused.text());
        let wrong = client.ask(post(path, "{}")).await;
        wrong.is_error(405, "method_not_allowed");
        assert_eq!(wrong.get("allow"), Some("GET"));
    }
    assert_eq!(upstream.accepted(), 0, "not even a probe");
    upstream.wake();
    assert_eq!(client.ask(chat("up")).await.status(), 200);
    assert_eq!(client.ask(get("/version")).await.json()["version"], "0.32.0");
    assert_eq!(client.ask(get("/load")).await.status(), 200);
    // A batch counts as work, like a chat.
    let batch = client.ask(post("/v1/chat/completions/batch", r#"{"model":"tiny","messages":[[]]}"#)).await;
    assert_eq!(batch.status(), 200);
    proxy.stop(&[("completed", 4)]).await;
}

#[tokio::test]
async fn batch_wakes_the_server_as_a_chat_does() {
    let asked = Arc::<AtomicUsize>::default();
    let upstream = TestUpstream::cold().await.automatic(vllm(&[], "1", &asked));
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut client = proxy.sent(post("/v1/chat/completions/batch", r#"{"model":"tiny"}"#)).await;
    proxy.await_tiny_held(1).await;
    upstream.wake();
    assert_eq!(client.response().await.status(), 200);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn version_goes_to_the_host_or_the_only_ready_one() {
    let asked = Arc::<AtomicUsize>::default();
    let one = TestUpstream::warm().await.automatic(vllm(&[], "one", &asked));
    let two = TestUpstream::warm().await.automatic(vllm(&[], "two", &asked));
    let three = TestUpstream::warm().await.automatic(vllm(&[], "three", &asked));
    let config = routes(&[
        route("one", &one.url(), ""),
        route("two", &two.url(), ""),
        route("three", &three.url(), "match: { models: [three], hosts: [three.test] }"),
    ]);
    let proxy = TestProxy::start(&config).await;
    let mut client = proxy.client().await;
    let at_three = get("/version").replace("api.test", "three.test");
    let version = |response: WireResponse| response.json()["version"].as_str().unwrap_or_default().to_owned();
    client.ask(get("/version")).await.is_error(404, "unknown_path");
    client.ask(&at_three).await.is_error(404, "unknown_path");
    // Another route is up, but not the one for this host.
    assert_eq!(client.ask(chat_to("two")).await.status(), 200);
    assert_eq!(version(client.ask(get("/version")).await), "two");
    client.ask(&at_three).await.is_error(404, "unknown_path");
    let body = chat_to("three").replace("api.test", "three.test");
    assert_eq!(client.ask(body).await.status(), 200);
    assert_eq!(version(client.ask(&at_three).await), "three");
    assert_eq!(version(client.ask(get("/version")).await), "two");
    // Two routes are up, so the request is ambiguous.
    assert_eq!(client.ask(chat_to("one")).await.status(), 200);
    let refused = client.ask(get("/version")).await;
    refused.is_error(400, "invalid_request");
    assert!(refused.text().contains("match.hosts"), "{}", refused.text());
    assert_eq!(version(client.ask(&at_three).await), "three");
    proxy.stop(&[("completed", 7)]).await;
}
