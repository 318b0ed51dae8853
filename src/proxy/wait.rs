//! Waiting: a held request, its deadline, and the client that is kept informed.

use std::{pin::pin, sync::Arc, time::Duration};

use http::Response;
use tokio::time::{Instant, sleep_until};

use super::{
    Proxy,
    answers::fail,
    body::Body,
    dispatch::{Failed, Sending},
    exchange::Exchange,
    keepalive::{Heartbeat, KeptAlive, Progress, Waiting},
};
use crate::{
    admission::Permit,
    error::ProxyError,
    hold::{Released, Ticket},
    openai::{Patience, Scan, Shape},
};

/// The shortest interval of heartbeats that a client's SDK can bring about.
const SHORTEST: Duration = Duration::from_millis(100);

/// The answer, or what there is instead.
type Answered = Result<Response<Body>, (Exchange, ProxyError)>;

/// Until when a request may be held, and what says so.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Instant,
    limit: &'static str,
}

// === impl Proxy ===

impl Proxy {
    /// Waits for a permit and for the answer, and keeps the client informed meanwhile.
    pub(super) async fn wait(
        &self,
        exchange: Exchange,
        sending: Sending,
        ticket: Ticket<Permit>,
        shape: Option<Shape>,
        scan: Scan,
    ) -> Response<Body> {
        let gate = exchange.gate().clone();
        let policy = gate.policy();
        // What cannot be read was refused before a request could be held; one that comes back has been served.
        let patience = Patience::of(&sending.head.headers).unwrap_or_default();
        let shape = shape.unwrap_or(Shape::Plain);
        let heartbeat = Heartbeat::of(policy.keepalive.mode, scan.stream, shape);
        let deadline = Deadline::of(&exchange, patience, policy.hold.timeout.get(), heartbeat.is_some());
        // A client cannot have us send as fast as it likes.
        let safe = patience.safe_silence().map(|safe| safe.max(SHORTEST));
        let sooner = |period: Duration| safe.map_or(period, |safe| period.min(safe));
        let early = exchange.started() + sooner(policy.keepalive.after.get());
        let interval = sooner(policy.keepalive.interval.get());
        drop(policy);

        let id = exchange.request_id.clone();
        let progress = Progress::new(gate, exchange.started(), shape, scan.model, id);
        // On the heap, since the body of an early answer takes it over.
        let mut waiting: Waiting =
            Box::pin(self.clone().wait_and_send(exchange, sending, ticket, deadline, progress.clone()));
        let answered =
            |answered: Answered| answered.unwrap_or_else(|(exchange, error)| fail(exchange, &error));
        let Some(heartbeat) = heartbeat else { return answered(waiting.await) };
        tokio::select! {
            // The answer, if there is one.
            biased;
            answer = &mut waiting => answered(answer),
            () = sleep_until(early) => KeptAlive::answer(waiting, heartbeat, interval, progress),
        }
    }

    async fn wait_and_send(
        self,
        mut exchange: Exchange,
        mut sending: Sending,
        mut ticket: Ticket<Permit>,
        deadline: Deadline,
        progress: Arc<Progress>,
    ) -> Answered {
        let gate = exchange.gate().clone();
        let mut timer = pin!(sleep_until(deadline.at));
        loop {
            exchange.hold(ticket.since());
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
            let permit = match released {
                Some(Released::Dispatch(permit)) => permit,
                Some(Released::Failed(reason, retry_after)) => {
                    let route = gate.key().clone();
                    let retry_after = Some(retry_after);
                    return Err((exchange, ProxyError::ColdStartFailed { route, reason, retry_after }));
                }
                Some(Released::Draining) => return Err((exchange, ProxyError::Draining { admitted: true })),
                None => {
                    let error = deadline.passed(&exchange);
                    return Err((exchange, error));
                }
            };
            exchange.dispatched();
            // On the heap, so that a held request is no larger for what comes after.
            match Box::pin(self.attempt(permit, &mut sending, &gate)).await {
                Ok(answer) => return Ok(self.respond(answer, exchange)),
                Err(Failed::Finally(error)) => return Err((exchange, error)),
                Err(Failed::ForNow) => match Box::pin(self.hold_again(&mut sending, &gate, place)).await {
                    Ok(again) => ticket = again,
                    Err(error) => return Err((exchange, error)),
                },
            }
        }
    }
}

// === impl Deadline ===

impl Deadline {
    /// The least of what we, the client and, where we cannot break the silence, its SDK allow.
    fn of(exchange: &Exchange, patience: Patience, hold: Duration, heartbeats: bool) -> Self {
        let silence = patience.safe_silence().filter(|_| !heartbeats);
        let limits = [
            (Some(hold), "hold.timeout of the route"),
            (patience.total, "x-anteroom-max-wait of the request"),
            (silence, "the client's own time-out"),
        ];
        let least =
            limits.into_iter().filter_map(|(wait, limit)| Some((wait?, limit))).min_by_key(|(wait, _)| *wait);
        let (wait, limit) = least.unwrap_or((hold, limits[0].1));
        Self { at: exchange.started() + wait, limit }
    }

    fn passed(&self, exchange: &Exchange) -> ProxyError {
        ProxyError::ColdStartTimeout {
            route: exchange.gate().key().clone(),
            waited: self.at - exchange.started(),
            limit: self.limit,
            reason: exchange.gate().target().obstacle().map(|obstacle| obstacle.message.clone()),
            retry_after: exchange.gate().cold_starts().time_left(),
        }
    }
}
