//! A model behind Anteroom and KEDA: everything a request needs to wake it, and observers of it.

use std::{collections::BTreeMap, time::SystemTime};

use futures_util::StreamExt as _;
use k8s_openapi::api::apps::v1::Deployment;
use kube::runtime::{WatchStreamExt as _, watcher};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    anteroom::{Anteroom, AnteroomReplica},
    client::{self, StreamingResponse},
    model::{self, ModelDeployment, ScaledObjectManifest},
    scenario::Scenario,
    wait,
};

/// Values of a Deployment's `spec.replicas`, with the time of each change.
pub(crate) struct ReplicaChanges {
    seen: watch::Receiver<Vec<(SystemTime, i32)>>,
    _task: AbortOnDropHandle<()>,
}

/// Response that a task reads to its end.
pub(crate) type ResponseTask = AbortOnDropHandle<Result<String, String>>;

/// Response that continues until it is dropped, which closes the connection.
pub(crate) struct OpenResponse {
    /// Number of parts received.
    parts: watch::Receiver<u64>,
    _task: AbortOnDropHandle<()>,
}

// === impl Scenario ===

impl Scenario {
    /// Deploys a model, its ModelRoute with `spec` merged into the common one, and a ScaledObject that polls often and
    /// scales to zero quickly; waits until KEDA would receive a push.
    pub(crate) async fn serve(&self, anteroom: &Anteroom, model: &ModelDeployment, spec: Value) {
        let scaled = ScaledObjectManifest::of(model, anteroom);
        self.serve_scaled(anteroom, model, spec, &scaled).await;
    }

    /// Same as [`Self::serve`], with this ScaledObject.
    pub(crate) async fn serve_scaled(
        &self,
        anteroom: &Anteroom,
        model: &ModelDeployment,
        spec: Value,
        scaled: &ScaledObjectManifest,
    ) {
        self.deploy(model).await;
        let mut all = json!({
            "match": { "models": [model.name] },
            "target": { "service": { "name": model.name, "port": 80 } },
            "scaling": { "linger": "2s" },
        });
        // A target has exactly one kind.
        if spec.get("target").is_some() {
            all["target"] = json!({});
        }
        model::merge(&mut all, &spec);
        let route = json!({
            "apiVersion": "anteroom.dev/v1alpha1", "kind": "ModelRoute", "metadata": { "name": model.name }, "spec": all,
        });
        self.apply(&route).await;
        self.wait_for_condition("anteroom.dev/v1alpha1", "ModelRoute", &model.name, "Accepted", "True").await;
        self.scale(scaled).await;
        // KEDA drops pushes until the ScaledObject's status lists a metric.
        let objects = self.dynamic("keda.sh/v1alpha1", "ScaledObject");
        wait::object(&objects, &scaled.name, "a metric in its status", wait::WAIT_LIMIT, |object| {
            let names = object?.data.pointer("/status/externalMetricNames")?.as_array()?;
            (!names.is_empty()).then_some(())
        })
        .await;
        self.stream_of_keda(anteroom, &model.name).await;
        for replica in &anteroom.replicas {
            replica.await_scaled_object_seen(self, &model.name).await;
        }
    }

    /// Waits until KEDA has a stream for a route, and returns the index of its replica.
    pub(crate) async fn stream_of_keda(&self, anteroom: &Anteroom, route: &str) -> usize {
        wait::until("KEDA's stream", wait::WAIT_LIMIT, async || {
            for (index, replica) in anteroom.replicas.iter().enumerate() {
                if replica.gauge("anteroom_scaler_streams", self, route).await > 0.0 {
                    return Ok(index);
                }
            }
            Err("none".into())
        })
        .await
    }

    /// Returns the labels of a node that is added later.
    pub(crate) fn pool(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("pool".to_owned(), self.namespace.clone())])
    }

    /// Records the values of a Deployment's `spec.replicas` from now on.
    pub(crate) async fn replicas(&self, deployment: &str) -> ReplicaChanges {
        let (note, seen) = watch::channel(Vec::new());
        let (api, name) = (self.api::<Deployment>(), deployment.to_owned());
        let task = tokio::spawn(async move {
            let mut objects =
                std::pin::pin!(watcher::watch_object(api, &name).backoff(wait::ShortBackoff::default()));
            while let Some(event) = objects.next().await {
                let Ok(Some(object)) = event else { continue };
                let replicas = object.spec.and_then(|spec| spec.replicas).unwrap_or_default();
                note.send_if_modified(|seen: &mut Vec<_>| {
                    let is_new = seen.last().is_none_or(|&(_, last)| last != replicas);
                    if is_new {
                        seen.push((SystemTime::now(), replicas));
                    }
                    is_new
                });
            }
        });
        let mut first = seen.clone();
        let known = first.wait_for(|seen| !seen.is_empty());
        wait::within("the number of replicas", wait::WAIT_LIMIT, known).await.unwrap();
        ReplicaChanges { seen, _task: AbortOnDropHandle::new(task) }
    }
}

