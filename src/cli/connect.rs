//! The way of a command to a cluster.

use kube::{Client, Config, config::KubeConfigOptions};

/// Reads the kubeconfig, in this context or the current one; without a kubeconfig, what a pod has.
///
/// # Errors
/// In words for the terminal, when neither is there, or what they say cannot be used.
pub(super) async fn connect(context: Option<&str>) -> Result<Client, String> {
    const PATH: &str = "name a kubeconfig with KUBECONFIG, or run in a pod";
    let config = match context {
        None => Config::infer().await.map_err(|error| error.to_string()),
        Some(context) => {
            let options =
                KubeConfigOptions { context: Some(context.to_owned()), ..KubeConfigOptions::default() };
            Config::from_kubeconfig(&options).await.map_err(|error| error.to_string())
        }
    };
    let told = |error: String| format!("no way to a Kubernetes API server: {error}; {PATH}");
    Client::try_from(config.map_err(told)?).map_err(|error| told(error.to_string()))
}
