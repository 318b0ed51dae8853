//! A scenario's own namespace and addresses, and shorthand for its steps.

use std::{
    fmt::Debug,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Event, Pod, ServiceAccount},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Resource,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams},
    core::NamespaceResourceScope,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{
    api::Kube,
    in_cluster,
    model::{ModelDeployment, ScaledObjectManifest},
    node::history::{NodeEvent, NodeEventKind},
    plane::daemon,
    wait,
    world::TestCluster,
};

/// A scenario's part of the cluster.
#[derive(Clone)]
pub(crate) struct Scenario {
    pub(crate) world: Arc<TestCluster>,
    pub(crate) namespace: String,
    /// Client of a user with all rights.
    pub(crate) kube: Kube,
    subnet: u8,
}

// === impl Scenario ===

impl Scenario {
    /// Creates a new namespace.
    pub(crate) async fn new(world: Arc<TestCluster>, name: &str) -> Self {
        let subnet = world.subnet();
        // Label values that contain the namespace are limited to 63 characters; the subnet makes truncated names
        // unique.
        let function = name.rsplit(':').next().unwrap_or(name).replace('_', "-");
        let namespace = format!("{function:.40}-{subnet}");
        world.ground.addresses.set(&namespace, subnet);
        let kube = world.plane.admin.clone();
        let object = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } });
        kube.apply(&object, "").await;
        let scenario = Self { world, namespace, kube, subnet };
        // The apiserver rejects pods until the service account exists.
        scenario.wait_for::<ServiceAccount, _>("default", "there", |account| account.map(drop)).await;
        scenario
    }

    /// Deletes the scenario's objects without waiting.
    pub(crate) async fn clean_up(&self) {
        // ScaledObjects go first, in one request, so that they do not bring pods back while the namespace is deleted.
        let scaled = self.kube.dynamic("keda.sh/v1alpha1", "ScaledObject", &self.namespace);
        let _ = scaled.delete_collection(&DeleteParams::default(), &ListParams::default()).await;
        let namespaces = self.kube.all::<k8s_openapi::api::core::v1::Namespace>();
        let _ = namespaces.delete(&self.namespace, &DeleteParams::default()).await;
    }

    /// Connects with the rights of a service account of the namespace.
    pub(crate) async fn as_service_account(&self, account: &str) -> Kube {
        let plane = &self.world.plane;
        let token = in_cluster::token(&self.kube, &self.namespace, account).await;
        Kube::new(&plane.kubeconfig_with_token(&token)).await
    }

    /// Returns an address for a process of the scenario: 1 to 49. Pods use 50 and above.
    pub(crate) fn address(&self, number: u8) -> Ipv4Addr {
        assert!((1..50).contains(&number), "{number} is not a number for processes");
        Ipv4Addr::new(10, 77, self.subnet, number)
    }

    pub(crate) fn socket(&self, number: u8, port: u16) -> SocketAddr {
        (self.address(number), port).into()
    }

    /// Returns the API for the objects of one kind in the namespace.
    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        self.kube.namespaced(&self.namespace)
    }

    /// Same as [`Self::api`], for kinds without a Rust type here, such as `ScaledObject`.
    pub(crate) fn dynamic(&self, api_version: &str, kind: &str) -> Api<DynamicObject> {
        self.kube.dynamic(api_version, kind, &self.namespace)
    }

    pub(crate) async fn apply(&self, object: &Value) {
        self.kube.apply(object, &self.namespace).await;
    }

    pub(crate) async fn deploy(&self, model: &ModelDeployment) {
        for object in model.objects() {
            self.apply(&object).await;
        }
    }

    /// Applies the ScaledObject, and waits until it is ready.
    pub(crate) async fn scale(&self, scaled: &ScaledObjectManifest) {
        self.apply(&scaled.object()).await;
        self.wait_for_condition("keda.sh/v1alpha1", "ScaledObject", &scaled.name, "Ready", "True").await;
    }

    /// Updates an object with a merge patch.
    pub(crate) async fn patch(&self, api_version: &str, kind: &str, name: &str, patch: &Value) {
        let api = self.dynamic(api_version, kind);
        api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    }

    /// Updates the pod template of a Deployment with a strategic merge patch, and waits until its controller has
    /// observed the change.
    pub(crate) async fn change_template(&self, deployment: &str, template: &Value) {
        let patch = Patch::Strategic(json!({ "spec": { "template": template } }));
        let patched = self.api::<Deployment>().patch(deployment, &PatchParams::default(), &patch).await;
        let generation = patched.unwrap().metadata.generation;
        self.wait_for::<Deployment, _>(deployment, "its controller to know", |found| {
            (found?.status.as_ref()?.observed_generation >= generation).then_some(())
        })
        .await;
    }

    /// Waits until `done` returns a value for an object; `None` stands for a missing object.
    pub(crate) async fn wait_for<K, T>(
        &self,
        name: &str,
        what: &str,
        done: impl FnMut(Option<&K>) -> Option<T>,
    ) -> T
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Debug
            + DeserializeOwned
            + Serialize
            + Send
            + 'static,
    {
        wait::object(&self.api::<K>(), name, what, wait::WAIT_LIMIT, done).await
    }

    /// Waits until an object has a condition, and returns the condition.
    pub(crate) async fn wait_for_condition(
        &self,
        api_version: &str,
        kind: &str,
        name: &str,
        condition: &str,
        status: &str,
    ) -> Value {
        let what = format!("{condition}={status}");
        wait::object(&self.dynamic(api_version, kind), name, &what, wait::WAIT_LIMIT, |object| {
            let conditions = object?.data.pointer("/status/conditions")?.as_array()?;
            let found = conditions.iter().find(|one| one["type"] == condition && one["status"] == status);
            found.cloned()
        })
        .await
    }

    /// Waits until `spec.replicas` of a Deployment has this value.
    pub(crate) async fn await_spec_replicas(&self, deployment: &str, replicas: i32, limit: Duration) {
        let what = format!("spec.replicas to be {replicas}");
        wait::object::<Deployment, _>(&self.api(), deployment, &what, limit, |deployment| {
            (deployment?.spec.as_ref()?.replicas == Some(replicas)).then_some(())
        })
        .await;
    }

    /// Waits until the EndpointSlices of a Service have `number` ready addresses, and returns them.
    pub(crate) async fn endpoints(&self, service: &str, number: usize) -> Vec<String> {
        let slices = self.api::<EndpointSlice>();
        let params = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
        wait::until(&format!("{number} ready endpoints of {service}"), wait::WAIT_LIMIT, async || {
            let slices = slices.list(&params).await.map_err(|error| error.to_string())?;
            let endpoints = slices.items.iter().flat_map(|slice| &slice.endpoints);
            let ready = endpoints.filter(|endpoint| {
                endpoint.conditions.as_ref().is_some_and(|conditions| conditions.ready == Some(true))
            });
            let found: Vec<_> = ready.flat_map(|endpoint| endpoint.addresses.clone()).collect();
            if found.len() == number { Ok(found) } else { Err(format!("{found:?}")) }
        })
        .await
    }

    /// Returns the pods of the namespace.
    pub(crate) async fn pods(&self) -> Vec<Pod> {
        self.api::<Pod>().list(&ListParams::default()).await.unwrap().items
    }

    /// Waits until `done` returns a value for the pods of the namespace.
    pub(crate) async fn wait_for_pods<T>(&self, what: &str, mut done: impl FnMut(&[Pod]) -> Option<T>) -> T {
        wait::until(what, wait::WAIT_LIMIT, async || {
            let pods = self.pods().await;
            done(&pods).ok_or_else(|| wait::brief(&pods.iter().map(|pod| &pod.status).collect::<Vec<_>>()))
        })
        .await
    }

    /// Returns the events of the scenario's pods on their nodes.
    pub(crate) fn history(&self) -> Vec<NodeEvent> {
        self.world.ground.history.of(&self.namespace)
    }

    /// Waits until `what` has happened `times` times.
    pub(crate) async fn await_node_events(&self, what: NodeEventKind, times: usize) -> Vec<NodeEvent> {
        wait::until(&format!("{what:?}, {times} times"), wait::WAIT_LIMIT, async || {
            let history = self.history();
            let found: Vec<_> = history.iter().filter(|moment| moment.what == what).cloned().collect();
            if found.len() >= times {
                Ok(found)
            } else {
                Err(history.iter().map(|moment| format!("{moment}; ")).collect())
            }
        })
        .await
    }

    /// Returns the context of a failure: pods, events, and the ends of the logs.
    pub(crate) async fn report(&self) -> String {
        let mut report = String::new();
        for moment in self.history() {
            report += &format!("  {moment}\n");
        }
        let params = ListParams::default();
        for pod in self.api::<Pod>().list(&params).await.map(|list| list.items).unwrap_or_default() {
            let name = pod.metadata.name.unwrap_or_default();
            report += &format!("pod {name}: {}\n", serde_json::to_string(&pod.status).unwrap());
        }
        for event in self.api::<Event>().list(&params).await.map(|list| list.items).unwrap_or_default() {
            let object = event.involved_object;
            report += &format!(
                "event {} {}: {} {}\n",
                object.kind.unwrap_or_default(),
                object.name.unwrap_or_default(),
                event.reason.unwrap_or_default(),
                event.message.unwrap_or_default()
            );
        }
        let logs = &self.world.plane.folders.logs;
        for folder in [logs.clone(), logs.join("pods")] {
            for file in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                if file.file_name().to_string_lossy().starts_with(&format!("{}.", self.namespace)) {
                    report += &format!("--- {}\n{}\n", file.path().display(), daemon::tail(&file.path(), 40));
                }
            }
        }
        report
    }
}