// === impl ReplicaChanges ===

impl ReplicaChanges {
    /// Waits until `spec.replicas` has this value.
    pub(crate) async fn await_value(&self, replicas: i32) {
        let mut seen = self.seen.clone();
        let reached = seen.wait_for(|seen| seen.last().is_some_and(|&(_, last)| last == replicas));
        if tokio::time::timeout(wait::WAIT_LIMIT, reached).await.is_err() {
            panic!(
                "spec.replicas is not {replicas} within {:?}, but went {:?}",
                wait::WAIT_LIMIT,
                self.value_history()
            );
        }
    }

    /// Returns the values in order, without repetition.
    pub(crate) fn value_history(&self) -> Vec<i32> {
        self.seen.borrow().iter().map(|&(_, replicas)| replicas).collect()
    }

    /// Returns the time at which the value was first set at or after `moment`.
    pub(crate) fn time_of_value(&self, replicas: i32, moment: SystemTime) -> SystemTime {
        let seen = self.seen.borrow();
        let found = seen.iter().find(|&&(at, number)| at >= moment && number == replicas);
        found.unwrap_or_else(|| panic!("not {replicas} since {moment:?}: {seen:?}")).0
    }

    /// Waits until the value is above zero at or after `moment`, and returns that time. Other watches may have seen it
    /// earlier.
    pub(crate) async fn await_nonzero(&self, moment: SystemTime) -> SystemTime {
        let find = |seen: &Vec<(SystemTime, i32)>| {
            seen.iter().find(|&&(at, number)| at >= moment && number > 0).map(|&(at, _)| at)
        };
        let mut seen = self.seen.clone();
        let seen = wait::within("replicas", wait::WAIT_LIMIT, seen.wait_for(|seen| find(seen).is_some()))
            .await
            .unwrap();
        find(&seen).unwrap()
    }

    /// Returns the values up to a moment.
    pub(crate) fn values_until(&self, moment: SystemTime) -> Vec<i32> {
        let seen = self.seen.borrow();
        seen.iter().filter(|&&(at, _)| at <= moment).map(|&(_, replicas)| replicas).collect()
    }
}

// === impl ScaledObjectManifest ===

impl ScaledObjectManifest {
    /// Builds a ScaledObject for a model and its route, with a poll every second and a cooldown of 3 s.
    pub(crate) fn of(model: &ModelDeployment, anteroom: &Anteroom) -> Self {
        let mut scaled = Self::new(&model.name, &anteroom.scaler(), json!({ "route": model.name }));
        (scaled.polling, scaled.cooldown) = (1, 3);
        scaled
    }
}

// === impl AnteroomReplica ===

impl AnteroomReplica {
    /// Returns the value of a metric for a route of the scenario's namespace; 0 if it does not exist.
    pub(crate) async fn gauge(&self, name: &str, it: &Scenario, route: &str) -> f64 {
        let series = format!("{name}{{route=\"{}/{route}\"", it.namespace);
        self.metric(&series).await.unwrap_or_default()
    }

    /// Returns a route as reported by the admin API.
    pub(crate) async fn route(&self, it: &Scenario, route: &str) -> Value {
        let name = format!("{}/{route}", it.namespace);
        let all = self.api("/api/v1/routes").await;
        let found = all["routes"].as_array().unwrap().iter().find(|one| one["name"] == name.as_str());
        found.unwrap_or_else(|| panic!("no route {name} in {all}")).clone()
    }

    /// Waits until the replica knows that KEDA takes pushes for a route, and the current number of replicas: without a
    /// previous value it cannot detect an increase.
    pub(crate) async fn await_scaled_object_seen(&self, it: &Scenario, route: &str) {
        wait::until("the ScaledObject to be seen", wait::WAIT_LIMIT, async || {
            let seen = self.route(it, route).await["scaled_objects"].clone();
            let mut all = seen.as_array().into_iter().flatten();
            let is_known = all.any(|one| one["is_listed"] == true && one["is_scaled"].is_boolean());
            if is_known { Ok(()) } else { Err(seen.to_string()) }
        })
        .await;
    }

