//! What a process in a pod finds: the files of its service account, and where the apiserver is.

use std::path::{Path, PathBuf};

use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::api::PostParams;
use tokio::process::Command;

use crate::{api::Kube, plane};

/// Where every client of the apiserver looks.
const MOUNTED: &str = "/run/secrets/kubernetes.io/serviceaccount";

/// A folder as kubelet mounts it into the pods of a service account.
#[derive(Clone)]
pub(crate) struct InCluster {
    folder: PathBuf,
    namespace: String,
}

// === impl InCluster ===

impl InCluster {
    /// For a service account that exists; the files go into `run`.
    pub(crate) async fn new(
        admin: &Kube,
        run: &Path,
        authority: &str,
        namespace: &str,
        account: &str,
    ) -> Self {
        let token = token(admin, namespace, account).await;
        Self::with_token(run, authority, namespace, account, &token)
    }

    /// For whose token it is; `name` tells it apart from others of the namespace.
    pub(crate) fn with_token(run: &Path, authority: &str, namespace: &str, name: &str, token: &str) -> Self {
        let folder = run.join("accounts").join(format!("{namespace}.{name}"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("token"), token).unwrap();
        std::fs::write(folder.join("ca.crt"), authority).unwrap();
        std::fs::write(folder.join("namespace"), namespace).unwrap();
        Self { folder, namespace: namespace.to_owned() }
    }

    /// A program that finds itself in a pod of that service account.
    pub(crate) fn command(&self, program: &Path) -> Command {
        // Each in a mount namespace of its own, since all look in the same place.
        let script = format!("mkdir -p {MOUNTED} && mount --bind \"$0\" {MOUNTED} && exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c", &script]).arg(&self.folder).arg(program);
        command.env("KUBERNETES_SERVICE_HOST", plane::ADDRESS);
        command.env("KUBERNETES_SERVICE_PORT", plane::PORT.to_string());
        command.env("POD_NAMESPACE", &self.namespace);
        command
    }
}

/// A token for a day, longer than any run.
pub(crate) async fn token(admin: &Kube, namespace: &str, account: &str) -> String {
    let request = TokenRequest {
        spec: TokenRequestSpec { expiration_seconds: Some(86_400), ..Default::default() },
        ..Default::default()
    };
    let accounts = admin.namespaced::<ServiceAccount>(namespace);
    let answer = accounts.create_token_request(account, &PostParams::default(), &request).await.unwrap();
    answer.status.unwrap().token
}
