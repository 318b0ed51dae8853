//! Responses that model servers keep (`/v1/responses`): which endpoint keeps which.
//!
//! An endpoint is remembered when a response that it makes passes here. One that another replica of ours saw, or that was
//! forgotten, is found by asking the endpoints that are ready.

use std::{
    array,
    collections::{HashMap, VecDeque},
    hash::BuildHasher,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use http::{
    HeaderName, HeaderValue, Request, StatusCode,
    header::{AUTHORIZATION, HOST},
    request,
};
use parking_lot::Mutex;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};

use super::{
    Proxy, Shared, background::Background, body::Lease, dispatch::Intake, find::encoding, outgoing::Outgoing,
};
use crate::{
    admission::Gate,
    domain::{Period, UpstreamTimeouts},
    error::ProxyError,
    openai::{self, ResponseRequest},
    state::Endpoint,
    upstream::Reuse,
};

/// The endpoints that keep responses, by the ids of these. In parts, so that threads seldom wait for each other.
pub(super) struct Responses {
    parts: [Mutex<Part>; PARTS],
    hasher: std::hash::RandomState,
    /// Requests for which endpoints are asked at the same time.
    searches: Semaphore,
}

#[derive(Default)]
struct Part {
    keepers: HashMap<Arc<str>, Keeper>,
    /// The oldest first.
    order: VecDeque<Arc<str>>,
}

struct Keeper {
    gate: Weak<Gate>,
    endpoint: Weak<Endpoint>,
    since: Instant,
}

/// What a request has to do with responses that servers keep.
pub(super) struct Kept {
    /// The endpoint that it has to go to.
    pub(super) pin: Option<u64>,
    /// It makes one.
    makes: bool,
    /// In the background.
    background: bool,
}

/// Looks for the id in the answer to a request that makes a response.
pub(super) struct NewResponse {
    seen: Vec<u8>,
    shared: Arc<Shared>,
    gate: Arc<Gate>,
    endpoint: Arc<Endpoint>,
    background: Option<Background>,
}

const PARTS: usize = 16;

/// How many responses are remembered, in 10 to 15 MB; beyond, the oldest are forgotten, and asked for.
const MAX_RESPONSES: usize = 65_536;

/// How long a response is remembered. vLLM keeps them as long as it runs, OpenAI for 30 days.
const MAX_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// How much of an answer is looked at for the id of the response.
const MAX_SEEN_BYTES: usize = 16 << 10;

/// How many endpoints are asked for one request, and how many of them at the same time.
const MAX_ASKED: usize = 64;
const ASKED_AT_ONCE: usize = 8;

/// How many requests may have endpoints asked at the same time. Ids are easily made up.
const MAX_SEARCHES: usize = 8;

/// How long one endpoint may take to answer, and all of them.
const ANSWER_TIMEOUT: Period = Period::from_secs(2);
const SEARCH_TIMEOUT: Duration = Duration::from_secs(10);

/// Who a response belongs to is for the server to say.
const CREDENTIALS: [HeaderName; 2] = [AUTHORIZATION, HeaderName::from_static("x-api-key")];

// === impl Responses ===

impl Default for Responses {
    fn default() -> Self {
        Self {
            parts: array::from_fn(|_| Mutex::default()),
            hasher: std::hash::RandomState::new(),
            searches: Semaphore::new(MAX_SEARCHES),
        }
    }
}

impl Responses {
    /// The endpoint keeps this response. An id that is known stays with its endpoint while that lives: an answer could
    /// contain the id of another response.
    fn remember(&self, id: &str, gate: &Arc<Gate>, endpoint: &Arc<Endpoint>) {
        let now = Instant::now();
        let mut part = self.part(id).lock();
        part.make_room(now);
        if part.keepers.get(id).is_some_and(|keeper| keeper.get().is_some()) {
            return;
        }
        let id = Arc::<str>::from(id);
        let keeper = Keeper { gate: Arc::downgrade(gate), endpoint: Arc::downgrade(endpoint), since: now };
        if part.keepers.insert(id.clone(), keeper).is_none() {
            part.order.push_back(id);
        }
    }

    /// The endpoint that keeps it, if that is known and is still one of its route.
    fn keeper(&self, id: &str) -> Option<(Arc<Gate>, Arc<Endpoint>)> {
        self.part(id).lock().keepers.get(id)?.get()
    }