    /// Returns the finished cold starts of a route, newest first.
    pub(crate) async fn cold_starts(&self, it: &Scenario, route: &str) -> Vec<Value> {
        let mut found = self.api(&format!("/api/v1/cold-starts?route={}/{route}", it.namespace)).await;
        serde_json::from_value(found["cold_starts"].take()).unwrap()
    }

    /// Waits until `number` requests of a route are held.
    pub(crate) async fn await_held_count(&self, it: &Scenario, route: &str, number: usize) {
        wait::until(&format!("{number} held requests"), wait::WAIT_LIMIT, async || {
            let held = self.gauge("anteroom_held_requests", it, route).await;
            if held == number as f64 { Ok(()) } else { Err(held.to_string()) }
        })
        .await;
    }

    /// Waits until `number` requests of a route have been admitted.
    pub(crate) async fn admitted(&self, it: &Scenario, route: &str, number: usize) {
        wait::until(&format!("{number} admitted requests"), wait::WAIT_LIMIT, async || {
            let admitted = self.gauge("anteroom_admitted_requests_total", it, route).await;
            if admitted == number as f64 { Ok(()) } else { Err(admitted.to_string()) }
        })
        .await;
    }

    /// Waits until the replica reports a route as idle.
    pub(crate) async fn await_route_idle(&self, it: &Scenario, route: &str) {
        wait::until("the route to be idle", wait::WAIT_LIMIT, async || {
            let route = self.route(it, route).await;
            if route["state"] == "idle" { Ok(()) } else { Err(route.to_string()) }
        })
        .await;
    }

    /// Returns the demand of all replicas, as reported to KEDA.
    pub(crate) async fn depth(&self, it: &Scenario, route: &str) -> f64 {
        self.gauge("anteroom_scaler_queue_depth", it, route).await
    }

    /// Waits until the replica would report this demand to KEDA.
    pub(crate) async fn await_reported_demand(&self, it: &Scenario, route: &str, depth: f64) {
        wait::until(&format!("a queue depth of {depth}"), wait::WAIT_LIMIT, async || {
            let found = self.depth(it, route).await;
            if found == depth { Ok(()) } else { Err(found.to_string()) }
        })
        .await;
    }

    /// Requests a stream, and waits for the head of the response.
    pub(crate) async fn flow(&self, model: &str) -> OpenResponse {
        let answer = wait::within("an answer", wait::WAIT_LIMIT, self.ask(model, true)).await.unwrap();
        assert_eq!(answer.status, 200);
        OpenResponse::read(answer)
    }

    /// Requests a stream of `tokens` tokens, and reads the response to its end in the background.
    pub(crate) fn read(&self, model: &str, tokens: u32) -> ResponseTask {
        let (address, model) = (self.proxy(), model.to_owned());
        AbortOnDropHandle::new(tokio::spawn(async move {
            let answer = client::send(address, client::limited("models.test", &model, tokens)).await?;
            finish(answer).await
        }))
    }
}

// === impl OpenResponse ===

impl OpenResponse {
    fn read(mut answer: StreamingResponse) -> Self {
        let (count, parts) = watch::channel(0);
        let task = tokio::spawn(async move {
            while let Ok(Some(_)) = answer.next().await {
                count.send_modify(|count| *count += 1);
            }
        });
        Self { parts, _task: AbortOnDropHandle::new(task) }
    }

    /// Waits for another part.
    pub(crate) async fn await_next_part(&self) {
        self.await_parts(1).await;
    }

    /// Waits for the end of the stream.
    pub(crate) async fn ends(&self) {
        let mut parts = self.parts.clone();
        while parts.changed().await.is_ok() {}
    }

    /// Waits for `number` more parts.
    pub(crate) async fn await_parts(&self, number: u64) {
        let mut parts = self.parts.clone();
        let now = *parts.borrow_and_update();
        let more = parts.wait_for(|&count| count >= now + number);
        assert!(wait::within("more of a stream", wait::WAIT_LIMIT, more).await.is_ok(), "it was cut off");
    }
}

/// Returns the whole response of a stream; an error if it failed or is incomplete.
pub(crate) async fn finish(answer: StreamingResponse) -> Result<String, String> {
    let status = answer.status;
    let text = answer.text().await?;
    if status != 200 || !text.trim_end().ends_with("data: [DONE]") {
        return Err(format!("{status}: {text}"));
    }
    Ok(text)
}
