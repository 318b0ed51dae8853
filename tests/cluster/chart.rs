//! The chart, rendered by helm.

use std::path::Path;

use serde_json::Value;
use tokio::process::Command;

use crate::{api, world::TestCluster};

/// Path of the chart.
pub(crate) const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/chart/anteroom");

/// Renders the objects of the chart's release `anteroom` in a namespace; `values` as for helm's `--set`.
pub(crate) async fn render(world: &TestCluster, namespace: &str, values: &[&str]) -> Vec<Value> {
    let mut helm = Command::new(world.plane.folders.bin.join("helm"));
    helm.args(["template", "anteroom", CHART, "--namespace", namespace]);
    helm.args(["--kube-version", "1.37.2"]);
    values.iter().for_each(|value| {
        helm.args(["--set", value]);
    });
    let output = helm.output().await.unwrap();
    assert!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    api::objects(&String::from_utf8(output.stdout).unwrap())
}

/// Renders the service account `anteroom` of the namespace and its RBAC objects, as shipped by the chart.
pub(crate) async fn rights(world: &TestCluster, namespace: &str, values: &[&str]) -> Vec<Value> {
    let own = format!("kubernetes.namespaces={{{namespace}}}");
    let values: Vec<_> = [own.as_str()].into_iter().chain(values.iter().copied()).collect();
    let mut objects = render(world, namespace, &values).await;
    let kinds = ["ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"];
    objects.retain(|object| kinds.iter().any(|&kind| object["kind"] == kind));
    objects
}

/// Reads the CRDs of the chart.
pub(crate) fn definitions() -> Vec<Value> {
    let files = std::fs::read_dir(Path::new(CHART).join("crds")).into_iter().flatten().flatten();
    files.flat_map(|file| api::objects_in(&file.path())).collect()
}