    fn part(&self, id: &str) -> &Mutex<Part> {
        &self.parts[self.hasher.hash_one(id) as usize % PARTS]
    }
}

impl Part {
    fn make_room(&mut self, now: Instant) {
        while let Some(oldest) = self.order.front() {
            let is_over = self.keepers.get(oldest).is_none_or(|keeper| now - keeper.since >= MAX_AGE);
            if self.order.len() < MAX_RESPONSES / PARTS && !is_over {
                return;
            }
            self.keepers.remove(oldest);
            self.order.pop_front();
        }
    }
}

impl Keeper {
    fn get(&self) -> Option<(Arc<Gate>, Arc<Endpoint>)> {
        let (gate, endpoint) = (self.gate.upgrade()?, self.endpoint.upgrade()?);
        let is_known = gate.target().endpoints().iter().any(|known| known.id() == endpoint.id());
        is_known.then_some((gate, endpoint))
    }
}

// === impl Kept ===

impl Kept {
    /// For a request that asks for what an endpoint keeps.
    pub(super) fn at(endpoint: &Endpoint) -> Self {
        Self { pin: Some(endpoint.id()), makes: false, background: false }
    }
}

// === impl Proxy ===

impl Proxy {
    /// The endpoint that keeps a response, of these routes.
    pub(super) async fn find_kept(
        &self,
        id: &str,
        gates: &[Arc<Gate>],
        head: &request::Parts,
    ) -> Result<(Arc<Gate>, Arc<Endpoint>), ProxyError> {
        let path = head.uri.path();
        if !gates.iter().any(|gate| gate.target().is_up()) {
            return Err(ProxyError::NotKept(path.into()));
        }
        let end = path.rfind(&format!("/{id}")).unwrap_or(path.len());
        let found = self.keeper(id, &path[..end], gates, head).await;
        found.ok_or_else(|| ProxyError::NoSuchResponse(id.into()))
    }

    /// Reads what a request that makes a response says: which one it continues, and so where it has to go.
    pub(super) async fn kept(
        &self,
        gate: &Arc<Gate>,
        head: &request::Parts,
        body: Intake,
    ) -> Result<(Intake, Option<Box<Kept>>), ProxyError> {
        let mut kept = Box::new(Kept { pin: None, makes: true, background: false });
        let read = match body {
            Intake::Read(read) => read,
            // It cannot be read, and its route does not depend on it.
            Intake::Unread(_) if encoding(&head.headers).is_some() => return Ok((body, Some(kept))),
            Intake::Unread(body) => self.read(head, body).await?,
        };
        let asked = ResponseRequest::read(&read.bytes);
        kept.background = asked.background == Some(true);
        if let Some(previous) = asked.previous.filter(|id| openai::is_response_id(id)) {
            let found = self.keeper(&previous, head.uri.path(), std::slice::from_ref(gate), head).await;
            // Where none has it, a server says so.
            kept.pin = found.map(|(_, endpoint)| endpoint.id());
        }
        Ok((Intake::Read(read), Some(kept)))
    }

    /// The endpoint of these routes that keeps a response: the one that is known to, or the only one that is ready, or the
    /// one that says so. `path` is that of all responses.
    async fn keeper(
        &self,
        id: &str,
        path: &str,
        gates: &[Arc<Gate>],
        head: &request::Parts,
    ) -> Option<(Arc<Gate>, Arc<Endpoint>)> {
        let responses = &self.shared.responses;
        if let Some(found) = responses.keeper(id)
            && gates.iter().any(|gate| Arc::ptr_eq(gate, &found.0))
        {
            return Some(found);
        }
        let ready = |gate: &Arc<Gate>| {
            let endpoints = gate.target().endpoints();
            let ready = endpoints.iter().filter(|endpoint| endpoint.is_ready());
            ready.map(|endpoint| (gate.clone(), endpoint.clone())).collect::<Vec<_>>()
        };
        let mut ready: Vec<_> = gates.iter().flat_map(ready).take(MAX_ASKED).collect();
        if ready.len() < 2 {
            return ready.pop();
        }
        let question = question(&format!("{path}/{id}"), head)?;
        let _place = responses.searches.acquire().await.ok()?;
        let answers = stream::iter(ready).map(|(gate, endpoint)| {
            let question = &question;
            async move { self.has(&gate, &endpoint, question).await.then_some((gate, endpoint)) }
        });
        let mut found =
            std::pin::pin!(answers.buffer_unordered(ASKED_AT_ONCE).filter_map(std::future::ready));
        let (gate, endpoint) = timeout(SEARCH_TIMEOUT, found.next()).await.ok()??;
        responses.remember(id, &gate, &endpoint);
        Some((gate, endpoint))
    }

