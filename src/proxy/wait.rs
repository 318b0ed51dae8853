//! Held requests: deadline, dispatch once released, and heartbeats to the client meanwhile.

use std::{future::Future, pin::pin, sync::Arc, time::Duration};

use http::{HeaderValue, Response, header::ACCEPT_ENCODING};
use tokio::time::{Instant, sleep_until};

use super::{
    answering::HeldRequest,
    answers::fail,
    body::Body,
    dispatch_error::DispatchError,
    exchange::Exchange,
    heartbeat::heartbeat_period,
    keepalive::{EarlyResponse, PendingResponse, WaitStatus},
    shared::Proxy,
    upstream_request::{UpstreamRequest, UpstreamResponse},
};
use crate::{
    admission::Permit,
    error::ProxyError,
    hold::{ReleaseOutcome, Ticket},
    openai::{ClientTimeouts, RoutingFields},
};

/// The response, or the error that ends the request.
type WaitResult = Result<Response<Body>, (Exchange, ProxyError)>;

/// Outcome of dispatching a released request.
enum Dispatched {
    Responded(Box<UpstreamResponse>),
    Failed(ProxyError),
    /// In the queue again.
    Requeued(Ticket<Permit>),
    /// Retryable, but past the deadline.
    DeadlinePassed,
}

/// Deadline of a held request, and the setting it comes from.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Instant,
    source: DeadlineSource,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeadlineSource {
    /// `hold.timeout`, or `timeouts.readiness` of an InterceptorRoute.
    Hold,
    /// `timeouts.request` of an InterceptorRoute.
    Request,
    /// `x-anteroom-max-wait`.
    MaxWait,
    /// Timeout that the client's SDK states in its headers.
    Client,
}

// === impl Proxy ===

