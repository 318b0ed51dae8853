//! Scaler, peer and admin listeners flooded by other clients: legitimate ones still get a connection.

use anteroom::peer::proto::{WatchRequest, peers_client::PeersClient};
use tokio::io::AsyncWriteExt as _;

use super::scaler::{channel, next, scaled, scaler, tiny};
use crate::support::{
    TestProxy, TestUpstream, Wire, route, routes, soon, until,
    upstream::Port,
    wire::{chat, get},
};

/// Start of an HTTP/2 connection: the preface, and SETTINGS that change nothing.
const PREFACE_AND_SETTINGS: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

#[tokio::test]
async fn idle_connections_keep_no_scaler_out() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::start(&scaled(&[route("tiny", &upstream.url(), "")])).await;
    let mut first = scaler(&proxy).await;
    let mut stream = first.stream_is_active(tiny()).await.unwrap().into_inner();
    assert!(!next(&mut stream).await.unwrap().result);
    let mut idle = Vec::new();
    for _ in 0..300 {
        let mut wire = Wire::connect(proxy.scaler.unwrap()).await;
        // The proxy may have closed this connection already.
        let _ = wire.stream.write_all(PREFACE_AND_SETTINGS).await;
        idle.push(wire);
    }
    let mut second = scaler(&proxy).await;
    assert!(!soon("an answer", second.is_active(tiny())).await.unwrap().into_inner().result);
    // Connections with an open stream are kept.
    let mut client = proxy.sent(chat("x")).await;
    assert!(next(&mut stream).await.unwrap().result);
    upstream.wake();
    upstream.call().await.echo().await;
    client.response().await;
    drop(idle);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn streams_of_strangers_keep_no_replica_out() {
    let upstream = TestUpstream::cold().await;
    let port = Port::reserve();
    let place = port.url().replace("http://", "");
    let config = |listen: &str, service: String| {
        format!(
            "scaler: 127.0.0.1:0\npeers: {{ listen: \"{listen}\", service: \"{service}\" }}\n{}",
            routes(&[route("tiny", &upstream.url(), "")])
        )
    };
    let first = TestProxy::start(&config("127.0.0.1:0", place.clone())).await;
    let mut strangers = Vec::new();
    for _ in 0..7 {
        let mut client = PeersClient::new(channel(first.peers).await);
        for _ in 0..20 {
            let watch = client.watch(WatchRequest { replica: "stranger".into() });
            strangers.push(soon("a stream", watch).await.unwrap().into_inner());
        }
    }
    let second = TestProxy::start(&config(&place, first.peers.unwrap().to_string())).await;
    until("the first one", async || second.metric("anteroom_peers", &["connected"]).await == 1).await;
    let client = first.sent(chat("x")).await;
    let mut scaler = scaler(&second).await;
    until("what the first one holds", async || scaler.is_active(tiny()).await.unwrap().into_inner().result)
        .await;
    // Evicted streams end with an error: a clean end would mean that the replica is shutting down.
    let mut oldest = strangers.swap_remove(0);
    let end = soon("the end", async {
        while oldest.message().await?.is_some() {}
        Ok::<_, tonic::Status>(())
    })
    .await;
    assert_eq!(end.unwrap_err().code(), tonic::Code::ResourceExhausted);
    drop(client);
    first.await_tiny_held(0).await;
    second.stop(&[]).await;
    first.stop(&[("client_gone", 1)]).await;
}

#[tokio::test]
async fn trickling_requests_keep_no_probe_out() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut slow = Vec::new();
    for _ in 0..520 {
        let mut wire = Wire::connect(proxy.admin).await;
        let _ = wire.stream.write_all(b"GET /livez HTTP/1.1\r\nX: ").await;
        slow.push(wire);
    }
    let probe = Wire::connect(proxy.admin).await.ask(get("/livez").replace("api.test", "localhost")).await;
    assert_eq!(probe.status(), 200);
    drop(slow);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn wrong_token_follows_no_replica() {
    let upstream = TestUpstream::cold().await;
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "right\n").unwrap();
    let port = Port::reserve();
    let place = port.url().replace("http://", "");
    let config = |listen: &str, service: String| {
        format!(
            "peers: {{ listen: \"{listen}\", service: \"{service}\", tokenFile: {} }}\n{}",
            token.display(),
            routes(&[route("tiny", &upstream.url(), "")])
        )
    };
    let first = TestProxy::start(&config("127.0.0.1:0", place.clone())).await;
    let service = first.peers.unwrap().to_string();
    let second = TestProxy::start(&config(&place, service)).await;
    for proxy in [&first, &second] {
        until("each other", async || proxy.metric("anteroom_peers", &["connected"]).await == 1).await;
    }
    let mut client = PeersClient::new(channel(first.peers).await);
    let mut watch = async |shown: Option<&'static str>| {
        let mut call = tonic::Request::new(WatchRequest { replica: "stranger".into() });
        if let Some(shown) = shown {
            call.metadata_mut().insert("authorization", shown.parse().unwrap());
        }
        soon("an answer", client.watch(call)).await.map(drop).map_err(|status| status.code())
    };
    let refused = Err(tonic::Code::Unauthenticated);
    assert_eq!(watch(Some("Bearer wrong")).await, refused);
    assert_eq!(watch(Some("Bearer right2")).await, refused);
    assert_eq!(watch(Some("right")).await, refused);
    assert_eq!(watch(Some("Bearer right")).await, Ok(()));
    // Replicas of the previous release send no token.
    assert_eq!(watch(None).await, Ok(()));
    // The token file is read again after a change.
    std::fs::write(&token, "changed").unwrap();
    assert_eq!(watch(Some("Bearer right")).await, refused);
    assert_eq!(watch(Some("Bearer changed")).await, Ok(()));
    second.stop(&[]).await;
    first.stop(&[]).await;
}
