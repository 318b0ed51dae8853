//! Connection to a Kubernetes API server.

use kube::{Client, Config, config::KubeConfigOptions};

/// Creates a client from the kubeconfig (`context`, or its current context), or from the service account of a pod.
///
/// # Errors
/// If neither exists or is usable.
pub(super) async fn connect(context: Option<&str>) -> Result<Client, String> {
    let config = match context {
        None => Config::infer().await.map_err(|error| error.to_string()),
        Some(context) => {
            let options =
                KubeConfigOptions { context: Some(context.to_owned()), ..KubeConfigOptions::default() };
            Config::from_kubeconfig(&options).await.map_err(|error| error.to_string())
        }
    };
    let failed = |error: String| {
        format!("cannot connect to a Kubernetes API server: {error}; set KUBECONFIG or run in a pod")
    };
    Client::try_from(config.map_err(failed)?).map_err(|error| failed(error.to_string()))
}
