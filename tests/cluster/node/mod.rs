//! Nodes, each with an agent in place of the kubelet. The agent takes the pods that the scheduler binds to the node,
//! runs their containers as processes on separate addresses, runs their probes, and reports their statuses.
//!
//! Behaviour matches the kubelet's: the order of conditions, the names of reasons, a first probe at once and the next
//! one a period later, the grace period at the end. Anything that requires hardware is simulated according to
//! annotations of the pod ([`fate`]).

pub(crate) mod clock;
mod container;
mod endpoint;
mod events;
pub(crate) mod fate;
pub(crate) mod history;
mod logs;
mod pod;
mod probe;
mod program;
mod pull;
mod status;
mod volumes;
mod wire;

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::StreamExt as _;
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{self, Event, Pod},
};
use kube::{
    ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt as _, watcher},
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{interval, sleep},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{api::Kube, wait};
use clock::NodeClock;
use endpoint::KubeletListener;
use history::{NodeEventKind, NodeHistory};
use logs::NodeLogs;
use wire::NodeLink;

/// Same as the kubelet's: the node controller considers a node lost after 40 s without a heartbeat.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Taint of nodes that belong to one scenario.
pub(crate) const RESERVED: &str = "test.anteroom.dev/reserved";

/// Last byte of the address of a namespace's first pod.
const FIRST_POD_HOST_NUMBER: u8 = 50;

/// State shared by all nodes.
pub(crate) struct SharedNodeState {
    pub(crate) history: NodeHistory,
    pub(crate) addresses: Addresses,
    /// Folder for the output of pods.
    pub(crate) logs: PathBuf,
    /// Folder for the files of pods.
    pub(crate) run: PathBuf,
    /// CA certificate of the apiserver, as mounted into pods.
    pub(crate) authority: String,
    /// Programs of pods, by the name of their image.
    pub(crate) programs: BTreeMap<String, PathBuf>,
}

/// Addresses of pods: each namespace has its own range.
#[derive(Default)]
pub(crate) struct Addresses(Mutex<HashMap<String, AddressRange>>);

struct AddressRange {
    subnet: u8,
    last: u8,
}

/// Properties of a node.
pub(crate) struct Spec {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) labels: BTreeMap<String, String>,
    /// Namespace of the scenario that the node is reserved for: only pods that tolerate its taint are scheduled there.
    pub(crate) reserved: Option<String>,
    pub(crate) gpus: u32,
    /// Time from registration to readiness.
    pub(crate) boot: Duration,
    pub(crate) clock: NodeClock,
    /// The machine has its own network, which can be cut off.
    pub(crate) wired: bool,
}

/// Registered node. Dropping it kills its pods without notice to the apiserver.
pub(crate) struct Node {
    pub(crate) name: String,
    kube: Kube,
    wire: Option<Arc<NodeLink>>,
    tasks: Vec<AbortOnDropHandle<()>>,
}

/// State of a node for the agent's tasks.
struct Agent {
    name: String,
    address: Ipv4Addr,
    kube: Kube,
    ground: Arc<SharedNodeState>,
    clock: NodeClock,
    logs: NodeLogs,
    events: mpsc::UnboundedSender<Event>,
    wire: Option<Arc<NodeLink>>,
    /// Namespace of the scenario that the node belongs to; empty for none.
    owner: String,
}

// === impl Addresses ===

impl Addresses {
    /// Sets the range of a namespace to 10.77.`subnet`.50 and above.
    pub(crate) fn set(&self, namespace: &str, subnet: u8) {
        self.0.lock().insert(namespace.to_owned(), AddressRange { subnet, last: FIRST_POD_HOST_NUMBER - 1 });
    }

    /// Returns the next address; addresses are reused after about 200 others.
    fn next(&self, namespace: &str) -> Ipv4Addr {
        let mut ranges = self.0.lock();
        let range = ranges
            .entry(namespace.to_owned())
            .or_insert(AddressRange { subnet: 2, last: FIRST_POD_HOST_NUMBER - 1 });
        range.last = if range.last < 250 { range.last + 1 } else { FIRST_POD_HOST_NUMBER };
        Ipv4Addr::new(10, 77, range.subnet, range.last)
    }
}

