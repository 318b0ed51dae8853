//! Web pages of other sites: on a loopback address, and where `cors` is configured, they cannot wake a target or read
//! responses.

use anteroom::domain::Intercept;
use bytes::Bytes;
use http_body_util::Full;

use crate::support::{
    TestProxy, TestUpstream, Wire, h2, route, routes, soon,
    upstream::answer,
    wire::{CHAT, chat, get, get_with, post_with},
};

/// Origin of another site's page.
const FOREIGN_ORIGIN: &str = "https://evil.example";

/// Starts a proxy on a loopback address with the default host check, or with these further keys.
async fn start_on_loopback(url: &str, keys: &str) -> TestProxy {
    let yaml = routes(&[route("tiny", url, "")]);
    assert!(yaml.contains("allowedHosts"), "{yaml}");
    TestProxy::start(&yaml.replace("allowedHosts: [\"*\"]\n", keys)).await
}

/// Returns a simple request (as CORS defines it) with these headers.
fn simple(host: &str, fields: &[(&str, &str)]) -> String {
    post_with(CHAT, fields, r#"{"model":"tiny"}"#)
        .replace("application/json", "text/plain")
        .replace("api.test", host)
}

/// Asserts that the request gets 403 and wakes nothing.
async fn is_refused(proxy: &TestProxy, request: String) {
    let response = proxy.ask(&request).await;
    assert_eq!((response.status(), &*response.code()), (403, "cross_site"), "{request}");
    assert_eq!(response.get("access-control-allow-origin"), None, "{request}");
    assert_eq!(proxy.route("tiny").await["state"], "idle", "{request}");
}

#[tokio::test]
async fn foreign_page_wakes_nothing_on_loopback() {
    let upstream = TestUpstream::cold().await;
    let proxy = start_on_loopback(&upstream.url(), "").await;
    let host = proxy.address.to_string();
    let own = format!("http://{host}");
    for fields in [
        &[("Origin", FOREIGN_ORIGIN), ("Sec-Fetch-Site", "cross-site")][..],
        &[("Origin", FOREIGN_ORIGIN)],
        &[("Sec-Fetch-Site", "cross-site")],
        &[("Sec-Fetch-Site", "Same-Origin")],
        &[("Origin", "http://localhost:3000"), ("Sec-Fetch-Site", "same-site")],
        &[("Origin", "http://127.0.0.1:1")],
        &[("Origin", "http://127.0.0.1")],
        &[("Origin", "null")],
        &[("Origin", "")],
        &[("Origin", "HTTPS://EVIL.EXAMPLE")],
        &[("Origin", "http://127.0.0.1.evil.example")],
        &[("ORIGIN", FOREIGN_ORIGIN), ("origin", &own)],
        &[("Origin", &own), ("Origin", FOREIGN_ORIGIN)],
        &[("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")],
    ] {
        is_refused(&proxy, simple(&host, fields)).await;
    }
    // Other kinds of requests: an image, a WebSocket, a preflight.
    let as_host = |request: String| request.replace("api.test", &host);
    is_refused(&proxy, as_host(get_with("/v1/models", &[("Sec-Fetch-Site", "cross-site")]))).await;
    let upgrade = [("Origin", FOREIGN_ORIGIN), ("Connection", "Upgrade"), ("Upgrade", "websocket")];
    is_refused(&proxy, as_host(get_with("/v1/realtime", &upgrade))).await;
    let preflight = get_with(CHAT, &[("Origin", FOREIGN_ORIGIN), ("Access-Control-Request-Method", "POST")]);
    is_refused(&proxy, as_host(preflight.replace("GET", "OPTIONS"))).await;
    assert_eq!(proxy.refused("cross_site").await, 17);
    assert_eq!((upstream.probes(), upstream.requests()), (0, 0));
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn foreign_host_wakes_nothing_on_loopback() {
    let upstream = TestUpstream::cold().await;
    let proxy = start_on_loopback(&upstream.url(), "").await;
    for host in [
        "evil.example",
        "evil.example.",
        "EVIL.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "8.8.8.8",
        "[2001:db8::1]:8080",
    ] {
        // After DNS rebinding, the origin matches the host, and without TLS there is no Sec-Fetch-Site.
        is_refused(&proxy, simple(host, &[("Origin", &format!("http://{host}"))])).await;
        is_refused(&proxy, simple(host, &[])).await;
    }
    // An absolute-form target takes precedence over Host, as does `:authority` in HTTP/2.
    let absolute =
        simple(&proxy.address.to_string(), &[]).replace(CHAT, &format!("http://evil.example{CHAT}"));
    is_refused(&proxy, absolute).await;
    let mut client = h2::connect(proxy.address).await;
    let mut request = h2::post(proxy.address, CHAT, r#"{"model":"tiny"}"#);
    *request.uri_mut() = format!("http://evil.example{CHAT}").parse().unwrap();
    assert_eq!(soon("an answer", client.send_request(request)).await.unwrap().status(), 403);
    let mut request: http::Request<Full<Bytes>> = h2::post(proxy.address, CHAT, r#"{"model":"tiny"}"#);
    request.headers_mut().insert("origin", FOREIGN_ORIGIN.parse().unwrap());
    assert_eq!(soon("an answer", client.send_request(request)).await.unwrap().status(), 403);
    assert_eq!(proxy.route("tiny").await["state"], "idle");
    assert_eq!((upstream.probes(), upstream.requests()), (0, 0));
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn own_pages_and_clients_are_served_on_loopback() {
    let mut upstream = TestUpstream::warm().await;
    let yaml = routes(&[route("tiny", &upstream.url(), "match: { hosts: [llm.example, api.test] }")]);
    let yaml = yaml.replace("allowedHosts: [\"*\"]", "allowedHosts: [\"*.home.example\", vpn.example]");
    let proxy = TestProxy::start(&yaml.replace("hosts: [", "hosts: [\"*.lan.example\", ")).await;
    let port = proxy.address.port();
    let own = format!("http://llm.example:{port}");
    let mut asked = 0;
    let mut serves = async |request: String| {
        let mut client = proxy.sent(&request).await;
        upstream.call().await.echo().await;
        assert_eq!(client.response().await.status(), 200, "{request}");
        asked += 1;
    };
    // A command-line client; a page of this proxy; a page behind a TLS proxy on this machine, also if that sends its
    // own Host; an address typed into the browser.
    serves(chat("x")).await;
    serves(simple(&format!("llm.example:{port}"), &[("Origin", &own)])).await;
    serves(simple("llm.example", &[("Origin", "https://llm.example")])).await;
    let behind = [("Origin", "https://chat.example"), ("Sec-Fetch-Site", "same-origin")];
    serves(simple("llm.example", &behind)).await;
    serves(simple("llm.example", &[("Sec-Fetch-Site", "none")])).await;
    for host in ["LLM.example", "llm.example:443", "a.lan.example"] {
        serves(simple(host, &[])).await;
    }
    // Hosts that are local, belong to this machine or are configured get past the check, to the router.
    let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for host in [
        "localhost",
        "localhost.",
        "api.localhost:8080",
        "gpu.local",
        "gpu.internal",
        "[::1]:8080",
        "[fd00::1]",
        "192.168.1.7:8080",
        "a.home.example",
        "VPN.example.",
        machine.trim(),
    ] {
        let response = proxy.ask(simple(host, &[])).await;
        assert_eq!((response.status(), &*response.code()), (404, "unknown_path"), "{host}");
    }
    proxy.stop(&[("completed", asked)]).await;
}

#[tokio::test]
async fn listed_origin_may_ask_and_read() {
    let mut upstream = TestUpstream::warm().await;
    let keys = "cors: { origins: [\"https://chat.example\", \"http://localhost:3000\"] }\n";
    let proxy = start_on_loopback(&upstream.url(), keys).await;
    // The proxy itself responds to the preflight, whether the target is up or not.
    let preflight = |origin: &str, path: &str| {
        let fields = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "authorization, content-type"),
            ("Sec-Fetch-Site", "cross-site"),
        ];
        get_with(path, &fields).replace("GET", "OPTIONS").replace("api.test", "localhost")
    };
    let response = proxy.ask(preflight("https://chat.example", CHAT)).await;
    assert_eq!((response.status(), response.body.len()), (204, 0));
    for (name, value) in [
        ("access-control-allow-origin", "https://chat.example"),
        ("access-control-allow-methods", "POST"),
        ("access-control-allow-headers", "authorization, content-type"),
        ("access-control-max-age", "600"),
    ] {
        assert_eq!(response.get(name), Some(value), "{name}");
    }
    assert!(response.head.all("vary").contains(&"Origin"), "{:?}", response.head);
    assert_eq!((proxy.route("tiny").await["state"].clone(), upstream.requests()), ("idle".into(), 0));
    proxy.ask(preflight("https://chat.example", "/v1/nothing")).await.is_error(404, "unknown_path");
    proxy.ask(preflight(FOREIGN_ORIGIN, CHAT)).await.is_error(403, "cross_site");

    // Every response is readable for a listed origin, unless the server sends its own Access-Control-Allow-Origin.
    let listed = [("Origin", "HTTP://localhost:3000"), ("Sec-Fetch-Site", "same-site")];
    let mut client = proxy.sent(simple("localhost", &listed)).await;
    upstream.call().await.echo().await;
    let response = client.response().await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.get("access-control-allow-origin"), Some("HTTP://localhost:3000"));
    assert!(response.get("access-control-expose-headers").unwrap().contains("retry-after"));
    let mut client = proxy.sent(simple("localhost", &listed)).await;
    upstream.call().await.finish(answer("200 OK", &[("Access-Control-Allow-Origin", "*")], "")).await;
    assert_eq!(client.response().await.head.all("access-control-allow-origin"), ["*"]);
    let unknown = simple("localhost", &listed).replace("tiny", "none");
    let refused = proxy.ask(unknown).await;
    refused.is_error(404, "model_not_found");
    assert_eq!(refused.get("access-control-allow-origin"), Some("HTTP://localhost:3000"));

    // An unlisted page is rejected, and so is one that sends a listed origin in addition to its own.
    is_refused_warm(&proxy, simple("localhost", &[("Origin", "https://chat.example:8443")])).await;
    is_refused_warm(&proxy, simple("localhost", &[("Origin", "http://chat.example")])).await;
    is_refused_warm(
        &proxy,
        simple("localhost", &[("Origin", "https://chat.example"), ("Origin", FOREIGN_ORIGIN)]),
    )
    .await;
    is_refused_warm(&proxy, simple("localhost", &[("Sec-Fetch-Site", "cross-site")])).await;
    // With `*`, every origin is allowed.
    proxy
        .reload(&format!("cors: {{ origins: [\"*\"] }}\n{}", routes(&[route("tiny", &upstream.url(), "")])))
        .await;
    crate::support::until("the list of all", async || {
        proxy.ask(simple("localhost", &[("Origin", FOREIGN_ORIGIN)]).replace("tiny", "none")).await.status()
            == 404
    })
    .await;
    proxy.stop(&[("completed", 2)]).await;
}

async fn is_refused_warm(proxy: &TestProxy, request: String) {
    let response = proxy.ask(&request).await;
    assert_eq!((response.status(), &*response.code()), (403, "cross_site"), "{request}");
}

#[tokio::test]
async fn other_binds_are_guarded_if_cors_is_configured() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = start_on_loopback(&upstream.url(), "").await.reachable();
    let fields = [("Origin", FOREIGN_ORIGIN), ("Sec-Fetch-Site", "cross-site")];
    let mut client = proxy.sent(simple("evil.example", &fields)).await;
    upstream.call().await.echo().await;
    assert_eq!(client.response().await.status(), 200);
    let configured = anteroom::config::Config { cors: Some(Default::default()), ..Default::default() };
    proxy.shared.cross_site.set(&configured, ([0, 0, 0, 0], 0).into());
    is_refused_warm(&proxy, simple("localhost", &fields)).await;
    is_refused_warm(&proxy, simple("evil.example", &[])).await;
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn page_opens_no_websocket_to_an_application() {
    let upstream = TestUpstream::warm().await;
    let proxy = start_on_loopback("http://127.0.0.1:1", "").await;
    proxy.intercept(&upstream.url(), Intercept::default()).await;
    let upgrade = [("Origin", FOREIGN_ORIGIN), ("Connection", "Upgrade"), ("Upgrade", "websocket")];
    is_refused_warm(&proxy, get_with("/chat", &upgrade).replace("api.test", "localhost")).await;
    is_refused_warm(&proxy, get("/chat")).await;
    assert_eq!(upstream.requests(), 0);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn admin_port_is_guarded_on_every_path() {
    let upstream = TestUpstream::cold().await;
    // The admin port is guarded even if the request port is not.
    let proxy = start_on_loopback(&upstream.url(), "").await.reachable();
    let ask = async |request: String| Wire::connect(proxy.admin).await.ask(request).await;
    let paths =
        ["/", "/metrics", "/livez", "/readyz", "/api/v1/routes", "/api/v1/events", "/dashboard/app.js", "/x"];
    for path in paths {
        for fields in [
            &[("Sec-Fetch-Site", "cross-site")][..],
            &[("Origin", FOREIGN_ORIGIN)],
            &[("Origin", "null")],
            &[("Sec-Fetch-Site", "same-site"), ("Origin", "http://localhost:1")],
        ] {
            let response = ask(get_with(path, fields).replace("api.test", "localhost")).await;
            assert_eq!(response.status(), 403, "{path} {fields:?}");
            assert_eq!(response.json()["code"], "cross_site");
        }
        assert_eq!(ask(get(path).replace("api.test", "evil.example")).await.status(), 403, "{path}");
    }
    let two = get_with("/metrics", &[("Host", "evil.example")]).replace("api.test", "localhost");
    assert_eq!(ask(two).await.status(), 400);
    // Scrapers and probes, by address or by cluster name; the dashboard itself; a link to it.
    let own = proxy.admin.to_string();
    for host in [&*own, "203.0.113.7:8081", "[2001:db8::7]:8081", "anteroom-admin.llm.svc", "anteroom:8081"] {
        assert_eq!(ask(get("/livez").replace("api.test", host)).await.status(), 200, "{host}");
    }
    let page = [("Sec-Fetch-Site", "same-origin"), ("Origin", &*format!("http://{own}"))];
    assert_eq!(ask(get_with("/api/v1/routes", &page).replace("api.test", &own)).await.status(), 200);
    let link =
        [("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "document")];
    assert_eq!(ask(get_with("/", &link).replace("api.test", &own)).await.status(), 200);
    assert_eq!(ask(get_with("/api/v1/routes", &link).replace("api.test", &own)).await.status(), 403);
    let frame = [link[0], link[1], ("Sec-Fetch-Dest", "iframe")];
    assert_eq!(ask(get_with("/", &frame).replace("api.test", &own)).await.status(), 403);
    proxy.stop(&[]).await;
}
