//! Client of the apiserver for the tests.

use std::{fmt::Debug, path::Path};

use kube::{
    Api, Client, Resource,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::NamespaceResourceScope,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Field manager of the objects that the tests apply.
const MANAGER: &str = "cluster-tests";

/// Cluster-scoped kinds among those that the tests apply.
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

/// Client with the rights of one user.
#[derive(Clone)]
pub(crate) struct Kube {
    pub(crate) client: Client,
}

// === impl Kube ===

impl Kube {
    /// Connects as the user of the kubeconfig.
    pub(crate) async fn new(kubeconfig: &str) -> Self {
        let kubeconfig = Kubeconfig::from_yaml(kubeconfig).unwrap();
        let options = KubeConfigOptions::default();
        let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
        // Without retries: a missing object is reported at once, and tests that wait for it repeat the request.
        config.default_retry = false;
        Self { client: Client::try_from(config).unwrap() }
    }

    /// Returns the API for the objects of one kind in a namespace.
    pub(crate) fn namespaced<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Returns the API for the objects of one kind in all namespaces, or of a cluster-scoped kind.
    pub(crate) fn all<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        Api::all(self.client.clone())
    }

    /// Returns the API for a kind without a Rust type here.
    pub(crate) fn dynamic(&self, api_version: &str, kind: &str, namespace: &str) -> Api<DynamicObject> {
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        if CLUSTER_WIDE.contains(&kind) {
            Api::all_with(self.client.clone(), &resource)
        } else {
            Api::namespaced_with(self.client.clone(), namespace, &resource)
        }
    }

    /// Creates or updates an object with server-side apply, in `namespace` unless the object names another.
    pub(crate) async fn apply(&self, object: &Value, namespace: &str) {
        if let Err(error) = self.try_apply(object, namespace).await {
            panic!("cannot apply {object}: {error}");
        }
    }

    /// Same as [`Self::apply`], but returns the apiserver's error.
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

    /// Applies all objects of a multi-document YAML text.
    pub(crate) async fn apply_yaml(&self, yaml: &str, namespace: &str) {
        for object in objects(yaml) {
            self.apply(&object, namespace).await;
        }
    }
}

/// Parses the objects of a multi-document YAML text.
pub(crate) fn objects(yaml: &str) -> Vec<Value> {
    // KEDA's CRDs exceed the default limits for untrusted input.
    let options = serde_saphyr::options! { budget: None };
    let objects: Vec<Value> = serde_saphyr::from_multiple_with_options(yaml, options).unwrap();
    objects.into_iter().filter(Value::is_object).collect()
}

/// Parses the objects of a file.
pub(crate) fn objects_in(file: &Path) -> Vec<Value> {
    objects(&std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display())))
}
