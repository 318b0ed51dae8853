//! The prober: knows whether a server that someone else scales is up, and asks only while that matters.

use std::{sync::Arc, time::Duration};

use http::{Uri, uri::Scheme};
use tokio::time::{Instant, sleep, timeout};

use super::{
    Stops,
    wake::{Wake, suspect, vacant},
};
use crate::{
    admission::Gate,
    domain::Phase,
    probe::probe,
    state::{Cause, Endpoint, Front, FrontKind, Status},
};

/// When those who were told that something stands in the way may come again.
const HOPELESS: Duration = Duration::from_secs(30);

/// How long after the last request it is still taken for granted that the server is up.
const IDLE: Duration = Duration::from_secs(60);

/// What `target.url` leads to, as `host:port`; `None` if it is not `http://host[:port]`.
pub(super) fn address(url: &str) -> Option<String> {
    let url: Uri = url.parse().ok()?;
    let bare = matches!(url.path(), "" | "/") && url.query().is_none();
    let authority = url.authority().filter(|_| bare && url.scheme() == Some(&Scheme::HTTP))?;
    (!authority.host().is_empty() && !authority.as_str().contains('@'))
        .then(|| format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80)))
}

/// Looks after the server at `url` until it is told to end.
pub(super) async fn run(gate: Arc<Gate>, url: &str, stops: Stops) {
    let mut wake = Wake::new(gate.clone());
    let Some(address) = address(url) else {
        // A valid configuration has no such target.
        let reason = format!("the target's url, `{url}`, is not http://host:port");
        tokio::select! {
            biased; // the end first: there is nothing else to wait for
            () = stops.retire.cancelled() => return,
            () = refuse(&mut wake, &reason) => return,
        }
    };
    let endpoint = Endpoint::fronting(FrontKind::Url, address, gate.policy().concurrency.max);
    gate.target().add(&endpoint);
    tokio::select! {
        // The end first: nothing is woken any more.
        biased;
        () = stops.retire.cancelled() => {}
        () = watch(&mut wake, &endpoint) => {}
    }
    if endpoint.is_ready() {
        // Who was to be served by an activation has been, or is gone.
        gate.cold_starts().abandoned();
    }
    endpoint.retire();
    // Said before the wait: another target may have taken over when that ends.
    gate.target().set_status(Status::Idle);
    tokio::select! {
        // Told to stop now, what is in flight is not waited for.
        biased;
        () = stops.stop.cancelled() => {}
        () = vacant(&endpoint) => gate.target().remove(&endpoint),
    }
}

/// Says to everybody why they cannot be served.
pub(super) async fn refuse(wake: &mut Wake, reason: &str) {
    loop {
        wake.wanted().await;
        wake.told();
        wake.failed(reason.into(), Vec::new(), Cause::Lasting, Duration::from_secs(60));
    }
}

/// Never ends by itself; cancel-safe.
async fn watch(wake: &mut Wake, endpoint: &Endpoint) {
    // What is up already is not cold: it gets as much as it may have.
    const ALL: Option<u32> = Some(u32::MAX);
    let mut limit = ALL;
    loop {
        wake.wanted().await;
        if !bring_up(wake, endpoint, limit).await {
            continue;
        }
        let up = Instant::now();
        limit = tokio::select! {
            // A suspect endpoint holds requests up, so it cannot wait.
            biased;
            () = suspect(endpoint, || wake.ask(endpoint)) => {
                wake.gate.cold_starts().reopen(Phase::Propagate);
                sleep(endpoint.backoff()).await;
                // It keeps the one request at a time that being suspect left it, and grows from there.
                None
            }
            () = wake.idle(endpoint, || IDLE, up) => {
                wake.gate.cold_starts().abandoned();
                ALL
            }
            () = wake.widen(endpoint, || wake.ask(endpoint)) => None,
            () = wake.watch_silence(endpoint, || wake.ask(endpoint)) => None,
        };
        if !wake.is_wanted() {
            wake.gate.target().set_status(Status::Idle);
        }
    }
}

/// Says whether the server is up. It is an activation only if it is not so at once.
async fn bring_up(wake: &Wake, endpoint: &Endpoint, limit: Option<u32>) -> bool {
    let readiness = wake.gate.policy().readiness.clone();
    let first = probe(endpoint.address(), &readiness).await;
    if first.is_ready() {
        endpoint.vouch();
        if limit.is_some() {
            endpoint.front().into_iter().for_each(Front::found_ready);
        }
        // Of a cold start that ended in vain: it may be a gateway that has noticed its servers by now.
        wake.gate.cold_starts().ready(Some(endpoint.address()));
        wake.open(endpoint, limit);
        return true;
    }
    wake.told();
    wake.gate.target().set_status(Status::Starting);
    let mut last = Some(first);
    let ready = async {
        sleep(readiness.interval.get()).await;
        wake.until_ready(endpoint.address(), &mut last).await;
    };
    let outcome = tokio::select! {
        // One that is up is up, whatever was said of it.
        biased;
        outcome = timeout(readiness.activation_timeout.get(), ready) => outcome.ok(),
        obstacle = wake.hopeless() => {
            wake.failed(obstacle.message.clone(), Vec::new(), obstacle.cause(), HOPELESS);
            return false;
        }
    };
    if outcome.is_some() {
        endpoint.front().into_iter().for_each(Front::found_ready);
        wake.activated(endpoint);
        return true;
    }
    wake.failed(wake.too_late(last).into(), Vec::new(), Cause::Passing, readiness.interval.get());
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