// === impl Node ===

impl Node {
    /// Registers the node, with a node's rights, and serves it from then on.
    pub(crate) async fn join(kube: Kube, ground: Arc<SharedNodeState>, spec: Spec) -> Self {
        let endpoint = KubeletListener::bind(&spec.name, spec.address).await;
        let (events, written) = mpsc::unbounded_channel();
        let [.., number] = spec.address.octets();
        let wire = if spec.wired { Some(Arc::new(NodeLink::create_link(number).await)) } else { None };
        let agent = Arc::new(Agent {
            name: spec.name.clone(),
            address: spec.address,
            kube: kube.clone(),
            ground,
            clock: spec.clock,
            logs: NodeLogs::default(),
            events,
            wire: wire.clone(),
            owner: spec.reserved.clone().unwrap_or_default(),
        });
        agent.note_node(NodeEventKind::Registers);
        kube.all::<v1::Node>().create(&PostParams::default(), &object(&spec)).await.unwrap();
        agent.note_node(NodeEventKind::Registered);
        agent.renew().await.unwrap();
        if spec.boot.is_zero() {
            agent.beat().await.unwrap();
        }
        let tasks = vec![
            AbortOnDropHandle::new(tokio::spawn(agent.clone().heartbeats(spec.boot))),
            AbortOnDropHandle::new(tokio::spawn(endpoint.serve(agent.clone()))),
            AbortOnDropHandle::new(tokio::spawn(agent.clone().write_events(written))),
            AbortOnDropHandle::new(tokio::spawn(agent.serve())),
        ];
        Self { name: spec.name, kube, wire, tasks }
    }

    /// Cuts the machine's power: packets to its pods are lost without notice. Requires a wire, and lasts as long as
    /// this node.
    pub(crate) async fn lose_power(&mut self) {
        self.wire.as_ref().expect("a machine with a wire").cut().await;
        self.tasks.clear();
    }

    /// Waits until the scheduler may use the node.
    pub(crate) async fn ready(&self) {
        let nodes = self.kube.all::<v1::Node>();
        wait::object(&nodes, &self.name, "not tainted as not ready", wait::WAIT_LIMIT, |node| {
            let mut taints = node?.spec.as_ref()?.taints.iter().flatten();
            (!taints.any(|taint| taint.key.starts_with("node.kubernetes.io/"))).then_some(())
        })
        .await;
    }

    /// Deletes the node, like a cluster autoscaler that removes an empty node.
    pub(crate) async fn leave(self, admin: &Kube) {
        admin.all::<v1::Node>().delete(&self.name, &DeleteParams::default()).await.unwrap();
    }
}

fn object(spec: &Spec) -> v1::Node {
    let room = json!({
        "cpu": "64", "memory": "512Gi", "ephemeral-storage": "1Ti", "pods": "110", "nvidia.com/gpu": spec.gpus.to_string(),
    });
    let mut labels = spec.labels.clone();
    labels.insert("kubernetes.io/hostname".into(), spec.name.clone());
    labels.insert("kubernetes.io/os".into(), "linux".into());
    let reserved = json!([{ "key": RESERVED, "effect": "NoSchedule" }]);
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": spec.name, "labels": labels },
        "spec": { "taints": if spec.reserved.is_some() { reserved } else { json!([]) } },
        "status": {
            "capacity": room,
            "allocatable": room,
            "addresses": [
                { "type": "InternalIP", "address": spec.address },
                { "type": "Hostname", "address": spec.name },
            ],
            "conditions": conditions(spec.clock.now(), false),
            "daemonEndpoints": { "kubeletEndpoint": { "Port": endpoint::PORT } },
            "nodeInfo": {
                "architecture": "amd64", "operatingSystem": "linux", "kubeletVersion": "v1.37.2",
                "bootID": "", "containerRuntimeVersion": "processes://1", "kernelVersion": "", "kubeProxyVersion": "",
                "machineID": "", "osImage": "", "systemUUID": "",
            },
        },
    });
    serde_json::from_value(node).unwrap()
}

