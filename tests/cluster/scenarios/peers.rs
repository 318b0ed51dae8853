//! Several replicas of Anteroom: each reports the demand of all.

use serde_json::json;

use crate::{
    anteroom::AnteroomReplica, model::ModelDeployment, node::history::NodeEventKind, scenario::Scenario,
    serving, wait,
};

pub(super) async fn two_replicas_with_demand_on_one(it: Scenario) {
    demand_on_one_of(it, 2).await;
}

pub(super) async fn three_replicas_with_demand_on_one(it: Scenario) {
    demand_on_one_of(it, 3).await;
}

async fn demand_on_one_of(it: Scenario, number: u8) {
    let anteroom = it.anteroom(number, json!({})).await;
    for name in ["long", "short"] {
        it.serve(
            &anteroom,
            &ModelDeployment::new(name).sim("--tokens 100000 --inter-token-time 50ms"),
            json!({}),
        )
        .await;
    }
    let streams = it.stream_of_keda(&anteroom, "long").await;
    // With three replicas, neither `other` nor `third` has KEDA's stream.
    let [other, third] = [1, 2].map(|step| &anteroom.replicas[(streams + step) % usize::from(number)]);
    let replicas = it.replicas("long").await;

    let stream = other.flow("long").await;
    // A model without demand on any replica goes to zero, after polls of any replica; twice, so that all were polled.
    for _ in 0..2 {
        wait::within("an answer", wait::WAIT_LIMIT, third.read("short", 1)).await.unwrap().unwrap();
        it.await_spec_replicas("short", 0, wait::WAIT_LIMIT).await;
        // Until the replica has noticed, requests go to the terminating pod.
        third.await_route_idle(&it, "short").await;
    }
    assert_eq!(replicas.value_history(), [0, 1]);
    stream.await_next_part().await;

    drop(stream);
    replicas.await_value(0).await;
    assert_eq!(replicas.value_history(), [0, 1, 0]);
}

pub(super) async fn killed_replica_takes_its_requests_with_it(it: Scenario) {
    let mut anteroom = it.anteroom(3, json!({ "peers": { "timeout": "15s" } })).await;
    let pool = it.pool();
    let mut model = ModelDeployment::new("tiny");
    model.node_selector = pool.clone();
    it.serve(&anteroom, &model, json!({})).await;
    // KEDA's stream is lost as well.
    let killed = it.stream_of_keda(&anteroom, "tiny").await;
    let (victim, other) = (&anteroom.replicas[killed], &anteroom.replicas[(killed + 1) % 3]);

    let kept = other.read("tiny", 4);
    let lost: Vec<_> = (0..3).map(|_| victim.read("tiny", 4)).collect();
    victim.await_held_count(&it, "tiny", 3).await;
    it.await_spec_replicas("tiny", 1, wait::WAIT_LIMIT).await;
    for replica in &anteroom.replicas {
        replica.await_reported_demand(&it, "tiny", 4.0).await;
    }
    anteroom.kill(killed).await;
    for stream in lost {
        wait::within("the end of its client", wait::WAIT_LIMIT, stream).await.unwrap().unwrap_err();
    }
    for replica in &anteroom.replicas {
        assert_eq!(replica.depth(&it, "tiny").await, 4.0, "for a while its last word counts");
    }
    for replica in &anteroom.replicas {
        replica.await_reported_demand(&it, "tiny", 1.0).await;
    }
    it.stream_of_keda(&anteroom, "tiny").await;

    let node = it.world.add_node(pool).await;
    wait::within("who waits at another replica", wait::WAIT_LIMIT, kept).await.unwrap().unwrap();
    it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
    it.await_node_events(NodeEventKind::Gone, 1).await;
    node.leave(&it.kube).await;
}

pub(super) async fn replicas_are_replaced_one_after_the_other(it: Scenario) {
    // A quarter of the timeout is reserved for sending errors, so held requests fail 6 s after the signal.
    let mut anteroom = it.anteroom(2, json!({ "drainTimeout": "8s" })).await;
    let pool = it.pool();
    let mut model = ModelDeployment::new("tiny");
    model.node_selector = pool.clone();
    it.serve(&anteroom, &model, json!({})).await;
    let first = it.stream_of_keda(&anteroom, "tiny").await;
    if first == 1 {
        anteroom.replicas.swap(0, 1);
    }
    let [old, other] = anteroom.replicas.as_mut_slice() else { panic!("there are two") };
    let replicas = it.replicas("tiny").await;

    let [told, served] = [&*old, &*other].map(|replica| replica.read("tiny", 4));
    for replica in [&*old, &*other] {
        replica.await_held_count(&it, "tiny", 1).await;
    }
    it.await_spec_replicas("tiny", 1, wait::WAIT_LIMIT).await;
    // Nothing starts in time: held requests get an error and must be retried elsewhere.
    tokio::join!(old.stop(), has_stream(other, &it));
    let error = told.await.unwrap().unwrap_err();
    assert!(error.starts_with("503") && error.contains("\"draining\""), "{error}");
    old.start().await;
    // A pod starts: held requests are served by it.
    let (node, (), ()) = tokio::join!(it.world.add_node(pool), other.stop(), has_stream(old, &it));
    served.await.unwrap().unwrap();
    other.start().await;
    assert!(replicas.value_history().starts_with(&[0, 1]), "{:?}", replicas.value_history());
    // Both serve. The linger was lost with the replicas, so the model may have gone to zero during the restarts.
    for replica in [&*old, &*other] {
        let answer = wait::within("an answer", wait::WAIT_LIMIT, replica.ask("tiny", true)).await.unwrap();
        serving::finish(answer).await.unwrap();
    }
    it.await_spec_replicas("tiny", 0, wait::WAIT_LIMIT).await;
    // KEDA backs off from a stream that ends with an error.
    let log = std::fs::read_to_string(it.world.plane.folders.logs.join("keda-operator.log")).unwrap();
    let errors = log.lines().filter(|line| line.contains(&it.namespace) && line.contains("StreamIsActive"));
    assert_eq!(errors.collect::<Vec<_>>(), Vec::<&str>::new());
    it.await_node_events(NodeEventKind::Gone, 1).await;
    node.leave(&it.kube).await;
}

async fn has_stream(replica: &AnteroomReplica, it: &Scenario) {
    wait::until("KEDA's stream", wait::WAIT_LIMIT, async || {
        match replica.gauge("anteroom_scaler_streams", it, "tiny").await {
            0.0 => Err("none".into()),
            _ => Ok(()),
        }
    })
    .await;
}
