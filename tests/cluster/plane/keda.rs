//! KEDA: its operator, and the adapter that serves its metrics to the Kubernetes autoscaler.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use serde_json::json;
use tokio::{process::Command, sync::Mutex};

use super::{ControlPlane, answers, daemon::Daemon};
use crate::{api, client, in_cluster::ServiceAccountFolder, wait};

const NAMESPACE: &str = "keda";
const ADAPTER: &str = "10.77.0.2";
const OPERATOR: &str = "10.77.0.3";
const METRICS_API: &str = "/apis/external.metrics.k8s.io/v1beta1";

/// Running KEDA.
pub(crate) struct Keda {
    operator: Mutex<Daemon>,
    _adapter: Daemon,
}

// === impl Keda ===

impl Keda {
    /// Applies the manifests, and starts operator and adapter.
    pub(crate) async fn start(plane: &ControlPlane) -> Self {
        let (kube, folders) = (&plane.admin, &plane.folders);
        apply_manifests(plane).await;
        let accounts = kube.namespaced::<ServiceAccount>(NAMESPACE);
        wait::object(&accounts, "keda-operator", "there", wait::WAIT_LIMIT, |account| account.map(drop))
            .await;
        let account =
            ServiceAccountFolder::new(kube, &folders.run, &plane.authority.pem, NAMESPACE, "keda-operator")
                .await;

        // The first run creates the certificates and then exits by design: in a pod they are mounted as files
        // afterwards.
        let certs = folders.run.join("keda-certs");
        std::fs::create_dir_all(&certs).unwrap();
        let program = folders.bin.join("operator");
        let mut operator = Daemon::new("keda-operator", &folders.logs, operator(&account, &program, &certs));
        operator.start();
        operator.end().await;
        let secrets = kube.namespaced::<Secret>(NAMESPACE);
        let data = wait::object(&secrets, "kedaorg-certs", "its certificates", wait::WAIT_LIMIT, |secret| {
            secret?.data.clone().filter(|data| data.contains_key("tls.crt"))
        });
        for (name, content) in data.await {
            std::fs::write(certs.join(name), content.0).unwrap();
        }
        operator.start();
        operator.ready(serves).await;

        // The adapter is last and started once: while its API fails, the aggregator backs off.
        let program = folders.bin.join("adapter");
        let mut adapter =
            Daemon::new("keda-metrics-adapter", &folders.logs, adapter(&account, &program, &certs));
        adapter.start();
        adapter.ready(async || answers(kube, METRICS_API).await).await;
        Self { operator: Mutex::new(operator), _adapter: adapter }
    }

    /// Kills only the operator.
    pub(crate) async fn kill_operator(&self) {
        self.operator.lock().await.kill().await;
    }

    /// Starts the operator again.
    pub(crate) async fn restart_operator(&self) {
        let mut operator = self.operator.lock().await;
        operator.start();
        operator.ready(serves).await;
    }
}

async fn serves() -> Result<(), String> {
    let address = format!("{OPERATOR}:8081").parse().unwrap();
    match client::get(address, "/readyz").await?.status.as_u16() {
        200 => Ok(()),
        status => Err(format!("/readyz answers {status}")),
    }
}

/// Applies the manifests of KEDA's `config/minimal` without the Deployments, whose pods are these processes.
async fn apply_manifests(plane: &ControlPlane) {
    let mut manifests = api::objects_in(&plane.folders.bin.join("../keda.yaml"));
    manifests.retain(|object| object["kind"] != "Deployment");
    // Dependencies first.
    manifests.sort_by_key(|object| match object["kind"].as_str() {
        Some("Namespace") => 0,
        Some("CustomResourceDefinition") => 1,
        _ => 2,
    });
    for object in &manifests {
        plane.admin.apply(object, NAMESPACE).await;
    }
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "keda-metrics-apiserver-1",
            "labels": { "kubernetes.io/service-name": "keda-metrics-apiserver" },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "https", "port": 6443, "protocol": "TCP" }],
        "endpoints": [{ "addresses": [ADAPTER], "conditions": { "ready": true } }],
    });
    plane.admin.apply(&slice, NAMESPACE).await;
}

fn operator(
    account: &ServiceAccountFolder,
    program: &Path,
    certs: &Path,
) -> impl Fn() -> Command + Send + Sync + 'static {
    let (account, program, certs) = owned(account, program, certs);
    move || {
        let mut command = account.command(&program);
        command.env("WATCH_NAMESPACE", "").args([
            "--zap-log-level=info",
            "--zap-encoder=console",
            "--zap-time-encoding=rfc3339nano",
            "--enable-cert-rotation=true",
            "--enable-webhook-patching=false",
            &format!("--cert-dir={}", certs.display()),
            &format!("--metrics-bind-address={OPERATOR}:8080"),
            &format!("--health-probe-bind-address={OPERATOR}:8081"),
            &format!("--metrics-service-bind-address={OPERATOR}:9666"),
        ]);
        command
    }
}

fn adapter(
    account: &ServiceAccountFolder,
    program: &Path,
    certs: &Path,
) -> impl Fn() -> Command + Send + Sync + 'static {
    let (account, program, certs) = owned(account, program, certs);
    move || {
        let file = |name: &str| certs.join(name).display().to_string();
        let mut command = account.command(&program);
        command.env("WATCH_NAMESPACE", "").args([
            &format!("--bind-address={ADAPTER}"),
            "--secure-port=6443",
            "--zap-log-level=error",
            &format!("--client-ca-file={}", file("ca.crt")),
            &format!("--tls-cert-file={}", file("tls.crt")),
            &format!("--tls-private-key-file={}", file("tls.key")),
            &format!("--cert-dir={}", certs.display()),
            "--port=8082",
            &format!("--metrics-service-address={OPERATOR}:9666"),
            "--metrics-service-grpc-authority=keda-operator.keda.svc.cluster.local",
        ]);
        command
    }
}

fn owned(
    account: &ServiceAccountFolder,
    program: &Path,
    certs: &Path,
) -> (ServiceAccountFolder, PathBuf, PathBuf) {
    (account.clone(), program.to_owned(), certs.to_owned())
}
