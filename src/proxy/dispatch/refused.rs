//! Error answers that may be a gateway's own: tells them from a server's, and holds the request again.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Response, StatusCode, response};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::super::{
    Proxy,
    first_token::TokenWatch,
    intake::within,
    lease::Lease,
    upstream_request::{DispatchError, RetryableFailure, UpstreamRequest, UpstreamResponse},
};
use crate::{
    admission::Permit,
    openai,
    probe::probe,
    state::{Endpoint, FrontKind},
};

/// The most that is read of an error answer to find out whose it is.
const MAX_READ_BYTES: usize = 64 << 10;

/// Errors that a gateway gives when its server does not answer it.
const UNANSWERED: [StatusCode; 3] =
    [StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];

/// The part of an answer that was read.
enum Read {
    Whole(Bytes),
    Begun(Bytes),
    BrokenOff,
}

/// A gateway's word that it has no server.
struct NoServer {
    /// A server may have run the request before it went away.
    may_have_run: bool,
}

/// Returns whether to read an answer before it is passed on: a gateway may say by it that it has no server.
pub(super) fn is_to_be_read(status: StatusCode, permit: &Permit) -> bool {
    if status.as_u16() < 400 {
        return false;
    }
    status == StatusCode::SERVICE_UNAVAILABLE
        || (permit.endpoint().front().is_some()
            && (UNANSWERED.contains(&status)
                || permit.gate().policy().gateway.not_yet.status.contains(&status.as_u16())))
}

/// Notes that an answer of a model came through what may be a gateway.
pub(super) fn note_success(method: &Method, status: StatusCode, endpoint: &Endpoint) {
    // A gateway lists its models by itself.
    if let Some(front) = endpoint.front()
        && status.is_success()
        && *method == Method::POST
    {
        front.settle();
    }
}

// === impl Proxy ===

impl Proxy {
    /// Reads an error answer. It is passed on, unless it is a gateway's word that it has no server.
    pub(super) async fn refused(
        &self,
        mut response: Response<Incoming>,
        lease: Lease,
        sending: &mut UpstreamRequest,
        pause: Duration,
    ) -> Result<UpstreamResponse, DispatchError> {
        let hint = http_body::Body::size_hint(response.body());
        let is_short = hint.upper().is_none_or(|upper| upper <= MAX_READ_BYTES as u64);
        let read = match is_short {
            true => within(pause, read(response.body_mut())).await.unwrap_or(Read::BrokenOff),
            false => Read::Begun(Bytes::new()),
        };
        let body = match read {
            Read::Whole(body) => body,
            Read::Begun(begun) => {
                TokenWatch::begin(&lease.permit, &sending.head, &response);
                return Ok(UpstreamResponse::PartlyRead(response, begun, lease));
            }
            Read::BrokenOff => {
                let Lease { connection, permit, .. } = lease;
                drop(connection);
                let reason = format!("{} broke its answer off", permit.endpoint().address());
                return Err(sending.broken_off(permit, reason));
            }
        };
        let Lease { connection, pool, permit } = lease;
        pool.put_back(connection);
        let (head, _) = response.into_parts();
        let no_server = no_server(&head, &body, &permit, sending).await;
        if let Some(NoServer { may_have_run }) = no_server {
            if may_have_run && let Some(front) = permit.endpoint().front() {
                front.ask_first();
            }
            permit.suspect();
            let reason = format!("it answered {}, as a gateway without a server does", head.status.as_u16());
            let again = match may_have_run {
                true => sending.tries.broken_off(permit.endpoint(), &reason),
                false => sending.tries.missed(&reason),
            };
            if again && sending.body.is_left() {
                return Err(DispatchError::Retryable(RetryableFailure::of(permit, reason)));
            }
        }
        let response = Response::from_parts(head, body);
        TokenWatch::begin(&permit, &sending.head, &response);
        Ok(UpstreamResponse::Complete(response))
    }
}

async fn read(body: &mut Incoming) -> Read {
    let mut read = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return Read::BrokenOff };
        if let Some(data) = frame.data_ref() {
            read.extend_from_slice(data);
        }
        if read.len() > MAX_READ_BYTES {
            return Read::Begun(read.into());
        }
    }
    Read::Whole(read.into())
}

/// Decides whether a gateway says by this answer that it has no server.
async fn no_server(
    head: &response::Parts,
    body: &[u8],
    permit: &Permit,
    sending: &UpstreamRequest,
) -> Option<NoServer> {
    let status = head.status;
    if status == StatusCode::SERVICE_UNAVAILABLE && openai::says_no_endpoint(&head.headers, body) {
        return Some(NoServer { may_have_run: false });
    }
    // Routes that serve anything have pods as their targets; and nobody knows the errors of any application.
    let front = permit.endpoint().front().filter(|_| sending.intercepted.is_none())?;
    if openai::is_model_error(status, body) {
        front.settle();
        return None;
    }
    let no_server = Some(NoServer { may_have_run: openai::may_have_run(status, body) });
    let policy = permit.gate().policy().clone();
    let not_yet = &policy.gateway.not_yet;
    if sending.head.method == Method::POST
        && not_yet.status.contains(&status.as_u16())
        && front.is_settling(not_yet.within.get())
    {
        return no_server;
    }
    if !UNANSWERED.contains(&status) || !front.is_to_be_doubted() {
        return None;
    }
    let ask = async {
        let answer = probe(permit.endpoint().address(), &policy.readiness).await;
        match front.kind() {
            FrontKind::Url => !answer.is_ready(),
            FrontKind::Gateway => answer.is_without_server(),
        }
    };
    if !front.is_down(ask).await {
        return None;
    }
    if front.kind() == FrontKind::Gateway {
        // Its pods are there, as far as is known: it gets the time that it gets after a start, and no more.
        front.found_ready();
    }
    no_server
}