fn conditions(now: SystemTime, ready: bool) -> Value {
    let now = status::time(now);
    let (status, reason) = if ready { ("True", "KubeletReady") } else { ("False", "KubeletNotReady") };
    let condition = |kind, status, reason| {
        json!({
            "type": kind, "status": status, "reason": reason, "message": "",
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        })
    };
    json!([
        condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
        condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
        condition("PIDPressure", "False", "KubeletHasSufficientPID"),
        condition("Ready", status, reason),
    ])
}

// === impl Agent ===

impl Agent {
    async fn heartbeats(self: Arc<Self>, boot: Duration) {
        sleep(boot).await;
        let mut ticks = interval(HEARTBEAT);
        loop {
            ticks.tick().await;
            // A heartbeat missed while the apiserver is down is harmless: the next is due before the timeout.
            let _ = self.beat().await;
        }
    }

    async fn beat(&self) -> kube::Result<()> {
        self.renew().await?;
        // After missed heartbeats the node controller sets the condition to Unknown; the node must report it again.
        let nodes = self.kube.all::<v1::Node>();
        let status = nodes.get(&self.name).await?.status.unwrap_or_default();
        let ready = |condition: &v1::NodeCondition| condition.type_ == "Ready" && condition.status == "True";
        if !status.conditions.iter().flatten().any(ready) {
            let now = self.clock.reads(self.note_node(NodeEventKind::NodeReady));
            let patch = json!({ "status": { "conditions": conditions(now, true) } });
            nodes.patch_status(&self.name, &PatchParams::default(), &Patch::Strategic(patch)).await?;
        }
        Ok(())
    }

    async fn renew(&self) -> kube::Result<()> {
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": { "name": self.name },
            "spec": {
                "holderIdentity": self.name,
                "leaseDurationSeconds": 40,
                "renewTime": humantime::format_rfc3339_micros(self.clock.now()).to_string(),
            },
        });
        let leases = self.kube.namespaced::<Lease>("kube-node-lease");
        leases.patch(&self.name, &PatchParams::apply("kubelet").force(), &Patch::Apply(&lease)).await?;
        Ok(())
    }

    /// Runs a task for each pod of the node and passes on the pod's updates, until the pod is gone from node and
    /// apiserver.
    async fn serve(self: Arc<Self>) {
        let pods = self.kube.all::<Pod>();
        let config = watcher::Config::default().fields(&format!("spec.nodeName={}", self.name));
        let mut events = std::pin::pin!(watcher(pods, config).backoff(wait::ShortBackoff::default()));
        let mut known: HashMap<String, watch::Sender<Option<Pod>>> = HashMap::new();
        let mut listed: Vec<String> = Vec::new();
        let mut tasks = JoinSet::new();
        while let Some(event) = events.next().await {
            while tasks.try_join_next().is_some() {}
            match event {
                Ok(watcher::Event::Init) => listed.clear(),
                Ok(watcher::Event::InitApply(pod) | watcher::Event::Apply(pod)) => {
                    let uid = pod.uid().unwrap_or_default();
                    listed.push(uid.clone());
                    let news = known.entry(uid).or_insert_with(|| {
                        let (news, pods) = watch::channel(Some(pod.clone()));
                        tasks.spawn(pod::run(self.clone(), pods));
                        news
                    });
                    news.send_replace(Some(pod));
                }
                Ok(watcher::Event::Delete(pod)) => gone(&mut known, &pod.uid().unwrap_or_default()),
                Ok(watcher::Event::InitDone) => {
                    let missing = known.keys().filter(|uid| !listed.contains(uid)).cloned();
                    missing.collect::<Vec<_>>().iter().for_each(|uid| gone(&mut known, uid));
                }
                // A watch fails while the apiserver is down, and is retried.
                Err(_) => {}
            }
        }
    }

    fn note(&self, pod: &Pod, what: NodeEventKind) -> SystemTime {
        self.ground.history.note(&pod.namespace().unwrap_or_default(), &pod.name_any(), what)
    }

    fn note_node(&self, what: NodeEventKind) -> SystemTime {
        self.ground.history.note(&self.owner, &self.name, what)
    }
}

fn gone(known: &mut HashMap<String, watch::Sender<Option<Pod>>>, uid: &str) {
    if let Some(news) = known.remove(uid) {
        news.send_replace(None);
    }
}