impl Proxy {
    /// Waits for a permit and the response. Sends heartbeats meanwhile if the route and the client want them.
    pub(super) fn wait(
        &self,
        mut exchange: Exchange,
        mut request: UpstreamRequest,
        ticket: Ticket<Permit>,
        scan: RoutingFields,
    ) -> HeldRequest {
        let gate = exchange.gate().clone();
        let policy = gate.policy();
        // Invalid headers were rejected before admission.
        let patience = ClientTimeouts::of(&request.head.headers).unwrap_or_default();
        let shape = request.heartbeats.shape;
        let heartbeat = request.heartbeats.before_response(policy.keepalive.mode, scan.stream);
        // An early response head cannot name an encoding. Without `Accept-Encoding` the field is not added, so that the
        // head does not grow.
        if heartbeat.is_some() && request.head.headers.contains_key(ACCEPT_ENCODING) {
            request.head.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        let request_deadline = request.intercepted.as_ref().and_then(|intercepted| intercepted.deadline);
        let deadline = Deadline::of(
            &exchange,
            patience,
            policy.hold.timeout.get(),
            request_deadline,
            heartbeat.is_some(),
        );
        let early = exchange.started() + heartbeat_period(policy.keepalive.after.get(), patience);
        let interval = heartbeat_period(policy.keepalive.interval.get(), patience);
        drop(policy);

        let story = exchange.story(&request.head, scan.model.as_deref()).clone();
        let status = WaitStatus::new(&exchange, shape, scan.model, story);
        // Boxed because the body of an early response takes ownership.
        let mut waiting: PendingResponse =
            Box::pin(self.clone().wait_and_send(exchange, request, ticket, deadline, status.clone()));
        let answered =
            |answered: WaitResult| answered.unwrap_or_else(|(exchange, error)| fail(exchange, &error));
        Box::pin(async move {
            let Some(heartbeat) = heartbeat else { return answered(waiting.await) };
            tokio::select! {
                // Prefers a response that is ready over an early 200.
                biased;
                answer = &mut waiting => answered(answer),
                () = sleep_until(early) => EarlyResponse::start(waiting, heartbeat, interval, status),
            }
        })
    }

    /// Returns a future instead of being an `async fn`, which would store its arguments twice: this future is what a held
    /// request costs.
    #[expect(clippy::manual_async_fn, reason = "an async fn stores its arguments twice")]
    fn wait_and_send(
        self,
        mut exchange: Exchange,
        mut request: UpstreamRequest,
        mut ticket: Ticket<Permit>,
        deadline: Deadline,
        status: Arc<WaitStatus>,
    ) -> impl Future<Output = WaitResult> + Send + use<> {
        async move {
            let mut timer = pin!(sleep_until(deadline.at));
            loop {
                exchange.begin_hold(&ticket);
                status.set_position(Some(ticket.position_handle()));
                let released = tokio::select! {
                    // Prefers a permit released at the deadline over timing out.
                    biased;
                    released = ticket.released() => Some(released),
                    () = &mut timer => None,
                };
                status.set_position(None);
                let place = ticket.place();
                drop(ticket);
                let (error, may_fall_back) = match released {
                    Some(ReleaseOutcome::Dispatch(permit)) => {
                        exchange.release();
                        // Boxed so that dispatching adds nothing to the size of a held request.
                        let sent = Box::pin(async {
                            let failure = match self.dispatch(permit, &mut request, &mut exchange).await {
                                Ok(answer) => return Dispatched::Responded(Box::new(answer)),
                                Err(DispatchError::Final(error)) => return Dispatched::Failed(error),
                                Err(DispatchError::Retryable(failure)) => failure,
                            };
                            exchange.record_failed_dispatch(&failure, &request.head, None);
                            // Without a backoff the request would be released again before the timer is polled.
                            if failure.is_ours && Instant::now() >= deadline.at {
                                return Dispatched::DeadlinePassed;
                            }
                            match self.requeue(&mut request, place, failure, deadline.at).await {
                                Ok(ticket) => Dispatched::Requeued(ticket),
                                Err(error) => Dispatched::Failed(error),
                            }
                        });
                        match sent.await {
                            Dispatched::Responded(answer) => {
                                let mut response = self.forward_response(*answer, exchange, request);
                                response.body_mut().name_model(status.model.clone());
                                return Ok(response);
                            }
                            Dispatched::Failed(error) => return Err((exchange, error)),
                            Dispatched::Requeued(again) => {
                                ticket = again;
                                continue;
                            }
                            Dispatched::DeadlinePassed => (
                                deadline.exceeded(&exchange, &request),
                                deadline.source == DeadlineSource::Hold,
                            ),
                        }
                    }
                    Some(ReleaseOutcome::Failed(reason, retry_after)) => {
                        let route = exchange.gate().key().clone();
                        (ProxyError::ColdStartFailed { route, reason, retry_after }, true)
                    }
                    Some(ReleaseOutcome::Draining) => (ProxyError::Draining { admitted: true }, false),
                    None => (deadline.exceeded(&exchange, &request), deadline.source == DeadlineSource::Hold),
                };
                let fallback =
                    request.intercepted.as_ref().filter(|_| may_fall_back).and_then(|by| by.fallback());
                return match fallback {
                    Some(permit) => Box::pin(self.fall_back(exchange, request, permit)).await,
                    None => Err((exchange, error)),
                };
            }
        }
    }
}

// === impl Deadline ===

impl Deadline {
    /// Returns the earliest deadline. The SDK's timeout counts only without heartbeats, which reset it.
    fn of(
        exchange: &Exchange,
        patience: ClientTimeouts,
        hold: Duration,
        request_deadline: Option<Instant>,
        heartbeats: bool,
    ) -> Self {
        let silence = patience.safe_silence().filter(|_| !heartbeats);
        let after = |wait: Option<Duration>| wait.map(|wait| exchange.started() + wait);
        let deadlines = [
            (after(Some(hold)), DeadlineSource::Hold),
            (request_deadline, DeadlineSource::Request),
            (after(patience.total), DeadlineSource::MaxWait),
            (after(silence), DeadlineSource::Client),
        ];
        let earliest =
            deadlines.into_iter().filter_map(|(at, source)| Some((at?, source))).min_by_key(|(at, _)| *at);
        let (at, source) = earliest.unwrap_or((exchange.started() + hold, DeadlineSource::Hold));
        Self { at, source }
    }

    fn exceeded(&self, exchange: &Exchange, request: &UpstreamRequest) -> ProxyError {
        let limit = match self.source {
            DeadlineSource::Hold if exchange.gate().policy().intercept.is_some() => {
                "timeouts.readiness of the route"
            }
            DeadlineSource::Hold => "hold.timeout of the route",
            DeadlineSource::Request => "timeouts.request of the route",
            DeadlineSource::MaxWait => "x-anteroom-max-wait of the request",
            DeadlineSource::Client => "the client's own time-out",
        };
        let obstacle = exchange.gate().target().obstacle().map(|obstacle| obstacle.message.clone());
        ProxyError::ColdStartTimeout {
            route: exchange.gate().key().clone(),
            waited: self.at - exchange.started(),
            limit,
            reason: match (obstacle, request.retries.history()) {
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
