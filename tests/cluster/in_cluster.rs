//! Environment of a process in a pod: the files of its service account, and the address of the apiserver.

use std::path::{Path, PathBuf};

use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::api::PostParams;
use tokio::process::Command;

use crate::{api::Kube, plane};

/// Standard mount point of the service account.
const MOUNTED: &str = "/run/secrets/kubernetes.io/serviceaccount";

/// Folder of a service account, as the kubelet mounts it into pods.
#[derive(Clone)]
pub(crate) struct ServiceAccountFolder {
    folder: PathBuf,
    namespace: String,
}

// === impl ServiceAccountFolder ===

impl ServiceAccountFolder {
    /// Writes the files of an existing service account into `run`.
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

    /// Writes the files for this token; `name` is unique in the namespace.
    pub(crate) fn with_token(run: &Path, authority: &str, namespace: &str, name: &str, token: &str) -> Self {
        let folder = run.join("accounts").join(format!("{namespace}.{name}"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("token"), token).unwrap();
        std::fs::write(folder.join("ca.crt"), authority).unwrap();
        std::fs::write(folder.join("namespace"), namespace).unwrap();
        Self { folder, namespace: namespace.to_owned() }
    }

    /// Builds a command that runs `program` as in a pod of the service account.
    pub(crate) fn command(&self, program: &Path) -> Command {
        // Each in its own mount namespace, since all use the same path.
        let script = format!("mkdir -p {MOUNTED} && mount --bind \"$0\" {MOUNTED} && exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c", &script]).arg(&self.folder).arg(program);
        command.env("KUBERNETES_SERVICE_HOST", plane::ADDRESS);
        command.env("KUBERNETES_SERVICE_PORT", plane::PORT.to_string());
        command.env("POD_NAMESPACE", &self.namespace);
        command
    }
}

/// Requests a token that is valid for a day, longer than any run.
pub(crate) async fn token(admin: &Kube, namespace: &str, account: &str) -> String {
    let request = TokenRequest {
        spec: TokenRequestSpec { expiration_seconds: Some(86_400), ..Default::default() },
        ..Default::default()
    };
    let accounts = admin.namespaced::<ServiceAccount>(namespace);
    let answer = accounts.create_token_request(account, &PostParams::default(), &request).await.unwrap();
    answer.status.unwrap().token
}
