//! Addresses of terminated pods: requests in flight to them will never be answered.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
};

use k8s_openapi::api::core::v1::Pod;

use crate::{kube::pods::addresses, state::DiscoveredEndpoint};

/// Most recent addresses of terminated pods: those with a final phase, and those deleted while terminating.
/// `deletionTimestamp` alone only drains, and a pod that leaves the selector may still run.
#[derive(Debug, Default)]
pub(super) struct DeadAddresses {
    /// Addresses of pods that are terminating, by uid.
    terminating: HashMap<String, Vec<Arc<str>>>,
    /// Oldest first.
    dead: VecDeque<Arc<str>>,
}

/// Maximum number of addresses kept. Subscribers read a dead address from the same update that removes its endpoint.
const MAX_DEAD: usize = 256;

// === impl DeadAddresses ===

impl DeadAddresses {
    /// Records the current pods (complete if `is_synced`) with their serving ports. Returns the dead addresses not in
    /// `endpoints`.
    pub(super) fn update(
        &mut self,
        pods: &[Arc<Pod>],
        is_synced: bool,
        endpoints: &[DiscoveredEndpoint],
        ports: impl Fn(&Pod) -> Vec<u16>,
    ) -> Vec<Arc<str>> {
        let at = |pod: &Pod| -> Vec<Arc<str>> {
            let ports = ports(pod);
            let sockets =
                addresses(pod).flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port)));
            sockets.map(|socket| socket.to_string().into()).collect()
        };
        let present: HashSet<_> = pods.iter().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        let deleted: Vec<_> =
            self.terminating.keys().filter(|uid| is_synced && !present.contains(&***uid)).cloned().collect();
        for uid in deleted {
            let addresses = self.terminating.remove(&uid).unwrap_or_default();
            self.record(addresses);
        }
        for pod in pods {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            match &pod.metadata.uid {
                _ if matches!(phase, Some("Succeeded" | "Failed")) => self.record(at(pod)),
                Some(uid) if pod.metadata.deletion_timestamp.is_some() => {
                    self.terminating.insert(uid.clone(), at(pod));
                }
                _ => {}
            }
        }
        let alive: HashSet<_> = endpoints.iter().map(|endpoint| &endpoint.address).collect();
        self.dead.retain(|address| !alive.contains(address));
        self.dead.iter().cloned().collect()
    }

    fn record(&mut self, addresses: Vec<Arc<str>>) {
        for address in addresses {
            if !self.dead.contains(&address) {
                self.dead.push_back(address);
            }
        }
        let surplus = self.dead.len().saturating_sub(MAX_DEAD);
        self.dead.drain(..surplus);
    }
}
