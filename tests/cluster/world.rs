//! The one cluster that all scenarios share.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use tokio::time::Instant;

use crate::{
    api::{self, Kube},
    chart,
    cloud::NodeTemplate,
    dns::DnsServer,
    node::{Addresses, Node, SharedNodeState, Spec, clock::NodeClock, history::NodeHistory},
    plane::{ControlPlane, RunFolders, keda::Keda},
    wait,
};

/// Folder of the tests' fixtures and manifests.
pub(crate) const FIXTURES_DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cluster");

/// First subnet of 10.77.0.0/16 for scenarios. Below: 0 is the control plane, 1 the nodes, 2 pods of no scenario.
const FIRST_SUBNET: u8 = 16;

/// Control plane with KEDA, a node, and the CRDs of all resources that the tests use.
pub(crate) struct TestCluster {
    pub(crate) plane: ControlPlane,
    pub(crate) keda: Keda,
    pub(crate) ground: Arc<SharedNodeState>,
    pub(crate) dns: DnsServer,
    subnets: AtomicU8,
    nodes: AtomicU8,
    _node: Node,
}

// === impl TestCluster ===

impl TestCluster {
    /// Starts everything; `run` is the folder that `tests/cluster/enter` created.
    pub(crate) async fn start(run: &Path, bin: &Path) -> Self {
        let began = Instant::now();
        let folders = RunFolders { bin: bin.to_owned(), run: run.to_owned(), logs: run.join("logs") };
        let pods = folders.logs.join("pods");
        std::fs::create_dir_all(&pods).unwrap();

        let plane = ControlPlane::start(&folders).await;
        println!("control plane: {:.1} s", began.elapsed().as_secs_f64());
        let dns = DnsServer::start(&plane.admin).await;
        define(&plane.admin).await;
        let keda = Keda::start(&plane).await;
        println!("KEDA: {:.1} s", began.elapsed().as_secs_f64());

        let ground = Arc::new(SharedNodeState {
            history: NodeHistory::default(),
            addresses: Addresses::default(),
            logs: pods,
            run: run.to_owned(),
            authority: plane.authority.pem.clone(),
            programs: programs(),
        });
        let spec = Spec::new("node-0", Ipv4Addr::new(10, 77, 1, 1));
        let node = join(&plane, ground.clone(), spec).await;
        node.ready().await;
        println!("cluster: {:.1} s", began.elapsed().as_secs_f64());
        Self {
            plane,
            keda,
            ground,
            dns,
            subnets: AtomicU8::new(FIRST_SUBNET),
            nodes: AtomicU8::new(1),
            _node: node,
        }
    }

    /// Adds a node.
    pub(crate) async fn add_node(&self, machine: impl Into<NodeTemplate>) -> Node {
        let NodeTemplate { labels, boot, clock, wired } = machine.into();
        let number = self.nodes.fetch_add(1, Ordering::SeqCst);
        let mut spec = Spec::new(&format!("node-{number}"), Ipv4Addr::new(10, 77, 1, number + 1));
        // The label by which pods select the node names its scenario.
        spec.reserved = Some(labels.get("pool").cloned().unwrap_or_default());
        (spec.labels, spec.boot, spec.clock, spec.wired) = (labels, boot, clock, wired);
        join(&self.plane, self.ground.clone(), spec).await
    }

    /// Returns an unused subnet.
    pub(crate) fn subnet(&self) -> u8 {
        self.subnets.fetch_add(1, Ordering::SeqCst)
    }
}

// === impl Spec ===

impl Spec {
    fn new(name: &str, address: Ipv4Addr) -> Self {
        Self {
            name: name.to_owned(),
            address,
            labels: BTreeMap::new(),
            reserved: None,
            gpus: 64,
            boot: Duration::ZERO,
            clock: NodeClock::Right,
            wired: false,
        }
    }
}

/// Applies the CRDs other than KEDA's.
async fn define(kube: &Kube) {
    let fixtures = ["interceptorroutes", "inferencepools"];
    let files = fixtures.map(|name| Path::new(FIXTURES_DIR).join(format!("fixtures/{name}.yaml")));
    let definitions: Vec<_> =
        files.iter().flat_map(|file| api::objects_in(file)).chain(chart::definitions()).collect();
    for definition in &definitions {
        kube.apply(definition, "").await;
    }
    for definition in &definitions {
        let name = definition["metadata"]["name"].as_str().unwrap();
        let all = kube.all::<CustomResourceDefinition>();
        wait::object(&all, name, "established", wait::WAIT_LIMIT, |found| {
            let conditions = found?.status.as_ref()?.conditions.as_ref()?;
            conditions.iter().find(|one| one.type_ == "Established" && one.status == "True").map(drop)
        })
        .await;
    }
}

async fn join(plane: &ControlPlane, ground: Arc<SharedNodeState>, spec: Spec) -> Node {
    let user = format!("system:node:{}", spec.name);
    let kube = Kube::new(&plane.kubeconfig(&user, Some("system:nodes"))).await;
    Node::join(kube, ground, spec).await
}

/// Returns the executable under test: that of this build, unless `ANTEROOM_CLUSTER_PROGRAM` names another.
pub(crate) fn anteroom() -> PathBuf {
    std::env::var_os("ANTEROOM_CLUSTER_PROGRAM")
        .map_or_else(|| env!("CARGO_BIN_EXE_anteroom").into(), PathBuf::from)
}

/// Returns the programs that stand for images. Envoy only if installed.
fn programs() -> BTreeMap<String, PathBuf> {
    let mut programs = BTreeMap::from([("anteroom".to_owned(), anteroom())]);
    if let Some(envoy) = std::env::var_os("ANTEROOM_ENVOY") {
        programs.insert("envoy".into(), envoy.into());
    }
    programs
}