    /// Whether an endpoint has what is asked for. As a probe does, this takes no place of a request.
    async fn has(&self, gate: &Gate, endpoint: &Endpoint, question: &request::Parts) -> bool {
        let policy = gate.policy().upstream;
        let response_timeout = policy.response_timeout.min(ANSWER_TIMEOUT);
        let timeouts = UpstreamTimeouts { response_timeout, ..policy };
        let body = || Some(Outgoing::Full(None));
        let sent = self.upstream.send(endpoint, question, body, timeouts, Reuse::Pooled).await;
        // The connection ends with what is not read of the answer.
        sent.is_ok_and(|(response, _)| response.status().is_success())
    }
}

/// A GET of a response, on behalf of the client of a request.
pub(super) fn question(path: &str, of: &request::Parts) -> Option<request::Parts> {
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

// === impl NewResponse ===

impl NewResponse {
    /// Looks for the id in an answer, if the request makes a response.
    pub(super) fn watch(
        kept: &Kept,
        status: StatusCode,
        head: &request::Parts,
        shared: &Arc<Shared>,
        lease: &Lease,
    ) -> Option<Box<Self>> {
        if !kept.makes || !status.is_success() {
            return None;
        }
        let (gate, endpoint) = (lease.permit.gate().clone(), lease.permit.endpoint().clone());
        let background = kept.background.then(|| Background::new(head, lease));
        Some(Box::new(Self { seen: Vec::new(), shared: shared.clone(), gate, endpoint, background }))
    }

    /// The next part of the answer. True once there is nothing more to look for.
    pub(super) fn sees(&mut self, part: &[u8]) -> bool {
        let room = MAX_SEEN_BYTES - self.seen.len();
        self.seen.extend_from_slice(&part[..part.len().min(room)]);
        let Some(id) = openai::response_id(&self.seen) else { return self.seen.len() == MAX_SEEN_BYTES };
        self.shared.responses.remember(id, &self.gate, &self.endpoint);
        if let Some(background) = self.background.take() {
            background.follow(id);
        }
        true
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
    async fn response_is_known_for_a_day() {
        let responses = Responses::default();
        let (gate, endpoint) = route();
        let other = Endpoint::new("127.0.0.1:2", 1);
        gate.target().add(&other);
        let keeper = |id: &str| responses.keeper(id).map(|(_, endpoint)| endpoint.id());
        responses.remember("resp_1", &gate, &endpoint);
        responses.remember("resp_1", &gate, &other);
        assert_eq!(keeper("resp_1"), Some(endpoint.id()), "as it was first");
        gate.target().remove(&endpoint);
        assert_eq!(keeper("resp_1"), None, "gone with its endpoint");
        responses.remember("resp_1", &gate, &other);
        assert_eq!(keeper("resp_1"), Some(other.id()));
        tokio::time::advance(MAX_AGE).await;
        // What is too old goes when there are new ones in its part.
        (0..10 * PARTS).for_each(|number| responses.remember(&format!("resp_new{number}"), &gate, &other));
        assert_eq!(keeper("resp_1"), None);
    }

    #[tokio::test]
    async fn responses_are_bounded_and_the_oldest_forgotten() {
        let responses = Responses::default();
        let (gate, endpoint) = route();
        for number in 0..2 * MAX_RESPONSES {
            responses.remember(&format!("resp_{number}"), &gate, &endpoint);
        }
        let count =
            |of: fn(&Part) -> usize| -> usize { responses.parts.iter().map(|part| of(&part.lock())).sum() };
        assert_eq!(count(|part| part.keepers.len()), MAX_RESPONSES);
        assert_eq!(count(|part| part.order.len()), MAX_RESPONSES);
        assert!(responses.keeper("resp_0").is_none());
        assert!(responses.keeper(&format!("resp_{}", 2 * MAX_RESPONSES - 1)).is_some());
    }
}
