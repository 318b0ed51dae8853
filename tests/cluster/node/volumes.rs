//! Files of a pod, from ConfigMaps and its service account, as mounted by the kubelet.

use std::{net::Ipv4Addr, path::PathBuf, time::Duration};

use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{ConfigMap, Container, Pod, ServiceAccount},
};
use kube::{ResourceExt as _, api::PostParams};
use tokio::time::sleep;

use super::Agent;
use crate::in_cluster::ServiceAccountFolder;

/// Files of a container.
#[derive(Default)]
pub(super) struct Files {
    /// Mount path of each folder, and its actual path.
    pub(super) folders: Vec<(String, PathBuf)>,
    /// The service account, only for pods that explicitly request it; the others do not need one.
    pub(super) account: Option<ServiceAccountFolder>,
}

// === impl Files ===

impl Files {
    /// Mounts the files for a container of a pod at this address. Retries, because the node gets access to them a
    /// moment after the pod was bound.
    pub(super) async fn mount(agent: &Agent, pod: &Pod, container: &Container, address: Ipv4Addr) -> Self {
        loop {
            match Self::of(agent, pod, container, address).await {
                Ok(files) => return files,
                Err(message) => {
                    agent.pod_event(pod, "Warning", "FailedMount", &message);
                    sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    async fn of(agent: &Agent, pod: &Pod, container: &Container, address: Ipv4Addr) -> Result<Self, String> {
        let Some(spec) = &pod.spec else { return Ok(Self::default()) };
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let mut files = Self::default();
        for mount in container.volume_mounts.iter().flatten() {
            let volume = spec.volumes.iter().flatten().find(|volume| volume.name == mount.name);
            let Some(map) = volume.and_then(|volume| volume.config_map.as_ref()) else { continue };
            let maps = agent.kube.namespaced::<ConfigMap>(&namespace);
            let map = maps.get(&map.name).await.map_err(|error| error.to_string())?;
            let folder = agent.ground.run.join("volumes").join(format!("{namespace}.{name}.{}", mount.name));
            std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
            for (file, text) in map.data.unwrap_or_default() {
                // In a real pod the process may listen on all addresses; here the pods share a network.
                let text = text.replace("0.0.0.0", &address.to_string());
                std::fs::write(folder.join(file), text).map_err(|error| error.to_string())?;
            }
            files.folders.push((mount.mount_path.clone(), folder));
        }
        if spec.automount_service_account_token == Some(true) {
            let account = spec.service_account_name.clone().unwrap_or_default();
            let request = TokenRequest {
                spec: TokenRequestSpec {
                    bound_object_ref: Some(BoundObjectReference {
                        api_version: Some("v1".into()),
                        kind: Some("Pod".into()),
                        name: Some(name.clone()),
                        uid: pod.uid(),
                    }),
                    expiration_seconds: Some(3600),
                    audiences: Vec::new(),
                },
                ..TokenRequest::default()
            };
            let accounts = agent.kube.namespaced::<ServiceAccount>(&namespace);
            let answer = accounts.create_token_request(&account, &PostParams::default(), &request).await;
            let token = answer.map_err(|error| error.to_string())?.status.ok_or("no token")?.token;
            let ground = &agent.ground;
            let account =
                ServiceAccountFolder::with_token(&ground.run, &ground.authority, &namespace, &name, &token);
            files.account = Some(account);
        }
        Ok(files)
    }

    /// Replaces mount paths in a word of a command by the actual paths.
    pub(super) fn translate(&self, word: &str) -> String {
        let translated = |word: String, (mounted, folder): &(String, PathBuf)| {
            word.replace(mounted.as_str(), &folder.display().to_string())
        };
        self.folders.iter().fold(word.to_owned(), translated)
    }
}
