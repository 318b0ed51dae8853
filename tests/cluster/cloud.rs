//! Cloud that provides a machine for an unschedulable pod: its node appears a while after the scheduler has reported
//! the pod, and is ready a while after that.

use std::{collections::BTreeMap, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    node::{Node, clock::NodeClock},
    scenario::Scenario,
    wait,
};

/// Properties of a node that is added later.
#[derive(Clone, Debug)]
pub(crate) struct NodeTemplate {
    /// Labels of the node. It takes only pods that select it by one of them, so that it affects no pods of other
    /// scenarios.
    pub(crate) labels: BTreeMap<String, String>,
    /// Time from the creation of the node object until the node is ready.
    pub(crate) boot: Duration,
    pub(crate) clock: NodeClock,
    /// The network can be cut off ([`Node::lose_power`]).
    pub(crate) wired: bool,
}

/// Cloud that provides one machine. Dropping it removes the machine.
pub(crate) struct Cloud(AbortOnDropHandle<Node>);

// === impl NodeTemplate ===

impl From<BTreeMap<String, String>> for NodeTemplate {
    fn from(labels: BTreeMap<String, String>) -> Self {
        Self { labels, boot: Duration::ZERO, clock: NodeClock::Right, wired: false }
    }
}

// === impl Scenario ===

impl Scenario {
    /// Returns a machine that only takes pods of the scenario.
    pub(crate) fn machine(&self) -> NodeTemplate {
        self.pool().into()
    }

    /// Adds the machine `after` the scheduler has found no node for a pod of the scenario.
    pub(crate) fn cloud(&self, after: Duration, machine: NodeTemplate) -> Cloud {
        let (world, pods) = (self.world.clone(), self.api::<Pod>());
        Cloud(AbortOnDropHandle::new(tokio::spawn(async move {
            let events = watcher(pods, watcher::Config::default()).backoff(wait::ShortBackoff::default());
            let mut pods = std::pin::pin!(events.applied_objects());
            while !pods.next().await.is_some_and(|pod| pod.is_ok_and(|pod| fits_nowhere(&pod))) {}
            sleep(after).await;
            world.add_node(machine).await
        })))
    }
}

fn fits_nowhere(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|one| one.reason.as_deref() == Some("Unschedulable"))
}

// === impl Cloud ===

impl Cloud {
    /// Waits for the machine's node and returns it.
    pub(crate) async fn node(self) -> Node {
        wait::within("a node", wait::WAIT_LIMIT, self.0).await.unwrap()
    }
}
