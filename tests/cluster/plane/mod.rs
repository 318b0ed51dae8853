//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler, unmodified, each as a process.

pub(crate) mod daemon;
pub(crate) mod keda;
pub(crate) mod pki;

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::ServiceAccount;
use serde_json::json;
use tokio::{process::Command, sync::Mutex};

use crate::{api::Kube, wait};
use daemon::Daemon;
use pki::CertificateAuthority;

/// Address of the control plane. Endpoints in the loopback range are rejected.
pub(crate) const ADDRESS: &str = "10.77.0.1";
pub(crate) const PORT: u16 = 6443;

/// Folders of a run: inputs and output of each program.
#[derive(Clone)]
pub(crate) struct RunFolders {
    /// Executables.
    pub(crate) bin: PathBuf,
    /// Certificates, data, configuration.
    pub(crate) run: PathBuf,
    pub(crate) logs: PathBuf,
}

/// Running control plane.
pub(crate) struct ControlPlane {
    pub(crate) folders: RunFolders,
    pub(crate) authority: CertificateAuthority,
    /// Client with all rights.
    pub(crate) admin: Kube,
    pub(crate) apiserver: Mutex<Daemon>,
    _others: [Daemon; 3],
}

// === impl ControlPlane ===

impl ControlPlane {
    /// Starts everything, and waits until namespaces get their service accounts.
    pub(crate) async fn start(folders: &RunFolders) -> Self {
        let pki = folders.run.join("pki");
        std::fs::create_dir_all(&pki).unwrap();
        let authority = write_pki(&pki);

        let mut etcd = Daemon::new("etcd", &folders.logs, etcd(folders));
        etcd.start();
        let mut apiserver = Daemon::new("kube-apiserver", &folders.logs, apiserver(folders));
        apiserver.start();
        let admin = Kube::new(&kubeconfig(&authority, "admin", Some("system:masters"))).await;
        apiserver.ready(async || answers(&admin, "/readyz").await).await;

        let manager = component(
            folders,
            &authority,
            "kube-controller-manager",
            &[
                format!("--service-account-private-key-file={}/sa.key", pki.display()),
                format!("--root-ca-file={}/ca.crt", pki.display()),
                "--use-service-account-credentials=true".into(),
                // The default is 15 s.
                "--horizontal-pod-autoscaler-sync-period=5s".into(),
            ],
        );
        let scheduler = component(folders, &authority, "kube-scheduler", &[]);
        let accounts = admin.namespaced::<ServiceAccount>("default");
        wait::object(&accounts, "default", "a service account", wait::WAIT_LIMIT, |account| {
            account.map(drop)
        })
        .await;
        Self {
            folders: folders.clone(),
            authority,
            admin,
            apiserver: Mutex::new(apiserver),
            _others: [etcd, manager, scheduler],
        }
    }

    /// Kills only the apiserver.
    pub(crate) async fn kill_apiserver(&self) {
        self.apiserver.lock().await.kill().await;
    }

    /// Starts the apiserver again.
    pub(crate) async fn restart_apiserver(&self) {
        let mut apiserver = self.apiserver.lock().await;
        apiserver.start();
        apiserver.ready(async || answers(&self.admin, "/readyz").await).await;
    }

    /// Returns a kubeconfig for this user.
    pub(crate) fn kubeconfig(&self, user: &str, group: Option<&str>) -> String {
        kubeconfig(&self.authority, user, group)
    }

    /// Returns a kubeconfig with this token.
    pub(crate) fn kubeconfig_with_token(&self, token: &str) -> String {
        self.authority.kubeconfig_of(&server(), &json!({ "token": token }))
    }
}

fn server() -> String {
    format!("https://{ADDRESS}:{PORT}")
}

fn kubeconfig(authority: &CertificateAuthority, user: &str, group: Option<&str>) -> String {
    authority.kubeconfig(&server(), user, group)
}

