//! Pods of a target that have ended: nobody answers what is in flight there.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
};

use k8s_openapi::api::core::v1::Pod;

use super::merge::addresses;
use crate::state::DiscoveredEndpoint;

/// The last addresses at which pods have ended: their phase says so, or their object went away while they were
/// terminating. `deletionTimestamp` alone drains, and a pod that merely has other labels now may live.
#[derive(Debug, Default)]
pub(super) struct Dead {
    /// Addresses of pods that are terminating, by uid.
    terminating: HashMap<String, Vec<Arc<str>>>,
    /// Oldest first.
    dead: VecDeque<Arc<str>>,
}

/// How many addresses are remembered. Whoever looks after an endpoint reads them in the update that takes it away.
const MAX_DEAD: usize = 256;

// === impl Dead ===

impl Dead {
    /// These pods are there now, all of them if `is_synced`, each taking requests on `ports`. Returns the addresses of the
    /// dead that are none of `endpoints`.
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
        let there: HashSet<_> = pods.iter().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        let vanished: Vec<_> =
            self.terminating.keys().filter(|uid| is_synced && !there.contains(&***uid)).cloned().collect();
        for uid in vanished {
            let addresses = self.terminating.remove(&uid).unwrap_or_default();
            self.bury(addresses);
        }
        for pod in pods {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            match &pod.metadata.uid {
                _ if matches!(phase, Some("Succeeded" | "Failed")) => self.bury(at(pod)),
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

    fn bury(&mut self, addresses: Vec<Arc<str>>) {
        for address in addresses {
            if !self.dead.contains(&address) {
                self.dead.push_back(address);
            }
        }
        let surplus = self.dead.len().saturating_sub(MAX_DEAD);
        self.dead.drain(..surplus);
    }
}
