//! Inspection of error responses: a gateway without a running server behind it answers itself, and the request is retried.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Response, StatusCode, response};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::super::{
    dispatch_error::{DispatchError, RetryableFailure},
    first_token::TokenWatch,
    intake::timeout_if_pending,
    lease::Lease,
    shared::Proxy,
    upstream_request::{UpstreamRequest, UpstreamResponse},
};
use crate::{
    admission::Permit,
    openai,
    probe::probe,
    state::{Endpoint, FrontKind},
};

/// Longest error response that is inspected.
const MAX_INSPECTED_BYTES: usize = 64 << 10;

/// Statuses that gateways return when their server does not respond.
const GATEWAY_ERRORS: [StatusCode; 3] =
    [StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];

/// Result of reading an error body.
enum ErrorBody {
    Complete(Bytes),
    /// The first part of a body longer than [`MAX_INSPECTED_BYTES`].
    TooLong(Bytes),
    Aborted,
}

/// A gateway reported that it has no server for the request.
struct NoServer {
    /// A server may have processed the request before it went away.
    may_have_run: bool,
}

/// Returns `true` if a response may come from a gateway without a server, so that its body must be inspected.
pub(super) fn needs_inspection(status: StatusCode, permit: &Permit) -> bool {
    if status.as_u16() < 400 {
        return false;
    }
    status == StatusCode::SERVICE_UNAVAILABLE
        || (permit.endpoint().front().is_some()
            && (GATEWAY_ERRORS.contains(&status)
                || permit.gate().policy().gateway.not_yet.status.contains(&status.as_u16())))
}

/// Records that a model server behind a possible gateway responded.
pub(super) fn note_success(method: &Method, status: StatusCode, endpoint: &Endpoint) {
    // Only POSTs prove a server: gateways answer GETs such as `/v1/models` themselves.
    if let Some(front) = endpoint.front()
        && status.is_success()
        && *method == Method::POST
    {
        front.settle();
    }
}

// === impl Proxy ===

impl Proxy {
    /// Reads an error response, and returns it unless a gateway reports that it has no server.
    pub(super) async fn inspect_error(
        &self,
        mut response: Response<Incoming>,
        lease: Lease,
        request: &mut UpstreamRequest,
        idle_timeout: Duration,
    ) -> Result<UpstreamResponse, DispatchError> {
        let hint = http_body::Body::size_hint(response.body());
        let is_short = hint.upper().is_none_or(|upper| upper <= MAX_INSPECTED_BYTES as u64);
        let read = match is_short {
            true => timeout_if_pending(idle_timeout, read_error(response.body_mut()))
                .await
                .unwrap_or(ErrorBody::Aborted),
            false => ErrorBody::TooLong(Bytes::new()),
        };
        let body = match read {
            ErrorBody::Complete(body) => body,
            ErrorBody::TooLong(begun) => {
                TokenWatch::begin(&lease.permit, &request.head, &response);
                return Ok(UpstreamResponse::PartlyRead(response, begun, lease));
            }
            ErrorBody::Aborted => {
                let Lease { connection, permit, .. } = lease;
                drop(connection);
                let reason = format!("{} aborted its response", permit.endpoint().address());
                return Err(request.reset_by(permit, reason));
            }
        };
        let Lease { connection, pool, permit } = lease;
        pool.put_back(connection);
        let (head, _) = response.into_parts();
        let no_server = no_server(&head, &body, &permit, request).await;
        if let Some(NoServer { may_have_run }) = no_server {
            if may_have_run && let Some(front) = permit.endpoint().front() {
                front.require_probe();
            }
            permit.suspect();
            let reason =
                format!("it answered {}, like a gateway without a running server", head.status.as_u16());
            let again = if may_have_run {
                request.retries.record_reset(permit.endpoint(), &reason)
            } else {
                request.retries.record_unsent(&reason);
                true
            };
            if again && request.body.can_resend() {
                return Err(DispatchError::Retryable(RetryableFailure::of(permit, reason)));
            }
        }
        let response = Response::from_parts(head, body);
        TokenWatch::begin(&permit, &request.head, &response);
        Ok(UpstreamResponse::Complete(response))
    }
}

async fn read_error(body: &mut Incoming) -> ErrorBody {
    let mut read = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return ErrorBody::Aborted };
        if let Some(data) = frame.data_ref() {
            read.extend_from_slice(data);
        }
        if read.len() > MAX_INSPECTED_BYTES {
            return ErrorBody::TooLong(read.into());
        }
    }
    ErrorBody::Complete(read.into())
}

/// Returns `Some` if a gateway reports by this response that it has no server.
async fn no_server(
    head: &response::Parts,
    body: &[u8],
    permit: &Permit,
    request: &UpstreamRequest,
) -> Option<NoServer> {
    let status = head.status;
    if status == StatusCode::SERVICE_UNAVAILABLE && openai::reports_no_endpoint(&head.headers, body) {
        return Some(NoServer { may_have_run: false });
    }
    // Errors of arbitrary applications cannot be classified, and no gateway stands in front of their pods.
    let front = permit.endpoint().front().filter(|_| request.intercepted.is_none())?;
    if openai::is_model_error(status, body) {
        front.settle();
        return None;
    }
    let no_server = Some(NoServer { may_have_run: openai::may_have_run(status, body) });
    let policy = permit.gate().policy().clone();
    let not_yet = &policy.gateway.not_yet;
    if request.head.method == Method::POST
        && not_yet.status.contains(&status.as_u16())
        && front.is_settling(not_yet.within.get())
    {
        return no_server;
    }
    if !GATEWAY_ERRORS.contains(&status) || !front.warrants_probe() {
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
        // Its pods are still reported ready, so it may only have to discover them again: restarts its settling time.
        front.found_ready();
    }
    no_server
}