/// Returns `Ok` if a path of the apiserver returns 200.
pub(crate) async fn answers(kube: &Kube, path: &str) -> Result<(), String> {
    let request = http::Request::get(path).body(Vec::new()).unwrap();
    kube.client.request_text(request).await.map(drop).map_err(|error| error.to_string())
}

fn write_pki(folder: &Path) -> CertificateAuthority {
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    let authority = CertificateAuthority::new("cluster");
    write("ca.crt", &authority.pem);
    let names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "*.relay.test"];
    let addresses = [ADDRESS, "127.0.0.1", "10.96.0.1"].map(|address| address.parse().unwrap());
    authority.server("kube-apiserver", &addresses, &names).write(folder, "apiserver");
    // Client certificate of the apiserver for aggregated APIs (KEDA's metrics adapter).
    let front_proxy = CertificateAuthority::new("front-proxy");
    write("front-proxy-ca.crt", &front_proxy.pem);
    front_proxy.client("front-proxy-client", None).write(folder, "front-proxy-client");
    pki::write_token_keys(folder);
    authority
}

fn etcd(folders: &RunFolders) -> impl Fn() -> Command + Send + Sync + 'static {
    let RunFolders { bin, run, .. } = folders.clone();
    move || {
        let mut command = Command::new(bin.join("etcd"));
        command
            .arg("--data-dir")
            .arg(run.join("etcd"))
            .arg("--unsafe-no-fsync")
            .args(["--log-level", "warn"]);
        for flag in ["--listen-client-urls", "--advertise-client-urls"] {
            command.arg(format!("{flag}=http://{ADDRESS}:2379"));
        }
        for flag in ["--listen-peer-urls", "--initial-advertise-peer-urls"] {
            command.arg(format!("{flag}=http://{ADDRESS}:2380"));
        }
        command.arg(format!("--initial-cluster=default=http://{ADDRESS}:2380"));
        command
    }
}

fn apiserver(folders: &RunFolders) -> impl Fn() -> Command + Send + Sync + 'static {
    let RunFolders { bin, run, .. } = folders.clone();
    move || {
        let mut command = Command::new(bin.join("kube-apiserver"));
        command.current_dir(run.join("pki")).args([
            &format!("--etcd-servers=http://{ADDRESS}:2379"),
            &format!("--advertise-address={ADDRESS}"),
            &format!("--bind-address={ADDRESS}"),
            &format!("--secure-port={PORT}"),
            "--tls-cert-file=apiserver.crt",
            "--tls-private-key-file=apiserver.key",
            "--client-ca-file=ca.crt",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-key-file=sa.pub",
            "--service-account-signing-key-file=sa.key",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--requestheader-client-ca-file=front-proxy-ca.crt",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User",
            "--proxy-client-cert-file=front-proxy-client.crt",
            "--proxy-client-key-file=front-proxy-client.key",
            // There is no kube-proxy: aggregated APIs are called at the addresses of their endpoints.
            "--enable-aggregator-routing=true",
            "--enable-priority-and-fairness=false",
            // Address for the log requests to nodes. Their names are not in the DNS.
            "--kubelet-preferred-address-types=InternalIP",
        ]);
        command
    }
}

/// Starts a component that is a client of the apiserver, with its own user.
fn component(
    folders: &RunFolders,
    authority: &CertificateAuthority,
    name: &str,
    arguments: &[String],
) -> Daemon {
    let file = folders.run.join(format!("{name}.kubeconfig"));
    std::fs::write(&file, kubeconfig(authority, &format!("system:{name}"), None)).unwrap();
    let (program, arguments) = (folders.bin.join(name), arguments.to_vec());
    let mut daemon = Daemon::new(name, &folders.logs, move || {
        let mut command = Command::new(&program);
        command.arg("--kubeconfig").arg(&file).arg(format!("--bind-address={ADDRESS}"));
        command.arg("--leader-elect=false").args(&arguments);
        command
    });
    daemon.start();
    daemon
}
