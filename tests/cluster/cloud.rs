//! A cloud that has a machine for a pod that fits nowhere: its node comes a while after the scheduler has said so, and is
//! ready a while after that.

use std::{collections::BTreeMap, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    node::{Node, clock::Clock},
    scenario::Scenario,
    wait,
};

/// What a node is like that was not there from the beginning.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// It takes only pods that select it by one of these: those of other scenarios would go with it.
    pub(crate) labels: BTreeMap<String, String>,
    /// How long after its object is there it is ready.
    pub(crate) boot: Duration,
    pub(crate) clock: Clock,
    /// Whether its network can be cut off ([`Node::lose_power`]).
    pub(crate) wired: bool,
}

/// A cloud that brings one machine. Dropping it takes the machine away.
pub(crate) struct Cloud(AbortOnDropHandle<Node>);

// === impl Machine ===

impl From<BTreeMap<String, String>> for Machine {
    fn from(labels: BTreeMap<String, String>) -> Self {
        Self { labels, boot: Duration::ZERO, clock: Clock::Right, wired: false }
    }
}

// === impl Scenario ===

impl Scenario {
    /// A machine that only pods of the scenario can be on.
    pub(crate) fn machine(&self) -> Machine {
        self.pool().into()
    }

    /// Has the machine come so long after the scheduler has found no node for a pod of the scenario.
    pub(crate) fn cloud(&self, after: Duration, machine: Machine) -> Cloud {
        let (world, pods) = (self.world.clone(), self.api::<Pod>());
        Cloud(AbortOnDropHandle::new(tokio::spawn(async move {
            let events = watcher(pods, watcher::Config::default()).backoff(wait::Quick::default());
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
    /// The node of its machine, once that is there.
    pub(crate) async fn node(self) -> Node {
        wait::within("a node", wait::SOON, self.0).await.unwrap()
    }
}
