//! Silent losses: a machine that loses power, and connections to the apiserver that an intermediary forgets.

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use serde_json::{Value, json};

use crate::{
    cloud::NodeTemplate,
    model::{ModelDeployment, ScaledObjectManifest},
    scenario::Scenario,
    wait,
};

/// The kernel gives up a connection after 30 s without an acknowledgement or a keep-alive response, and
/// `responseTimeout` is 30 min: a connection that ends within [`wait::WAIT_LIMIT`] was ended by the kernel.
pub(super) async fn node_that_loses_power_gives_back_its_requests(it: Scenario) {
    let anteroom = it.anteroom(1, json!({})).await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    let mut node = it.world.add_node(NodeTemplate { wired: true, ..it.machine() }).await;
    // One request streams for hours, and those queued behind it get no head.
    let mut model =
        ModelDeployment::new("tiny").sim("--max-running 1 --inter-token-time 100ms --tokens 100000");
    model.node_selector = it.pool();
    let mut scaled = ScaledObjectManifest::of(&model, &anteroom);
    scaled.max = 1;
    it.serve_scaled(&anteroom, &model, json!({}), &scaled).await;
    let flow = replica.flow("tiny").await;
    flow.await_next_part().await;
    let waiting = (0..3).map(|_| replica.ask("tiny", false));
    let power = async {
        let in_flight = async |number: u64| {
            wait::until(&format!("{number} in flight"), wait::WAIT_LIMIT, async || {
                let now = replica.route(&it, "tiny").await;
                if now["in_flight"] == number { Ok(()) } else { Err(now.to_string()) }
            })
            .await;
        };
        in_flight(4).await;
        it.apply(&spare()).await;
        it.endpoints("tiny", 2).await;
        wait::until("two endpoints", wait::WAIT_LIMIT, async || {
            let now = replica.route(&it, "tiny").await;
            let ready = now["endpoints"].as_array().into_iter().flatten().filter(|one| one["ready"] == true);
            if ready.count() == 2 { Ok(()) } else { Err(now.to_string()) }
        })
        .await;
        in_flight(4).await;
        node.lose_power().await;
        wait::within("the end of the stream", wait::WAIT_LIMIT, flow.ends()).await;
    };
    let (answers, ()) =
        wait::within("the answers", 2 * wait::WAIT_LIMIT, async { tokio::join!(join_all(waiting), power) })
            .await;
    for answer in answers {
        let answer = answer.unwrap();
        let status = answer.status;
        assert_eq!(status, 200, "{}", answer.text().await.unwrap());
    }

    // No agent ends the pods any more; they would block the deletion of their namespace with its routes.
    node.leave(&it.kube).await;
    let now = DeleteParams::default().grace_period(0);
    it.api::<Pod>().delete_collection(&now, &ListParams::default()).await.unwrap();
}

/// Builds another server for the same Service, on a machine that stays up.
fn spare() -> Value {
    let mut model = ModelDeployment::new("spare");
    model.replicas = 1;
    let [mut deployment, _] = model.objects();
    let labels = json!({ "app": "tiny", "spare": "yes" });
    deployment["spec"]["selector"]["matchLabels"] = labels.clone();
    deployment["spec"]["template"]["metadata"]["labels"] = labels;
    deployment
}

pub(super) async fn half_open_watches_are_replaced(it: Scenario) {
    let (anteroom, relay) = it.anteroom_behind_relay().await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.serve(&anteroom, &ModelDeployment::new("tiny"), json!({})).await;
    let losses = async || replica.metric("anteroom_cluster_watch_losses_total").await.unwrap();
    let before = losses().await;
    relay.forget();
    // None of the forgotten watches can report the pod during the 290 s that kube requests for a watch.
    wait::within("the answer", wait::WAIT_LIMIT, replica.read("tiny", 4)).await.unwrap().unwrap();
    assert!(losses().await > before);
}

pub(super) async fn silent_apiserver_is_an_obstacle(it: Scenario) {
    let (anteroom, relay) = it.anteroom_behind_relay().await;
    let [replica] = anteroom.replicas.as_slice() else { panic!("there is one") };
    it.serve(&anteroom, &ModelDeployment::new("tiny"), json!({})).await;
    let lost = async || replica.metric("anteroom_cluster_watches{state=\"lost\"").await;
    relay.set_deaf(true);
    relay.forget();
    let asked = replica.read("tiny", 4);
    let silence = async {
        let why = it.obstacle(replica, "tiny", Some("api_server_unreachable")).await;
        let why = why["message"].as_str().unwrap();
        assert!(
            why.contains("the API server has sent nothing for") || why.contains("did not answer within"),
            "{why}"
        );
        assert!(lost().await > Some(0.0));
        let series =
            format!("anteroom_obstacle{{route=\"{}/tiny\",kind=\"api_server_unreachable\"", it.namespace);
        assert_eq!(replica.metric(&series).await, Some(1.0));
        relay.set_deaf(false);
    };
    let (answer, ()) =
        wait::within("the answer", 2 * wait::WAIT_LIMIT, async { tokio::join!(asked, silence) }).await;
    answer.unwrap().unwrap();
    it.obstacle(replica, "tiny", None).await;
    wait::until("all watches to be heard", wait::WAIT_LIMIT, async || {
        let lost = lost().await;
        if lost == Some(0.0) { Ok(()) } else { Err(format!("{lost:?}")) }
    })
    .await;
}
