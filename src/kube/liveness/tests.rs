//! Tests with an API server whose connections become half open.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher;
use serde_json::{Value, json};
use tokio::time::{advance, sleep};

use super::*;
use crate::kube::{Cluster, Watched, stand_in::FakeApiServer};

const LIVENESS_PODS_PATH: &str = "/api/v1/namespaces/ml/pods";

fn pod(name: &str) -> Value {
    json!({ "metadata": { "name": name, "namespace": "ml" }, "spec": { "containers": [] } })
}

struct LivenessTest {
    server: FakeApiServer,
    cluster: Cluster,
    pods: Watched<Pod>,
}

impl LivenessTest {
    async fn new() -> Self {
        let server = FakeApiServer::default();
        let cluster = server.cluster();
        let pods = cluster.watch_in::<Pod>(vec![cluster.api("ml")], watcher::Config::default(), |_| {});
        let mut stage = Self { server, cluster, pods };
        stage.create_and_observe("a").await;
        stage
    }

    /// Creates a pod, and returns the time until it is observed.
    async fn create_and_observe(&mut self, name: &str) -> Duration {
        let began = Instant::now();
        self.server.put(&format!("{LIVENESS_PODS_PATH}/{name}"), pod(name));
        while self.pods.get("ml", name).is_none() {
            self.pods.changed().await;
        }
        began.elapsed()
    }

    /// Returns the numbers of open watches, of losses so far, and of watches currently lost.
    fn counts(&self) -> (usize, u64, usize) {
        self.cluster.liveness().counts()
    }
}

