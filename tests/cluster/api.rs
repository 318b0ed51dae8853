//! The apiserver, as the tests ask it.

use std::{fmt::Debug, path::Path};

use kube::{
    Api, Client, Resource,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::NamespaceResourceScope,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Who sets the fields that the tests apply.
const MANAGER: &str = "cluster-tests";

/// Kinds that have no namespace, of those that the tests apply.
const CLUSTER_WIDE: [&str; 8] = [
    "APIService",
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "Namespace",
    "Node",
    "PriorityClass",
    "ValidatingWebhookConfiguration",
];

/// A client with the rights of one user.
#[derive(Clone)]
pub(crate) struct Kube {
    pub(crate) client: Client,
}

// === impl Kube ===

impl Kube {
    /// As whom the kubeconfig says.
    pub(crate) async fn new(kubeconfig: &str) -> Self {
        let kubeconfig = Kubeconfig::from_yaml(kubeconfig).unwrap();
        let options = KubeConfigOptions::default();
        let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
        // What is not there yet is said at once, and whoever waits for it asks again.
        config.default_retry = false;
        Self { client: Client::try_from(config).unwrap() }
    }

    /// The objects of one kind in a namespace.
    pub(crate) fn namespaced<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// The objects of one kind, wherever they are.
    pub(crate) fn all<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        Api::all(self.client.clone())
    }

    /// The objects of a kind that has no type here.
    pub(crate) fn dynamic(&self, api_version: &str, kind: &str, namespace: &str) -> Api<DynamicObject> {
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        if CLUSTER_WIDE.contains(&kind) {
            Api::all_with(self.client.clone(), &resource)
        } else {
            Api::namespaced_with(self.client.clone(), namespace, &resource)
        }
    }

    /// Creates or changes an object to be so; in `namespace` unless it says another.
    pub(crate) async fn apply(&self, object: &Value, namespace: &str) {
        if let Err(error) = self.try_apply(object, namespace).await {
            panic!("cannot apply {object}: {error}");
        }
    }

    /// The same, where the apiserver may refuse.
    pub(crate) async fn try_apply(&self, object: &Value, namespace: &str) -> kube::Result<DynamicObject> {
        let text = |pointer| object.pointer(pointer).and_then(Value::as_str);
        let (Some(api_version), Some(kind), Some(name)) =
            (text("/apiVersion"), text("/kind"), text("/metadata/name"))
        else {
            panic!("not an object: {object}");
        };
        let api = self.dynamic(api_version, kind, text("/metadata/namespace").unwrap_or(namespace));
        api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(object)).await
    }

    /// Applies every object of a text of YAML documents.
    pub(crate) async fn apply_yaml(&self, yaml: &str, namespace: &str) {
        for object in objects(yaml) {
            self.apply(&object, namespace).await;
        }
    }
}

/// The objects in a text of YAML documents.
pub(crate) fn objects(yaml: &str) -> Vec<Value> {
    // KEDA's definitions of resources are beyond the limits that are there for texts of strangers.
    let options = serde_saphyr::options! { budget: None };
    let objects: Vec<Value> = serde_saphyr::from_multiple_with_options(yaml, options).unwrap();
    objects.into_iter().filter(Value::is_object).collect()
}

/// The same, of a file.
pub(crate) fn objects_in(file: &Path) -> Vec<Value> {
    objects(&std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display())))
}
