use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::*;
use crate::kube::stand_in::FakeApiServer;

const PODS: &str = "/api/v1/namespaces/ml/pods";
/// Upper bound of every wait; far above what the tests need.
const INFORMER_TEST_TIMEOUT: Duration = Duration::from_secs(30);

fn pod(name: &str, app: &str) -> Value {
    json!({ "metadata": { "name": name, "namespace": "ml", "labels": { "app": app, "tier": "gpu" } } })
}

fn of_app(app: &str) -> ObjectSelector {
    ObjectSelector::of(&format!("app={app}"))
}

fn names(part: &Subset<Pod>) -> Vec<String> {
    let mut names: Vec<_> = part.all().iter().map(|pod| pod.name_any()).collect();
    names.sort();
    names
}

async fn until(part: &mut Subset<Pod>, wanted: &[&str]) {
    let waiting = async {
        while !part.is_synced() || names(part) != wanted {
            part.changed().await;
        }
    };
    assert!(timeout(INFORMER_TEST_TIMEOUT, waiting).await.is_ok(), "{:?} instead of {wanted:?}", names(part));
}

#[test]
fn equality_selectors_are_recognised() {
    let labels = |pairs: &[(&str, &str)]| {
        ObjectSelector::Labels(
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        )
    };
    assert_eq!(ObjectSelector::of("app=a"), labels(&[("app", "a")]));
    assert_eq!(ObjectSelector::of("b=2,a="), labels(&[("a", ""), ("b", "2")]));
    for other in ["a in (b, c)", "a!=b", "a", "!a", "a=b,a=c", "a==b"] {
        assert_eq!(ObjectSelector::of(other), ObjectSelector::Selector(other.into()), "{other}");
    }
}

#[tokio::test]
async fn equal_subsets_share_watch_until_last_drop() {
    let api = FakeApiServer::default();
    api.put_in(PODS, pod("one", "a"));
    let informers = Informers::<Pod>::new(api.cluster(), |_| {});
    let (mut first, mut second) = (informers.watch("ml", of_app("a")), informers.watch("ml", of_app("a")));
    until(&mut first, &["one"]).await;
    until(&mut second, &["one"]).await;
    api.await_watch_count(1).await;
    drop((first, second));
    api.await_watch_count(0).await;
}

#[tokio::test]
async fn subsets_share_the_watch_of_their_namespace() {
    let api = FakeApiServer::default();
    api.put_in(PODS, pod("one", "app-20"));
    let informers = Informers::<Pod>::new(api.cluster(), |_| {});
    let mut all: Vec<_> =
        (0..30).map(|number| informers.watch("ml", of_app(&format!("app-{number}")))).collect();
    let mut gpu = informers.watch("ml", ObjectSelector::of("tier=gpu,app=app-21"));
    let mut selected = informers.watch("ml", ObjectSelector::of("app in (app-20)"));
    until(&mut all[20], &["one"]).await;
    until(&mut all[21], &[]).await;
    until(&mut selected, &["one"]).await;
    // There is one watch for the namespace, and one for the set-based selector.
    api.await_watch_count(2).await;

    // The index over two labels covers objects that were known before it was built.
    api.put_in(PODS, pod("two", "app-21"));
    until(&mut all[21], &["two"]).await;
    until(&mut gpu, &["two"]).await;
    assert_eq!(names(&all[20]), ["one"], "of others nothing is heard");
    // A pod whose labels change moves to another subset.
    api.put_in(PODS, pod("two", "app-22"));
    until(&mut all[22], &["two"]).await;
    until(&mut all[21], &[]).await;
    until(&mut gpu, &[]).await;
    api.remove(&format!("{PODS}/two"));
    until(&mut all[22], &[]).await;

    // The API server is unreachable for a while; changes in between are observed once it is back.
    api.refuse_connections().await;
    let failed = async {
        while all[20].failure().is_none() {
            all[20].changed().await;
        }
    };
    assert!(timeout(INFORMER_TEST_TIMEOUT, failed).await.is_ok());
    assert_eq!(names(&all[20]), ["one"], "what was known stays");
    api.put_in(PODS, pod("three", "app-20"));
    api.accept_connections();
    until(&mut all[20], &["one", "three"]).await;
    drop((all, gpu, selected));
    api.await_watch_count(0).await;
}
