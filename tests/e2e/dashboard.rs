//! The dashboard and its event stream, over real sockets.

use anteroom::{app::Command, drain::StopSignal};
use serde_json::Value;

use crate::support::{
    TestProxy, TestUpstream, soon, until,
    wire::{BodyPart, Wire, chat, get, get_with, streaming},
};

/// Client of the event stream.
struct Follower {
    wire: Wire,
    buf: String,
    /// Latest state of the route `tiny`.
    tiny: Value,
}

impl Follower {
    async fn new(proxy: &TestProxy) -> Self {
        let mut wire = Wire::connect(proxy.admin).await;
        wire.send(get("/api/v1/events")).await;
        let head = wire.head().await.unwrap();
        assert_eq!((head.status(), head.get("content-type")), (200, Some("text/event-stream")));
        assert_eq!(
            (head.get("cache-control"), head.get("x-accel-buffering")),
            (Some("no-store"), Some("no"))
        );
        Self { wire, buf: String::new(), tiny: Value::Null }
    }

    /// Returns the next event, or `None` at the orderly end of the stream.
    async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some((event, rest)) = self.buf.split_once("\n\n") {
                let (event, rest) = (event.to_owned(), rest.to_owned());
                self.buf = rest;
                let Some(event) = event.strip_prefix("event: ") else { continue };
                let (name, data) = event.split_once("\ndata: ").unwrap();
                let told: Value = serde_json::from_str(data).unwrap();
                // The final event has no routes.
                let routes = told["routes"].as_array();
                if let Some(tiny) = routes.into_iter().flatten().find(|route| route["name"] == "tiny") {
                    self.tiny = tiny.clone();
                }
                return Some((name.to_owned(), told));
            }
            match self.wire.part().await {
                BodyPart::Data(data) => self.buf.push_str(&String::from_utf8(data).unwrap()),
                BodyPart::Last(_) => return None,
                BodyPart::Broken => panic!("broken off, after {:?}", self.buf),
            }
        }
    }

    /// Waits until the state of `tiny` satisfies `fits`.
    async fn until(&mut self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        soon(what, async {
            while !fits(&self.tiny) {
                self.next().await.expect("more events");
            }
        })
        .await;
        self.tiny.clone()
    }
}

#[tokio::test]
async fn dashboard_is_served_with_its_security_headers() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let page = proxy.admin("/").await;
    assert_eq!((page.status(), page.get("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.get("content-security-policy").unwrap().contains("default-src 'none'"));
    assert_eq!(
        (page.get("x-content-type-options"), page.get("cache-control")),
        (Some("nosniff"), Some("no-cache"))
    );
    let text = page.text();
    let wanted = text.split('"').filter(|text| text.starts_with("dashboard/"));
    let wanted: Vec<_> = wanted.collect();
    assert!(wanted.len() > 5, "{wanted:?}");
    for name in wanted {
        let asset = proxy.admin(&format!("/{name}")).await;
        assert_eq!((asset.status(), asset.get("x-content-type-options")), (200, Some("nosniff")), "{name}");
        let tag = asset.get("etag").unwrap();
        let mut wire = Wire::connect(proxy.admin).await;
        let again = wire.ask(get_with(&format!("/{name}"), &[("If-None-Match", tag)])).await;
        assert_eq!((again.status(), again.body.len()), (304, 0), "{name}");
    }
    assert_eq!(proxy.admin("/dashboard/none.js").await.status(), 404);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn follower_gets_a_snapshot_then_each_phase() {
    let mut upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut follower = Follower::new(&proxy).await;
    let (event, told) = follower.next().await.unwrap();
    assert_eq!(
        (&*event, &told["names"][0], &told["routes"][0]["state"]),
        ("snapshot", &"tiny".into(), &"idle".into())
    );
    assert_eq!(told["about"]["port"], proxy.address.port());
    assert_eq!(told["about"]["model"], "tiny");

    let mut client = proxy.sent(chat("x")).await;
    let route =
        follower.until("it to start", |route| route["state"] == "starting" && route["held"] == 1).await;
    assert_eq!(route["phase"], "load");
    // The state has the same keys as in the API; times differ.
    let asked = proxy.route("tiny").await;
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&route), keys(&asked));
    assert_eq!(route["limits"], asked["limits"]);
    upstream.wake();
    let route = follower.until("it to be ready", |route| route["state"] == "ready").await;
    assert_eq!(route["endpoints"][0]["ready"], true);
    upstream.call().await.echo().await;
    client.response().await;
    let record = soon("the record", async {
        loop {
            let (_, told) = follower.next().await.unwrap();
            if let Some(record) = told["cold_starts"].get(0) {
                return record.clone();
            }
        }
    })
    .await;
    assert_eq!((&record["outcome"], &record["route"]), (&"completed".into(), &"tiny".into()));
    let asked = proxy.admin("/api/v1/cold-starts").await.json();
    assert_eq!(record["phases"], asked["cold_starts"][0]["phases"]);
    follower.until("nothing to be in flight", |route| route["in_flight"] == 0).await;
    drop(follower);
    proxy.stop(&[("completed", 1)]).await;
}

#[tokio::test]
async fn followers_are_limited() {
    let upstream = TestUpstream::cold().await;
    let proxy = TestProxy::tiny(&upstream.url(), "").await;
    let mut followers = Vec::new();
    for _ in 0..16 {
        followers.push(Follower::new(&proxy).await);
    }
    let refused = proxy.admin("/api/v1/events").await;
    assert_eq!((refused.status(), refused.get("retry-after")), (503, Some("5")));
    assert!(refused.json()["error"].as_str().unwrap().contains("16"), "{}", refused.text());
    followers.pop();
    until("the place of who went away", async || {
        let mut wire = Wire::connect(proxy.admin).await;
        wire.send(get("/api/v1/events")).await;
        wire.head().await.unwrap().status() == 200
    })
    .await;
    assert_eq!(proxy.admin("/readyz").await.status(), 200, "nobody else is kept from anything");
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn watcher_receives_draining_and_end() {
    let mut upstream = TestUpstream::warm().await;
    let proxy = TestProxy::start(&format!(
        "drainTimeout: 10m\n{}",
        crate::support::routes(&[crate::support::route("tiny", &upstream.url(), "")])
    ))
    .await;
    let mut client = proxy.sent(streaming("x")).await;
    let mut call = upstream.call().await;
    call.body().await;
    call.send(crate::support::upstream::STREAM).await;
    client.head().await.unwrap();
    let mut follower = Follower::new(&proxy).await;
    assert_eq!(follower.next().await.unwrap().1["about"]["draining"], false);
    proxy.commands.send(Command::Stop(StopSignal::Interrupt)).await.unwrap();
    soon("the draining", async { while follower.next().await.unwrap().1["about"]["draining"] != true {} })
        .await;
    // Requests in flight are completed.
    call.finish(crate::support::upstream::LAST).await;
    client.rest().await.unwrap();
    let last = soon("the end", async {
        let mut last = None;
        while let Some((event, _)) = follower.next().await {
            last = Some(event);
        }
        last
    });
    let (last, ()) = tokio::join!(last, proxy.stop(&[("completed", 1)]));
    assert_eq!(last.as_deref(), Some("end"));
}
