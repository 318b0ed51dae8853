use http::Request;

use super::*;

fn forward(headers: &[(&str, &str)], uri: &str) -> (request::Parts, HeaderValue) {
    let mut request = Request::post(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (mut parts, ()) = request.body(()).unwrap().into_parts();
    let host = host(&parts.uri, &parts.headers).unwrap();
    let id = prepare_request(&mut parts, &host, Some("192.0.2.7:1234".parse().unwrap()));
    (parts, id)
}

#[test]
fn hop_by_hop_headers_are_removed() {
    let (parts, _) = forward(
        &[
            ("host", "api.example"),
            ("connection", "close, X-Secret"),
            ("x-secret", "1"),
            ("keep-alive", "5"),
            ("te", "trailers, deflate"),
            ("upgrade", "h2c"),
            ("transfer-encoding", "chunked"),
            ("proxy-authorization", "Basic x"),
            ("expect", "100-continue"),
            ("authorization", "Bearer x"),
        ],
        "/v1/models?a=b",
    );
    for gone in ["x-secret", "keep-alive", "upgrade", "transfer-encoding", "proxy-authorization", "expect"] {
        assert!(!parts.headers.contains_key(gone), "{gone}");
    }
    assert_eq!(parts.headers["te"], "trailers");
    assert_eq!(parts.headers["connection"], "TE");
    assert_eq!(parts.headers["authorization"], "Bearer x");
    assert_eq!(parts.uri, "/v1/models?a=b");
}

#[test]
fn forwarding_headers_are_continued() {
    let (parts, id) = forward(&[("host", "api.example")], "/");
    assert_eq!(parts.headers["x-forwarded-for"], "192.0.2.7");
    assert_eq!(parts.headers["x-forwarded-host"], "api.example");
    assert_eq!(parts.headers["x-forwarded-proto"], "http");
    assert_eq!(parts.headers["via"], "1.1 anteroom");
    assert_eq!(parts.headers["x-request-id"], id);
    assert_eq!(id.len(), 32);
    assert!(!parts.headers.contains_key("forwarded"));
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let (parts, id) = forward(
        &[
            ("host", "api.example"),
            ("x-forwarded-for", "198.51.100.1"),
            ("x-forwarded-for", "198.51.100.2"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=198.51.100.1"),
            ("via", "1.1 lb"),
            ("x-request-id", "mine"),
            ("traceparent", trace),
        ],
        "http://other.example/v1/x",
    );
    assert_eq!(parts.headers["x-forwarded-for"], "198.51.100.1, 198.51.100.2, 192.0.2.7");
    assert_eq!(parts.headers["x-forwarded-proto"], "https");
    assert_eq!(parts.headers["forwarded"], "for=198.51.100.1, for=192.0.2.7;proto=http");
    assert_eq!(parts.headers["via"], "1.1 lb, 1.1 anteroom");
    assert_eq!(
        (id.to_str().unwrap(), &parts.headers["traceparent"]),
        ("mine", &HeaderValue::from_static(trace))
    );
    assert_eq!(parts.headers["host"], "other.example", "the absolute form overrides the header");
}

#[test]
fn invalid_traceparent_is_removed() {
    for (text, good) in [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", true),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", false),
    ] {
        let (parts, _) = forward(&[("host", "a"), ("traceparent", text)], "/");
        assert_eq!(parts.headers.contains_key("traceparent"), good, "{text}");
    }
}

#[test]
fn host_must_be_a_name_or_an_address() {
    for good in
        ["", "a", "a.b:80", "a:", "a_b~%41:65535", "127.0.0.1:1", "[::1]", "[::1]:8080", "[2001:db8::1]:"]
    {
        assert!(is_host(good), "{good}");
    }
    for bad in [
        "]",
        "[",
        "[]",
        "[::1",
        "::1",
        "[::1]80",
        "[::1]:x",
        "[::1]:65536",
        "[a]",
        "[::1%eth0]",
        ":80",
        ":",
        "a:b",
        "a:-1",
        "a:+1",
        "a:65536",
        "a:80:80",
        "a@b",
        "a/b",
        "a#b",
        "a b",
        "a,b",
        "a]",
        "a[",
        "a]:80",
    ] {
        assert!(!is_host(bad), "{bad}");
    }
    // Next to an absolute target.
    let mut headers = HeaderMap::new();
    headers.insert(HOST, HeaderValue::from_static("a:b"));
    assert!(host(&Uri::from_static("http://a.test/x"), &headers).is_err());
}

#[test]
fn reserved_response_headers_are_removed() {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("x-anteroom-cold-start", "true"),
        ("x-anteroom-other", "1"),
        ("x-keda-http-cold-start", "true"),
        ("x-another", "1"),
        ("server-timing", r#"db;dur=1;desc="a, hold;dur=2, \\\", queue", hold;dur=3 , Upstream;dur=4"#),
        ("server-timing", "load, cache;dur=5,, first_byte;dur=6"),
    ] {
        headers.append(name, HeaderValue::from_static(value));
    }
    remove_reserved(&mut headers);
    let timing = r#"db;dur=1;desc="a, hold;dur=2, \\\", queue", cache;dur=5"#;
    assert_eq!(headers.len(), 2, "{headers:?}");
    assert_eq!(
        (&headers["x-another"], &headers["server-timing"]),
        (&"1".parse().unwrap(), &timing.parse().unwrap())
    );
    let mut headers = HeaderMap::new();
    headers.insert("server-timing", HeaderValue::from_static("hold;dur=1"));
    remove_reserved(&mut headers);
    assert!(headers.is_empty());
}

#[test]
fn connection_cannot_remove_caller_fields() {
    for (name, stays) in [
        ("api-key", true),
        ("ocp-apim-subscription-key", true),
        ("x-tenant", true),
        ("x-tenant-id", true),
        ("x-auth-request-email", true),
        ("x-real-ip", true),
        ("x-amzn-oidc-data", true),
        ("x_user", true),
        ("content-encoding", true),
        ("x-hop", false),
        ("x-secret", false),
        ("keys", false),
        ("http2-settings", false),
    ] {
        let (parts, _) =
            forward(&[("host", "a"), ("connection", &format!("close, {name}")), (name, "1")], "/");
        assert_eq!(parts.headers.contains_key(name), stays, "{name}");
    }
}

#[test]
fn missing_or_repeated_host_is_rejected() {
    let mut headers = HeaderMap::new();
    assert!(host(&Uri::from_static("/"), &headers).is_err());
    headers.append(HOST, HeaderValue::from_static("a"));
    headers.append(HOST, HeaderValue::from_static("b"));
    assert!(host(&Uri::from_static("/"), &headers).is_err());
}
