//! The one cluster that all scenarios share.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use tokio::time::Instant;

use crate::{
    api::{self, Kube},
    hosts::Hosts,
    node::{Addresses, Ground, Node, Spec, history::History},
    plane::{ControlPlane, Folders, keda::Keda},
};

/// The executable under test.
pub(crate) const ANTEROOM: &str = env!("CARGO_BIN_EXE_anteroom");
/// Where the fixtures and manifests of the tests are.
pub(crate) const HERE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cluster");

/// Subnets of 10.77.0.0/16 below it are not for scenarios: 0 is the control plane, 1 the nodes, 2 pods of no scenario.
const FIRST_SUBNET: u8 = 16;

/// A control plane with KEDA, a node, and the definitions of all resources that the tests use.
pub(crate) struct World {
    pub(crate) plane: ControlPlane,
    pub(crate) keda: Keda,
    pub(crate) ground: Arc<Ground>,
    pub(crate) hosts: Hosts,
    subnets: AtomicU8,
    nodes: AtomicU8,
    _node: Node,
}

// === impl World ===

impl World {
    /// Starts everything; `run` is the folder that the namespace was made with.
    pub(crate) async fn start(run: &Path, bin: &Path) -> Self {
        let began = Instant::now();
        let folders = Folders { bin: bin.to_owned(), run: run.to_owned(), logs: run.join("logs") };
        let pods = folders.logs.join("pods");
        std::fs::create_dir_all(&pods).unwrap();
        let hosts = Hosts::new(run.join("hosts"));

        let plane = ControlPlane::start(&folders).await;
        println!("control plane: {:.1} s", began.elapsed().as_secs_f64());
        for definition in ["interceptorroutes", "inferencepools"] {
            let file = Path::new(HERE).join(format!("fixtures/{definition}.yaml"));
            for object in api::objects_in(&file) {
                plane.admin.apply(&object, "").await;
            }
        }
        let keda = Keda::start(&plane).await;
        println!("KEDA: {:.1} s", began.elapsed().as_secs_f64());

        let ground = Arc::new(Ground {
            history: History::default(),
            addresses: Addresses::default(),
            logs: pods,
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
            hosts,
            subnets: AtomicU8::new(FIRST_SUBNET),
            nodes: AtomicU8::new(1),
            _node: node,
        }
    }

    /// One more node, whenever it comes.
    pub(crate) async fn add_node(&self, labels: BTreeMap<String, String>) -> Node {
        let number = self.nodes.fetch_add(1, Ordering::SeqCst);
        let mut spec = Spec::new(&format!("node-{number}"), Ipv4Addr::new(10, 77, 1, number + 1));
        spec.labels = labels;
        join(&self.plane, self.ground.clone(), spec).await
    }

    /// A subnet that nobody has.
    pub(crate) fn subnet(&self) -> u8 {
        self.subnets.fetch_add(1, Ordering::SeqCst)
    }
}

// === impl Spec ===

impl Spec {
    fn new(name: &str, address: Ipv4Addr) -> Self {
        Self { name: name.to_owned(), address, labels: BTreeMap::new(), gpus: 64 }
    }
}

async fn join(plane: &ControlPlane, ground: Arc<Ground>, spec: Spec) -> Node {
    let user = format!("system:node:{}", spec.name);
    let kube = Kube::new(&plane.kubeconfig(&user, Some("system:nodes"))).await;
    Node::join(kube, ground, spec).await
}

/// What images stand for. Envoy is there only where it has been installed.
fn programs() -> BTreeMap<String, PathBuf> {
    let mut programs = BTreeMap::from([("anteroom".to_owned(), PathBuf::from(ANTEROOM))]);
    if let Some(envoy) = std::env::var_os("ANTEROOM_ENVOY") {
        programs.insert("envoy".into(), envoy.into());
    }
    programs
}
