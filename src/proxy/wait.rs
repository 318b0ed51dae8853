//! Waiting: a held request, its deadline, and the client that is kept informed.

use std::{future::Future, pin::pin, sync::Arc, time::Duration};

use http::{HeaderValue, Response, header::ACCEPT_ENCODING};
use tokio::time::{Instant, sleep_until};

use super::{
    Proxy,
    answering::Held,
    answers::fail,
    beats::sooner,
    body::Body,
    exchange::Exchange,
    keepalive::{KeptAlive, Progress, Waiting},
    upstream_request::{DispatchError, UpstreamRequest, UpstreamResponse},
};
use crate::{
    admission::Permit,
    error::ProxyError,
    hold::{Released, Ticket},
    openai::{Patience, Scan},
};

/// The answer, or what there is instead.
type Answered = Result<Response<Body>, (Exchange, ProxyError)>;

/// What came of a dispatch.
enum Sent {
    Answered(Box<UpstreamResponse>),
    Failed(ProxyError),
    /// It waits again.
    Back(Ticket<Permit>),
    /// It would, but not any longer.
    TooLate,
}

/// Until when a request may be held, and what says so.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Instant,
    limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    /// What the route allows for getting ready.
    Hold,
    /// What a route that serves anything allows for the whole request.
    Request,
    /// What the request asked for.
    MaxWait,
    /// What its SDK told.
    Client,
}

// === impl Proxy ===

