//! Endpoints of stored responses, by id.

use std::{
    array,
    collections::{HashMap, VecDeque},
    hash::BuildHasher,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::Instant};

use crate::{admission::Gate, state::Endpoint};

/// Endpoints by response id, sharded to reduce lock contention.
pub(in crate::proxy) struct ResponseOwners {
    shards: [Mutex<OwnerShard>; RESPONSE_SHARDS],
    hasher: std::hash::RandomState,
    /// Bounds concurrent searches.
    pub(super) searches: Semaphore,
}

#[derive(Default)]
struct OwnerShard {
    owners: HashMap<Arc<str>, ResponseOwner>,
    /// Oldest first.
    order: VecDeque<Arc<str>>,
}

struct ResponseOwner {
    gate: Weak<Gate>,
    endpoint: Weak<Endpoint>,
    since: Instant,
}

const RESPONSE_SHARDS: usize = 16;

/// Recorded responses, in 10 to 15 MB. The oldest are evicted.
const MAX_RESPONSES: usize = 65_536;

/// Lifetime of a record. vLLM stores responses while it runs, OpenAI for 30 days.
const MAX_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// Concurrent searches. Bounded, as clients can make up ids.
const MAX_SEARCHES: usize = 8;

// === impl ResponseOwners ===

impl Default for ResponseOwners {
    fn default() -> Self {
        Self {
            shards: array::from_fn(|_| Mutex::default()),
            hasher: std::hash::RandomState::new(),
            searches: Semaphore::new(MAX_SEARCHES),
        }
    }
}

impl ResponseOwners {
    /// Records the endpoint of a response. A live record is not replaced: a response body could contain another id.
    pub(super) fn record(&self, id: &str, gate: &Arc<Gate>, endpoint: &Arc<Endpoint>) {
        let now = Instant::now();
        let mut shard = self.shard(id).lock();
        shard.make_room(now);
        if shard.owners.get(id).is_some_and(|owner| owner.get().is_some()) {
            return;
        }
        let id = Arc::<str>::from(id);
        let owner =
            ResponseOwner { gate: Arc::downgrade(gate), endpoint: Arc::downgrade(endpoint), since: now };
        if shard.owners.insert(id.clone(), owner).is_none() {
            shard.order.push_back(id);
        }
    }

    /// Returns the recorded endpoint, unless it has left its route.
    pub(super) fn owner(&self, id: &str) -> Option<(Arc<Gate>, Arc<Endpoint>)> {
        self.shard(id).lock().owners.get(id)?.get()
    }

    fn shard(&self, id: &str) -> &Mutex<OwnerShard> {
        &self.shards[self.hasher.hash_one(id) as usize % RESPONSE_SHARDS]
    }
}

impl OwnerShard {
    fn make_room(&mut self, now: Instant) {
        while let Some(oldest) = self.order.front() {
            let is_over = self.owners.get(oldest).is_none_or(|owner| now - owner.since >= MAX_AGE);
            if self.order.len() < MAX_RESPONSES / RESPONSE_SHARDS && !is_over {
                return;
            }
            self.owners.remove(oldest);
            self.order.pop_front();
        }
    }
}

impl ResponseOwner {
    fn get(&self) -> Option<(Arc<Gate>, Arc<Endpoint>)> {
        let (gate, endpoint) = (self.gate.upgrade()?, self.endpoint.upgrade()?);
        let is_known = gate.target().endpoints().iter().any(|known| known.id() == endpoint.id());
        is_known.then_some((gate, endpoint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{coldstart::ColdStarts, domain::Policy};

    fn route() -> (Arc<Gate>, Arc<Endpoint>) {
        let gate = Gate::new("tiny".into(), Policy::default(), ColdStarts::new(|_| {}));
        let endpoint = Endpoint::new("127.0.0.1:1", 1);
        gate.target().add(&endpoint);
        (gate, endpoint)
    }

    #[tokio::test(start_paused = true)]
    async fn record_expires_after_a_day() {
        let responses = ResponseOwners::default();
        let (gate, endpoint) = route();
        let other = Endpoint::new("127.0.0.1:2", 1);
        gate.target().add(&other);
        let owner = |id: &str| responses.owner(id).map(|(_, endpoint)| endpoint.id());
        responses.record("resp_1", &gate, &endpoint);
        responses.record("resp_1", &gate, &other);
        assert_eq!(owner("resp_1"), Some(endpoint.id()), "the first record stays");
        gate.target().remove(&endpoint);
        assert_eq!(owner("resp_1"), None, "gone with its endpoint");
        responses.record("resp_1", &gate, &other);
        assert_eq!(owner("resp_1"), Some(other.id()));
        tokio::time::advance(MAX_AGE).await;
        // Expired records are evicted when their shard gets new ones.
        (0..10 * RESPONSE_SHARDS)
            .for_each(|number| responses.record(&format!("resp_new{number}"), &gate, &other));
        assert_eq!(owner("resp_1"), None);
    }

    #[tokio::test]
    async fn oldest_records_are_evicted() {
        let responses = ResponseOwners::default();
        let (gate, endpoint) = route();
        for number in 0..2 * MAX_RESPONSES {
            responses.record(&format!("resp_{number}"), &gate, &endpoint);
        }
        let count = |of: fn(&OwnerShard) -> usize| -> usize {
            responses.shards.iter().map(|shard| of(&shard.lock())).sum()
        };
        assert_eq!(count(|shard| shard.owners.len()), MAX_RESPONSES);
        assert_eq!(count(|shard| shard.order.len()), MAX_RESPONSES);
        assert!(responses.owner("resp_0").is_none());
        assert!(responses.owner(&format!("resp_{}", 2 * MAX_RESPONSES - 1)).is_some());
    }
}