#[tokio::test(start_paused = true)]
async fn half_open_watch_is_replaced_within_30_s() {
    let mut stage = LivenessTest::new().await;
    stage.server.make_watches_half_open();
    let took = stage.create_and_observe("b").await;
    // A watch lasts 20 s, plus up to 4 s at random and 3 s of margin; the retry follows after 0.2 to 0.4 s.
    assert!(took > Duration::from_secs(5) && took < Duration::from_secs(28), "{took:?}");
    assert_eq!(stage.counts(), (1, 1, 0));
    assert!(stage.create_and_observe("c").await < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn half_open_connection_of_retry_is_abandoned() {
    let mut stage = LivenessTest::new().await;
    stage.server.make_watches_half_open();
    stage.server.leave_unanswered(1);
    let took = stage.create_and_observe("b").await;
    assert!(took < Duration::from_secs(39), "{took:?}: 27, 10 for a head that does not come, and two pauses");
    assert_eq!(stage.counts(), (1, 1, 0), "it was lost once");
}

#[tokio::test(start_paused = true)]
async fn quiet_watches_are_not_lost() {
    let mut stage = LivenessTest::new().await;
    for _ in 0..60 {
        sleep(Duration::from_secs(60)).await;
        assert_eq!(stage.cluster.liveness().describe_loss(Some("ml")), None);
    }
    assert_eq!(stage.counts().1, 0, "an hour without a change");
    assert!(stage.create_and_observe("b").await < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn lost_watch_is_reported_for_its_namespace() {
    let mut stage = LivenessTest::new().await;
    stage.server.make_watches_half_open();
    stage.server.leave_unanswered(usize::MAX);
    let trouble = |stage: &LivenessTest, namespace| stage.cluster.liveness().describe_loss(namespace);
    let began = Instant::now();
    while trouble(&stage, Some("ml")).is_none() {
        sleep(Duration::from_millis(100)).await;
    }
    assert!(began.elapsed() < Duration::from_secs(34), "{:?}: 28, and it has lasted 5", began.elapsed());
    let told = trouble(&stage, Some("ml")).unwrap();
    assert!(
        told.contains("The watch of pods is interrupted") && told.contains("has sent nothing for"),
        "{told}"
    );
    assert_eq!((trouble(&stage, Some("other")), stage.counts()), (None, (0, 1, 1)));
    stage.server.leave_unanswered(0);
    stage.create_and_observe("b").await;
    assert_eq!((trouble(&stage, Some("ml")), stage.counts()), (None, (1, 1, 0)));
}

#[tokio::test(start_paused = true)]
async fn unwanted_lost_watch_is_dropped() {
    let stage = LivenessTest::new().await;
    stage.server.make_watches_half_open();
    stage.server.leave_unanswered(usize::MAX);
    sleep(Duration::from_secs(35)).await;
    let LivenessTest { cluster, pods, server: _server } = stage;
    assert!(cluster.liveness().describe_loss(None).is_some());
    drop(pods);
    sleep(ABANDONED_AFTER).await;
    assert_eq!((cluster.liveness().describe_loss(None), cluster.liveness().counts().2), (None, 0));
}

#[tokio::test(start_paused = true)]
async fn stalled_answer_is_abandoned_unless_log() {
    use futures_util::AsyncBufReadExt as _;
    let stage = LivenessTest::new().await;
    stage.server.leave_unanswered(1);
    let began = Instant::now();
    let listed = stage.cluster.api::<Pod>("ml").list(&<_>::default()).await;
    let error = super::super::error_chain::error_chain(&listed.unwrap_err());
    assert!(error.contains("did not answer within 30s"), "{error}");
    assert_eq!(began.elapsed().as_secs(), 30);
    let follow = kube::api::LogParams { follow: true, ..Default::default() };
    let mut log = std::pin::pin!(stage.cluster.api::<Pod>("ml").log_stream("a", &follow).await.unwrap());
    let waits = tokio::time::timeout(Duration::from_secs(3600), log.fill_buf());
    assert!(waits.await.is_err(), "it may load for an hour and print nothing");
}

#[test]
fn watch_timeout_grows_with_watch_count() {
    let liveness = Arc::<Liveness>::default();
    let watch_duration = |open: usize| {
        liveness.open.store(open, Ordering::Relaxed);
        liveness.watch_timeout_secs()
    };
    for _ in 0..100 {
        assert!((20..25).contains(&watch_duration(1)) && (20..25).contains(&watch_duration(100)));
        assert!((200..205).contains(&watch_duration(1000)), "five a second begin again");
        assert!((285..=290).contains(&watch_duration(100_000)));
    }
    let uri: Uri = "/api/v1/pods?&watch=true&timeoutSeconds=290&allowWatchBookmarks=true".parse().unwrap();
    let uri = with_timeout(&uri, 20).unwrap();
    assert_eq!(uri, "/api/v1/pods?&watch=true&allowWatchBookmarks=true&timeoutSeconds=20");
}

#[tokio::test(start_paused = true)]
async fn busy_watch_is_not_cut_at_its_timeout() {
    use http_body_util::BodyExt as _;
    let (frames, body) = tokio::sync::mpsc::unbounded_channel();
    let body = tokio_stream::wrappers::UnboundedReceiverStream::new(body);
    let body = http_body_util::StreamBody::new(body);
    let deadline = Some(IdleDeadline::new(Instant::now() + Duration::from_secs(23), WATCH_MARGIN));
    let mut body = LivenessBody { inner: Some(Box::pin(body)), deadline, watch: None };
    for _ in 0..30 {
        advance(Duration::from_secs(1)).await;
        frames.send(Ok::<_, std::io::Error>(Frame::data(Bytes::from_static(b"{}")))).unwrap();
        assert!(body.frame().await.unwrap().is_ok());
    }
    let last = Instant::now();
    assert!(body.frame().await.unwrap().is_err());
    assert_eq!((last.elapsed(), body.frame().await.is_none()), (WATCH_MARGIN, true));
}

#[tokio::test(start_paused = true)]
async fn overloaded_api_server_counts_as_loss() {
    use axum::http::StatusCode;
    for status in [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS] {
        let overloaded = axum::Router::new().fallback(async move || status);
        let cluster = Cluster::served_by(overloaded, &crate::config::Kubernetes::default());
        let began = Instant::now();
        assert!(cluster.api::<Pod>("ml").watch(&<_>::default(), "0").await.is_err());
        assert_eq!(began.elapsed(), Duration::ZERO, "it is not waited out where nobody sees it");
        sleep(OBSTACLE_GRACE).await;
        let told = cluster.liveness().describe_loss(Some("ml")).unwrap();
        assert!(told.contains(status.as_str()), "{told}");
    }
}
