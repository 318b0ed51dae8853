//! A model server as deployed by a user: a Deployment at zero, its Service, and its ScaledObject.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::node::RESERVED;

/// Deployment of the simulator, and its Service. Both have the same name; the port is 8000.
pub(crate) struct ModelDeployment {
    pub(crate) name: String,
    /// Arguments of `anteroom sim`.
    pub(crate) args: Vec<String>,
    /// Annotations of the pods: behaviour that the node simulates (`node::fate`).
    pub(crate) annotations: BTreeMap<String, String>,
    /// Labels of an added node: such nodes take only pods that select them.
    pub(crate) node_selector: BTreeMap<String, String>,
    pub(crate) resources: Value,
    /// Period of the kubelet's readiness probe, in seconds.
    pub(crate) probe_period: u32,
    pub(crate) grace: u32,
    pub(crate) replicas: u32,
    /// Further fields of the container, such as `livenessProbe` or `lifecycle`.
    pub(crate) container: Value,
    /// Further fields of the Service's port, such as `appProtocol`.
    pub(crate) port: Value,
}

/// ScaledObject with one external-push trigger.
pub(crate) struct ScaledObjectManifest {
    pub(crate) name: String,
    /// Name of the Deployment.
    pub(crate) target: String,
    /// Address of the scaler, such as `10.77.16.1:9090`.
    pub(crate) scaler: String,
    /// Further metadata of the trigger, such as `{"route": "tiny"}`.
    pub(crate) metadata: Value,
    pub(crate) annotations: BTreeMap<String, String>,
    /// Minimum number of replicas while active.
    pub(crate) min: u32,
    pub(crate) max: u32,
    /// Polling interval, in seconds.
    pub(crate) polling: u32,
    /// Time from the last activity to zero, in seconds.
    pub(crate) cooldown: u32,
    /// Time for which fewer replicas must suffice before scaling down, in seconds.
    pub(crate) stabilization: u32,
    /// Further triggers.
    pub(crate) triggers: Vec<Value>,
}

// === impl ModelDeployment ===

impl ModelDeployment {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            args: Vec::new(),
            annotations: BTreeMap::new(),
            node_selector: BTreeMap::new(),
            resources: json!({ "limits": { "nvidia.com/gpu": "1" } }),
            probe_period: 5,
            grace: 30,
            replicas: 0,
            container: json!({}),
            port: json!({}),
        }
    }

    /// Adds arguments of the simulator, such as `--load-time 2s`.
    pub(crate) fn sim(mut self, args: &str) -> Self {
        self.args.extend(args.split_whitespace().map(str::to_owned));
        self
    }

    /// Adds an annotation with behaviour that the node simulates.
    pub(crate) fn play(mut self, annotation: &str, value: &str) -> Self {
        self.annotations.insert(annotation.to_owned(), value.to_owned());
        self
    }

    pub(crate) fn objects(&self) -> [Value; 2] {
        let labels = json!({ "app": self.name });
        let mut args = vec!["sim".to_owned(), "--port".into(), "8000".into()];
        args.extend(self.args.iter().cloned());
        let mut container = json!({
            "name": "server",
            "image": "anteroom",
            "args": args,
            "ports": [{ "name": "http", "containerPort": 8000 }],
            "resources": self.resources,
            "readinessProbe": { "httpGet": { "path": "/health", "port": "http" }, "periodSeconds": self.probe_period },
        });
        merge(&mut container, &self.container);
        let tolerations = if self.node_selector.is_empty() {
            json!([])
        } else {
            json!([{ "key": RESERVED, "operator": "Exists" }])
        };
        let deployment = json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": { "name": self.name },
            "spec": {
                "replicas": self.replicas,
                "selector": { "matchLabels": labels },
                "template": {
                    "metadata": { "labels": labels, "annotations": self.annotations },
                    "spec": {
                        "terminationGracePeriodSeconds": self.grace,
                        "nodeSelector": self.node_selector,
                        "tolerations": tolerations,
                        "containers": [container],
                    },
                },
            },
        });
        let mut port = json!({ "name": "http", "port": 80, "targetPort": "http" });
        merge(&mut port, &self.port);
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": self.name },
            "spec": { "selector": labels, "ports": [port] },
        });
        [deployment, service]
    }
}

// === impl ScaledObjectManifest ===

impl ScaledObjectManifest {
    /// Creates a ScaledObject from zero to four replicas.
    pub(crate) fn new(name: &str, scaler: &str, metadata: Value) -> Self {
        Self {
            name: name.to_owned(),
            target: name.to_owned(),
            scaler: scaler.to_owned(),
            metadata,
            annotations: BTreeMap::new(),
            min: 0,
            max: 4,
            polling: 5,
            cooldown: 10,
            stabilization: 5,
            triggers: Vec::new(),
        }
    }

    pub(crate) fn object(&self) -> Value {
        let mut metadata = json!({ "scalerAddress": self.scaler });
        merge(&mut metadata, &self.metadata);
        let mut triggers = vec![json!({ "type": "external-push", "metadata": metadata })];
        triggers.extend(self.triggers.iter().cloned());
        let mut object = json!({
            "apiVersion": "keda.sh/v1alpha1",
            "kind": "ScaledObject",
            "metadata": { "name": self.name, "annotations": self.annotations },
            "spec": {
                "scaleTargetRef": { "name": self.target },
                "minReplicaCount": self.min,
                "maxReplicaCount": self.max,
                "pollingInterval": self.polling,
                "cooldownPeriod": self.cooldown,
                // Kubernetes' default is five minutes before it scales down.
                "advanced": { "horizontalPodAutoscalerConfig": { "behavior": {
                    "scaleDown": { "stabilizationWindowSeconds": self.stabilization },
                } } },
                "triggers": triggers,
            },
        });
        if self.min > 0 {
            object["spec"]["idleReplicaCount"] = 0.into();
        }
        object
    }
}

/// Merges `more` into `base` recursively; values of `more` win.
pub(crate) fn merge(base: &mut Value, more: &Value) {
    match (base, more) {
        (Value::Object(base), Value::Object(more)) => {
            for (key, value) in more {
                merge(base.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (base, more) => *base = more.clone(),
    }
}
