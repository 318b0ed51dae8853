//! The cluster's DNS, on port 53 of the tests' own network: `SERVICE.NAMESPACE.svc.cluster.local` resolves to the ready
//! addresses of the Service. All Services behave like headless ones, since there is no kube-proxy.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    sync::Arc,
};

use futures_util::StreamExt as _;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{
    ResourceExt as _,
    runtime::{WatchStreamExt as _, watcher},
};
use parking_lot::Mutex;
use tokio::net::UdpSocket;
use tokio_util::task::AbortOnDropHandle;

use crate::{api::Kube, wait};

/// In seconds; short enough that no stale response is used.
const TTL: u32 = 1;
const TYPE_A: [u8; 2] = [0, 1];

/// DNS server with the current names.
pub(crate) struct DnsServer {
    names: Arc<DnsNames>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

#[derive(Default)]
struct DnsNames {
    /// Names set by scenarios; they take precedence.
    set: Mutex<BTreeMap<String, Vec<Ipv4Addr>>>,
    /// Name of the Service and its ready addresses, by EndpointSlice.
    slices: Mutex<HashMap<String, (String, Vec<Ipv4Addr>)>>,
}

// === impl DnsServer ===

impl DnsServer {
    pub(crate) async fn start(kube: &Kube) -> Self {
        let names = Arc::new(DnsNames::default());
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 53)).await.unwrap();
        let tasks = [
            AbortOnDropHandle::new(tokio::spawn(serve(socket, names.clone()))),
            AbortOnDropHandle::new(tokio::spawn(follow(kube.clone(), names.clone()))),
        ];
        Self { names, _tasks: tasks }
    }

    /// Sets the addresses of a name, for processes that are not pods. Without addresses the name does not exist.
    pub(crate) fn set(&self, name: &str, addresses: &[Ipv4Addr]) {
        self.names.set.lock().insert(name.to_owned(), addresses.to_vec());
    }
}

// === impl DnsNames ===

impl DnsNames {
    fn find(&self, name: &str) -> Vec<Ipv4Addr> {
        if let Some(addresses) = self.set.lock().get(name) {
            return addresses.clone();
        }
        let slices = self.slices.lock();
        let found = slices.values().filter(|(service, _)| service == name);
        found.flat_map(|(_, addresses)| addresses).copied().collect()
    }
}

async fn follow(kube: Kube, names: Arc<DnsNames>) {
    let slices = watcher(kube.all::<EndpointSlice>(), watcher::Config::default());
    let mut slices = std::pin::pin!(slices.backoff(wait::ShortBackoff::default()));
    let key =
        |slice: &EndpointSlice| format!("{}/{}", slice.namespace().unwrap_or_default(), slice.name_any());
    while let Some(event) = slices.next().await {
        match event {
            Ok(watcher::Event::Init) => names.slices.lock().clear(),
            Ok(watcher::Event::InitApply(slice) | watcher::Event::Apply(slice)) => {
                names.slices.lock().insert(key(&slice), content(&slice));
            }
            Ok(watcher::Event::Delete(slice)) => drop(names.slices.lock().remove(&key(&slice))),
            Ok(watcher::Event::InitDone) | Err(_) => {}
        }
    }
}

/// Returns the DNS name of the Service and its ready addresses.
fn content(slice: &EndpointSlice) -> (String, Vec<Ipv4Addr>) {
    let service = slice.labels().get("kubernetes.io/service-name").cloned().unwrap_or_default();
    let name = format!("{service}.{}.svc.cluster.local", slice.namespace().unwrap_or_default());
    let ready = slice.endpoints.iter().filter(|endpoint| {
        endpoint.conditions.as_ref().is_none_or(|conditions| conditions.ready != Some(false))
    });
    (name, ready.flat_map(|endpoint| &endpoint.addresses).filter_map(|text| text.parse().ok()).collect())
}

async fn serve(socket: UdpSocket, names: Arc<DnsNames>) {
    let mut packet = [0; 1500];
    while let Ok((length, from)) = socket.recv_from(&mut packet).await {
        if let Some(answer) = answer(&packet[..length], &names) {
            let _ = socket.send_to(&answer, from).await;
        }
    }
}

/// Builds the response to a query (RFC 1035, section 4); `None` for malformed packets.
fn answer(packet: &[u8], names: &DnsNames) -> Option<Vec<u8>> {
    let mut at = 12;
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*packet.get(at)?);
        let label = packet.get(at + 1..at + 1 + length)?;
        at += 1 + length;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(label).to_lowercase());
    }
    // Name, type and class.
    let question = packet.get(12..at + 4)?;
    let addresses = names.find(&labels.join("."));
    let exists = !addresses.is_empty();
    // There are only A records.
    let addresses = if question.ends_with(&[TYPE_A, [0, 1]].concat()) { addresses } else { Vec::new() };

    let mut answer = packet.get(..2)?.to_vec();
    // An authoritative response; recursion desired and available; NXDOMAIN is 3.
    answer.extend([0x85, if exists { 0x80 } else { 0x83 }]);
    answer.extend([0, 1, 0, u8::try_from(addresses.len()).ok()?, 0, 0, 0, 0]);
    answer.extend(question);
    for address in addresses {
        // Pointer to the name in the question, at offset 12.
        answer.extend([0xc0, 12]);
        answer.extend([TYPE_A, [0, 1]].concat());
        answer.extend(TTL.to_be_bytes());
        answer.extend([0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}
