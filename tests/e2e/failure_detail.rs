//! Failure messages: clients get the proxy's reason; the output and the address of the model server are for operators.

use crate::support::{
    TestProxy, TestUpstream, route, routes, soon,
    wire::{chat, streaming},
};

/// Output of the model server before it fails, with a secret in each line.
const SERVER_OUTPUT: [&str; 3] = [
    "using key sk-0123456789abcdef",
    "args: --api-key letmein token=letmein",
    "RuntimeError: 401 for hf_AbCdEfGhIjKlMnOp with Bearer letmein0123",
];

/// Substrings that must not appear in any output.
const SECRETS: [&str; 4] = ["0123456789abcdef", "letmein", "AbCdEfGhIjKlMnOp", "letmein0123"];

/// Returns a route whose model server prints these lines and fails.
fn failing(more: &str) -> String {
    // Runs long enough for an early head to be sent where one is due.
    let script = SERVER_OUTPUT.map(|line| format!("echo '{line}'; ")).concat() + "sleep 0.3; exit 3";
    let command = serde_json::json!(["sh", "-c", script, "-", "{port}"]);
    let target = format!("target: {{ process: {{ command: {command} }} }}");
    format!("  - {{ name: tiny, match: {{ models: [tiny] }}, {target}, {more} }}\n")
}

fn has_no_secret(text: &str) {
    assert!(!SECRETS.iter().any(|secret| text.contains(secret)), "{text}");
}

#[tokio::test]
async fn client_reads_no_output_of_the_server() {
    let early = "keepalive: { mode: comment, after: 1ms, interval: 1h }";
    for (more, request) in [("", chat("x")), (early, streaming("x"))] {
        let proxy = TestProxy::start(&routes(&[failing(more)])).await;
        let mut client = proxy.sent(request).await;
        let head = client.head().await.unwrap();
        let told = match head.status() {
            200 => soon("the end", client.rest()).await.unwrap(),
            status => {
                assert_eq!(status, 503);
                let length = head.get("content-length").unwrap().parse().unwrap();
                String::from_utf8(client.exact(length).await.unwrap()).unwrap()
            }
        };
        assert!(
            told.contains("could not be started: the command exited with code 3 while loading. Its output"),
            "{told}"
        );
        assert!(told.contains("under this request's id (x-request-id)"), "{told}");
        assert!(told.contains("cold_start_failed") && !told.contains("RuntimeError"), "{told}");

        // Operators get all lines, with the secrets redacted.
        let record = proxy.admin("/api/v1/cold-starts").await.json()["cold_starts"][0].clone();
        let reason = record["reason"].as_str().unwrap();
        assert!(reason.ends_with("its last line: RuntimeError: 401 for hf_… with Bearer …"), "{reason}");
        let lines = record["last_lines"].as_array().unwrap();
        let expected =
            ["using key sk-…", "args: --api-key … token=…", "RuntimeError: 401 for hf_… with Bearer …"];
        assert_eq!(lines[..], expected);
        let story = proxy.admin("/api/v1/requests").await.text();
        assert!(story.contains("RuntimeError: 401"), "{story}");
        has_no_secret(&story);
        has_no_secret(&proxy.admin("/api/v1/routes").await.text());
        proxy.stop(&[("cold_start_failed", 1)]).await;
    }
}

#[tokio::test]
async fn full_detail_has_the_last_lines() {
    let proxy = TestProxy::start(&routes(&[failing("failure: { detail: full }")])).await;
    let response = proxy.ask(chat("x")).await;
    response.is_error(503, "cold_start_failed");
    let told = response.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(told.contains("\nIts last lines:\nusing key sk-…\nargs: --api-key … token=…\n"), "{told}");
    has_no_secret(&told);
    proxy.stop(&[("cold_start_failed", 1)]).await;
}

#[tokio::test]
async fn client_reads_no_address_of_an_endpoint() {
    for (more, is_told) in [("", false), ("failure: { detail: full }", true)] {
        let mut upstream = TestUpstream::warm().await;
        let proxy = TestProxy::start(&routes(&[route("tiny", &upstream.url(), more)])).await;
        let mut client = proxy.sent(chat("x")).await;
        upstream.call().await.reset();
        upstream.call().await.reset();
        let response = client.response().await;
        response.is_error(502, "upstream_error");
        let address = upstream.url().replace("http://", "");
        assert_eq!(response.text().contains(&address), is_told, "{}", response.text());
        assert_eq!(response.text().contains("the endpoint"), !is_told, "{}", response.text());
        let stories = proxy.admin("/api/v1/requests").await.text();
        assert!(stories.contains(&address), "{stories}");
        proxy.stop(&[("upstream_error", 1)]).await;
    }
}
