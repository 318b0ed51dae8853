//! ResponseOwners that model servers keep (`/v1/responses`): which endpoint keeps which.
//!
//! An endpoint is remembered when a response that it makes passes here. One that another replica of ours saw, or that was
//! forgotten, is found by asking the endpoints that are ready.

mod background;
mod lookup;
pub(super) mod watch;

use std::{
    array,
    collections::{HashMap, VecDeque},
    hash::BuildHasher,
    sync::{Arc, Weak},
    time::Duration,
};

use http::{
    HeaderName, HeaderValue, Request,
    header::{AUTHORIZATION, HOST},
    request,
};
use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::Instant};

use crate::{admission::Gate, state::Endpoint};

/// The endpoints that keep responses, by the ids of these. In shards, so that threads seldom wait for each other.
pub(super) struct ResponseOwners {
    shards: [Mutex<Shard>; SHARDS],
    hasher: std::hash::RandomState,
    /// Requests for which endpoints are asked at the same time.
    searches: Semaphore,
}

#[derive(Default)]
struct Shard {
    owners: HashMap<Arc<str>, ResponseOwner>,
    /// The oldest first.
    order: VecDeque<Arc<str>>,
}

struct ResponseOwner {
    gate: Weak<Gate>,
    endpoint: Weak<Endpoint>,
    since: Instant,
}

/// What a request has to do with responses that servers keep.
pub(super) struct ResponseAffinity {
    /// The endpoint that it has to go to.
    pub(super) pin: Option<u64>,
    /// It makes one.
    makes: bool,
    /// In the background.
    background: bool,
}

const SHARDS: usize = 16;

/// How many responses are remembered, in 10 to 15 MB; beyond, the oldest are forgotten, and asked for.
const MAX_RESPONSES: usize = 65_536;

/// How long a response is remembered. vLLM keeps them as long as it runs, OpenAI for 30 days.
const MAX_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// How many requests may have endpoints asked at the same time. Ids are easily made up.
const MAX_SEARCHES: usize = 8;

/// Who a response belongs to is for the server to say.
const CREDENTIALS: [HeaderName; 2] = [AUTHORIZATION, HeaderName::from_static("x-api-key")];

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
    /// The endpoint keeps this response. An id that is known stays with its endpoint while that lives: an answer could
    /// contain the id of another response.
    fn remember(&self, id: &str, gate: &Arc<Gate>, endpoint: &Arc<Endpoint>) {
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

    /// The endpoint that keeps it, if that is known and is still one of its route.
    fn owner(&self, id: &str) -> Option<(Arc<Gate>, Arc<Endpoint>)> {
        self.shard(id).lock().owners.get(id)?.get()
    }

    fn shard(&self, id: &str) -> &Mutex<Shard> {
        &self.shards[self.hasher.hash_one(id) as usize % SHARDS]
    }
}

impl Shard {
    fn make_room(&mut self, now: Instant) {
        while let Some(oldest) = self.order.front() {
            let is_over = self.owners.get(oldest).is_none_or(|owner| now - owner.since >= MAX_AGE);
            if self.order.len() < MAX_RESPONSES / SHARDS && !is_over {
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

// === impl ResponseAffinity ===

impl ResponseAffinity {
    /// For a request that asks for what an endpoint keeps.
    pub(super) fn at(endpoint: &Endpoint) -> Self {
        Self { pin: Some(endpoint.id()), makes: false, background: false }
    }
}

/// A GET of a response, on behalf of the client of a request.
fn question(path: &str, of: &request::Parts) -> Option<request::Parts> {
    let (mut question, ()) = Request::get(path).body(()).ok()?.into_parts();
    for name in CREDENTIALS {
        if let Some(value) = of.headers.get(&name) {
            question.headers.insert(name, value.clone());
        }
    }
    let host = of.headers.get(HOST).cloned().or_else(|| {
        let authority = of.uri.authority()?;
        HeaderValue::from_str(authority.as_str()).ok()
    });
    question.headers.insert(HOST, host?);
    Some(question)
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
    async fn response_is_known_for_a_day() {
        let responses = ResponseOwners::default();
        let (gate, endpoint) = route();
        let other = Endpoint::new("127.0.0.1:2", 1);
        gate.target().add(&other);
        let owner = |id: &str| responses.owner(id).map(|(_, endpoint)| endpoint.id());
        responses.remember("resp_1", &gate, &endpoint);
        responses.remember("resp_1", &gate, &other);
        assert_eq!(owner("resp_1"), Some(endpoint.id()), "as it was first");
        gate.target().remove(&endpoint);
        assert_eq!(owner("resp_1"), None, "gone with its endpoint");
        responses.remember("resp_1", &gate, &other);
        assert_eq!(owner("resp_1"), Some(other.id()));
        tokio::time::advance(MAX_AGE).await;
        // What is too old goes when there are new ones in its shard.
        (0..10 * SHARDS).for_each(|number| responses.remember(&format!("resp_new{number}"), &gate, &other));
        assert_eq!(owner("resp_1"), None);
    }

    #[tokio::test]
    async fn responses_are_bounded_and_the_oldest_forgotten() {
        let responses = ResponseOwners::default();
        let (gate, endpoint) = route();
        for number in 0..2 * MAX_RESPONSES {
            responses.remember(&format!("resp_{number}"), &gate, &endpoint);
        }
        let count = |of: fn(&Shard) -> usize| -> usize {
            responses.shards.iter().map(|shard| of(&shard.lock())).sum()
        };
        assert_eq!(count(|shard| shard.owners.len()), MAX_RESPONSES);
        assert_eq!(count(|shard| shard.order.len()), MAX_RESPONSES);
        assert!(responses.owner("resp_0").is_none());
        assert!(responses.owner(&format!("resp_{}", 2 * MAX_RESPONSES - 1)).is_some());
    }
}
