//! The prober: probes a server that is scaled elsewhere, while requests want it.

use std::{sync::Arc, time::Duration};

use http::{Uri, uri::Scheme};
use tokio::time::{Instant, sleep, timeout};

use super::{
    Shutdown,
    activator::{Activator, until_suspect, until_vacant},
};
use crate::{
    admission::Gate,
    domain::Phase,
    probe::probe,
    state::{Cause, Endpoint, Front, FrontKind, Status},
};

/// `Retry-After` of requests that failed with an unrecoverable obstacle.
const UNRECOVERABLE_RETRY_AFTER: Duration = Duration::from_secs(30);

/// Time after the last request for which the server is assumed to be up.
const ASSUMED_UP: Duration = Duration::from_secs(60);

/// Returns `host:port` of a `target.url`; `None` if it is not `http://host[:port]`.
pub(super) fn address(url: &str) -> Option<String> {
    let url: Uri = url.parse().ok()?;
    let bare = matches!(url.path(), "" | "/") && url.query().is_none();
    let authority = url.authority().filter(|_| bare && url.scheme() == Some(&Scheme::HTTP))?;
    (!authority.host().is_empty() && !authority.as_str().contains('@'))
        .then(|| format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80)))
}

/// Supervises the server at `url` until `shutdown`.
pub(super) async fn run(gate: Arc<Gate>, url: &str, shutdown: Shutdown) {
    let mut activator = Activator::new(gate.clone());
    let Some(address) = address(url) else {
        // Validation rejects such a target.
        let reason = format!("the target's url, `{url}`, is not http://host:port");
        tokio::select! {
            biased; // the end first: there is nothing else to wait for
            () = shutdown.drain.cancelled() => return,
            () = fail_all_requests(&mut activator, &reason) => return,
        }
    };
    let endpoint = Endpoint::fronting(FrontKind::Url, address, gate.policy().concurrency.max);
    gate.target().add(&endpoint);
    tokio::select! {
        // Shutdown first: nothing is started any more.
        biased;
        () = shutdown.drain.cancelled() => {}
        () = watch(&mut activator, &endpoint) => {}
    }
    if endpoint.is_ready() {
        // Requests of a running cold start have been dispatched or have ended.
        gate.cold_starts().abandoned();
    }
    endpoint.retire();
    // The status is set before the wait: after it, another target may have taken over.
    gate.target().set_status(Status::Idle);
    tokio::select! {
        // A kill does not wait for requests in flight.
        biased;
        () = shutdown.kill.cancelled() => {}
        () = until_vacant(&endpoint) => gate.target().remove(&endpoint),
    }
}

/// Fails every request with `reason`. Never returns.
pub(super) async fn fail_all_requests(activator: &mut Activator, reason: &str) {
    loop {
        activator.wanted().await;
        activator.begin_activation();
        activator.failed(reason.into(), Vec::new(), Cause::Lasting, Duration::from_secs(60));
    }
}

/// Activates and watches the endpoint for as long as requests want it. Never returns; cancel-safe.
async fn watch(activator: &mut Activator, endpoint: &Endpoint) {
    // A server that is up already needs no ramp.
    const ALL: Option<u32> = Some(u32::MAX);
    let mut limit = ALL;
    loop {
        activator.wanted().await;
        if !bring_up(activator, endpoint, limit).await {
            continue;
        }
        let up = Instant::now();
        limit = tokio::select! {
            // A suspect endpoint first: it blocks requests.
            biased;
            () = until_suspect(endpoint, || activator.probe_endpoint(endpoint)) => {
                activator.gate.cold_starts().reopen(Phase::Propagate);
                sleep(endpoint.backoff()).await;
                // Keeps the limit of one request that suspicion has set; the ramp widens it.
                None
            }
            () = activator.until_idle(endpoint, || ASSUMED_UP, up) => {
                activator.gate.cold_starts().abandoned();
                ALL
            }
            () = activator.widen_ramp(endpoint, || activator.probe_endpoint(endpoint)) => None,
            () = activator.watch_silence(endpoint, || activator.probe_endpoint(endpoint)) => None,
        };
        if !activator.is_wanted() {
            activator.gate.target().set_status(Status::Idle);
        }
    }
}

/// Returns true once the server is up. An activation begins only if the first probe fails.
async fn bring_up(activator: &Activator, endpoint: &Endpoint, limit: Option<u32>) -> bool {
    let readiness = activator.gate.policy().readiness.clone();
    let first = probe(endpoint.address(), &readiness).await;
    if first.is_ready() {
        endpoint.record_recovery();
        if limit.is_some() {
            endpoint.front().into_iter().for_each(Front::found_ready);
        }
        // Ends a reopened cold start: a gateway may have noticed its servers by now.
        activator.gate.cold_starts().ready(Some(endpoint.address()));
        activator.open(endpoint, limit);
        return true;
    }
    activator.begin_activation();
    activator.gate.target().set_status(Status::Starting);
    let mut last = Some(first);
    let ready = async {
        sleep(readiness.interval.get()).await;
        activator.until_ready(endpoint.address(), &mut last).await;
    };
    let outcome = tokio::select! {
        // A ready server outweighs any obstacle.
        biased;
        outcome = timeout(readiness.activation_timeout.get(), ready) => outcome.ok(),
        obstacle = activator.unrecoverable() => {
            activator.failed(obstacle.message.clone(), Vec::new(), obstacle.cause(), UNRECOVERABLE_RETRY_AFTER);
            return false;
        }
    };
    if outcome.is_some() {
        endpoint.front().into_iter().for_each(Front::found_ready);
        activator.activated(endpoint);
        return true;
    }
    activator.failed(
        activator.timeout_reason(last).into(),
        Vec::new(),
        Cause::Passing,
        readiness.interval.get(),
    );
    false
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn a_url_is_scheme_host_and_port() {
        for (url, expected) in [
            ("http://127.0.0.1:8000", Some("127.0.0.1:8000")),
            ("http://vllm", Some("vllm:80")),
            ("http://vllm:8000/", Some("vllm:8000")),
            ("http://[::1]:8000", Some("[::1]:8000")),
            ("https://vllm", None),
            ("http://vllm/v1", None),
            ("http://user@vllm", None),
            ("vllm:8000", None),
            ("", None),
        ] {
            assert_eq!(address(url).as_deref(), expected, "{url}");
        }
    }
}
