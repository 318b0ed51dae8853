//! A model server as a user deploys it: a Deployment at zero, its Service, and the ScaledObject over it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::node::RESERVED;

/// A Deployment of the stand-in, and its Service. Both have its name; the port is 8000.
pub(crate) struct Model {
    pub(crate) name: String,
    /// Arguments of `anteroom sim`.
    pub(crate) args: Vec<String>,
    /// Of its pods: what their node shall play (`node::fate`).
    pub(crate) annotations: BTreeMap<String, String>,
    /// Labels of a node that was added: such nodes take only pods that ask for them.
    pub(crate) node_selector: BTreeMap<String, String>,
    pub(crate) resources: Value,
    /// Seconds between two of kubelet's readiness probes.
    pub(crate) probe_period: u32,
    pub(crate) grace: u32,
    pub(crate) replicas: u32,
    /// Anything else of the container, as `livenessProbe` or `lifecycle`.
    pub(crate) container: Value,
    /// Anything else of the Service's port, as `appProtocol`.
    pub(crate) port: Value,
}

/// A ScaledObject with one external-push trigger.
pub(crate) struct Scaled {
    pub(crate) name: String,
    /// The Deployment.
    pub(crate) target: String,
    /// Where the scaler is, as `10.77.16.1:9090`.
    pub(crate) scaler: String,
    /// What else the trigger tells it, as `{"route": "tiny"}`.
    pub(crate) metadata: Value,
    pub(crate) annotations: BTreeMap<String, String>,
    /// How many there are at the least, while there is a need for any.
    pub(crate) min: u32,
    pub(crate) max: u32,
    /// Seconds between two polls.
    pub(crate) polling: u32,
    /// Seconds from the last activity to zero.
    pub(crate) cooldown: u32,
    /// Seconds for which fewer replicas have to be enough, before there are fewer.
    pub(crate) stabilization: u32,
    /// Further triggers.
    pub(crate) triggers: Vec<Value>,
}

// === impl Model ===

impl Model {
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

    /// Arguments of the stand-in, as `--load-time 2s`.
    pub(crate) fn sim(mut self, args: &str) -> Self {
        self.args.extend(args.split_whitespace().map(str::to_owned));
        self
    }

    /// What the node shall play.
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

// === impl Scaled ===

impl Scaled {
    /// From zero to four.
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
                // Kubernetes' own default waits five minutes before it goes from N to fewer.
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

/// What is in `more` replaces what is in `base`, object by object.
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