impl Proxy {
    /// Waits for a permit and for the answer, and keeps the client informed meanwhile.
    pub(super) fn wait(
        &self,
        mut exchange: Exchange,
        mut sending: UpstreamRequest,
        ticket: Ticket<Permit>,
        scan: Scan,
    ) -> Held {
        let gate = exchange.gate().clone();
        let policy = gate.policy();
        // What cannot be read was refused before a request could be held; one that comes back has been served.
        let patience = Patience::of(&sending.head.headers).unwrap_or_default();
        let shape = sending.wishes.shape;
        let heartbeat = sending.wishes.before_answer(policy.keepalive.mode, scan.stream);
        // An early head names no encoding. A request that offers none is not given one, in which case a new field would
        // only make the head of a held request grow.
        if heartbeat.is_some() && sending.head.headers.contains_key(ACCEPT_ENCODING) {
            sending.head.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        let over = sending.intercepted.as_ref().and_then(|intercepted| intercepted.deadline);
        let deadline =
            Deadline::of(&exchange, patience, policy.hold.timeout.get(), over, heartbeat.is_some());
        let early = exchange.started() + sooner(policy.keepalive.after.get(), patience);
        let interval = sooner(policy.keepalive.interval.get(), patience);
        drop(policy);

        let story = exchange.tell(&sending.head, scan.model.as_deref()).clone();
        let progress = Progress::new(&exchange, shape, scan.model, story);
        // On the heap, since the body of an early answer takes it over.
        let mut waiting: Waiting =
            Box::pin(self.clone().wait_and_send(exchange, sending, ticket, deadline, progress.clone()));
        let answered =
            |answered: Answered| answered.unwrap_or_else(|(exchange, error)| fail(exchange, &error));
        Box::pin(async move {
            let Some(heartbeat) = heartbeat else { return answered(waiting.await) };
            tokio::select! {
                // The answer, if there is one.
                biased;
                answer = &mut waiting => answered(answer),
                () = sleep_until(early) => KeptAlive::answer(waiting, heartbeat, interval, progress),
            }
        })
    }

    /// What is held is as large as the future of this: so it is no `async fn`, which has room for its arguments twice.
    #[expect(clippy::manual_async_fn, reason = "as said")]
    fn wait_and_send(
        self,
        mut exchange: Exchange,
        mut sending: UpstreamRequest,
        mut ticket: Ticket<Permit>,
        deadline: Deadline,
        progress: Arc<Progress>,
    ) -> impl Future<Output = Answered> + Send + use<> {
        async move {
            let mut timer = pin!(sleep_until(deadline.at));
            loop {
                exchange.hold(&ticket);
                progress.at(Some(ticket.spot()));
                let released = tokio::select! {
                    // A permit that came just in time is used.
                    biased;
                    released = ticket.released() => Some(released),
                    () = &mut timer => None,
                };
                progress.at(None);
                let place = ticket.place();
                drop(ticket);
                let (error, in_vain) = match released {
                    Some(Released::Dispatch(permit)) => {
                        exchange.dispatched(&permit);
                        // On the heap, so that a held request is no larger for what comes after.
                        let sent = Box::pin(async {
                            let failure = match self.attempt(permit, &mut sending, exchange.trace()).await {
                                Ok(answer) => return Sent::Answered(Box::new(answer)),
                                Err(DispatchError::Final(error)) => return Sent::Failed(error),
                                Err(DispatchError::Retryable(failure)) => failure,
                            };
                            let address = failure.permit.endpoint().address();
                            exchange.set_back(address, &failure.reason, &sending.head, None);
                            // An endpoint that is not to blame takes it again at once, so the timer would not strike.
                            if failure.is_ours && Instant::now() >= deadline.at {
                                return Sent::TooLate;
                            }
                            match self.hold_again(&mut sending, place, failure, deadline.at).await {
                                Ok(ticket) => Sent::Back(ticket),
                                Err(error) => Sent::Failed(error),
                            }
                        });
                        match sent.await {
                            Sent::Answered(answer) => {
                                let mut response = self.respond(*answer, exchange, sending);
                                response.body_mut().name_model(progress.model.clone());
                                return Ok(response);
                            }
                            Sent::Failed(error) => return Err((exchange, error)),
                            Sent::Back(again) => {
                                ticket = again;
                                continue;
                            }
                            Sent::TooLate => {
                                (deadline.passed(&exchange, &sending), deadline.limit == Limit::Hold)
                            }
                        }
                    }
                    Some(Released::Failed(reason, retry_after)) => {
                        let route = exchange.gate().key().clone();
                        (ProxyError::ColdStartFailed { route, reason, retry_after }, true)
                    }
                    Some(Released::Draining) => (ProxyError::Draining { admitted: true }, false),
                    None => (deadline.passed(&exchange, &sending), deadline.limit == Limit::Hold),
                };
                // Where there is a fallback, what was not ready in time has not failed yet.
                let fallback = sending.intercepted.as_ref().filter(|_| in_vain).and_then(|by| by.fallback());
                return match fallback {
                    Some(permit) => Box::pin(self.fall_back(exchange, sending, permit)).await,
                    None => Err((exchange, error)),
                };
            }
        }
    }
}

// === impl Deadline ===

impl Deadline {
    /// The least of what we, the client and, where we cannot break the silence, its SDK allow.
    fn of(
        exchange: &Exchange,
        patience: Patience,
        hold: Duration,
        over: Option<Instant>,
        heartbeats: bool,
    ) -> Self {
        let silence = patience.safe_silence().filter(|_| !heartbeats);
        let after = |wait: Option<Duration>| wait.map(|wait| exchange.started() + wait);
        let limits = [
            (after(Some(hold)), Limit::Hold),
            (over, Limit::Request),
            (after(patience.total), Limit::MaxWait),
            (after(silence), Limit::Client),
        ];
        let least = limits.into_iter().filter_map(|(at, limit)| Some((at?, limit))).min_by_key(|(at, _)| *at);
        let (at, limit) = least.unwrap_or((exchange.started() + hold, Limit::Hold));
        Self { at, limit }
    }

    fn passed(&self, exchange: &Exchange, sending: &UpstreamRequest) -> ProxyError {
        let limit = match self.limit {
            Limit::Hold if exchange.gate().policy().intercept.is_some() => "timeouts.readiness of the route",
            Limit::Hold => "hold.timeout of the route",
            Limit::Request => "timeouts.request of the route",
            Limit::MaxWait => "x-anteroom-max-wait of the request",
            Limit::Client => "the client's own time-out",
        };
        let obstacle = exchange.gate().target().obstacle().map(|obstacle| obstacle.message.clone());
        ProxyError::ColdStartTimeout {
            route: exchange.gate().key().clone(),
            waited: self.at - exchange.started(),
            limit,
            reason: match (obstacle, sending.tries.so_far()) {
                (obstacle, None) => obstacle,
                (None, Some(failed)) => Some(failed.into()),
                (Some(obstacle), Some(failed)) => {
                    Some(obstacle.map(|obstacle| format!("{obstacle} {failed}")))
                }
            },
            retry_after: exchange.gate().cold_starts().time_left(),
        }
    }
}
