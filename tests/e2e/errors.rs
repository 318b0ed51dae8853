//! The table of errors in the code and its documentation.

use std::{collections::BTreeMap, time::Duration};

use anteroom::{
    domain::ByteCount,
    error::{Outcome, ProxyError, Refusal},
};

/// Row of `docs/errors.md`: status, types, gRPC status, Retry-After, x-should-retry.
type ErrorRow = [String; 6];

fn documented() -> BTreeMap<String, ErrorRow> {
    let text = include_str!("../../docs/errors.md");
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let rows = rows.map(|line| {
        let cells: Vec<_> =
            line.trim_matches('|').split(" | ").map(|cell| cell.trim().replace('`', "")).collect();
        assert!(cells.len() == 9 && cells.iter().all(|cell| !cell.is_empty()), "{line}");
        (cells[0].clone(), std::array::from_fn(|column| cells[column + 1].clone()))
    });
    rows.collect()
}

/// Returns every error, in each variant that affects Retry-After; `retry_after` is the known remaining wait.
fn every_error(retry_after: Option<Duration>) -> Vec<ProxyError> {
    let route = || "tiny".into();
    let text = || "because".to_owned();
    vec![
        ProxyError::UnknownPath(text()),
        ProxyError::NotKept(text()),
        ProxyError::MethodNotAllowed { path: text(), allowed: "POST" },
        ProxyError::ModelNotFound(text()),
        ProxyError::CrossSite(Some(text())),
        ProxyError::ForeignHost(text()),
        ProxyError::InvalidRequest(text()),
        ProxyError::Ambiguous(text()),
        ProxyError::UnsupportedEncoding(text()),
        ProxyError::RequestTooLarge { limit: 1 },
        ProxyError::RequestTimeout { pause: Duration::from_secs(30), rate: ByteCount::bytes(1000) },
        ProxyError::HoldQueueFull { route: route(), reason: text(), retry_after },
        ProxyError::BuffersFull(1),
        ProxyError::Saturated { route: route(), reason: text() },
        ProxyError::NoWait { route: route(), retry_after },
        ProxyError::AutoscalingPaused { route: route(), reason: "because".into() },
        ProxyError::ColdStartTimeout {
            route: route(),
            waited: Duration::ZERO,
            limit: "a limit",
            reason: None,
            retry_after,
        },
        ProxyError::ColdStartFailed {
            route: route(),
            reason: "because".into(),
            retry_after: retry_after.or(Some(Duration::from_secs(5))),
        },
        ProxyError::UpstreamError { route: route(), reason: text() },
        ProxyError::UpstreamTimeout { route: route(), reason: text() },
        ProxyError::Draining { admitted: false },
        ProxyError::Draining { admitted: true },
        ProxyError::Internal,
    ]
}

#[test]
fn document_matches_error_responses() {
    let documented = documented();
    let mut seen = BTreeMap::new();
    for error in every_error(None) {
        let answer = error.answer();
        let row = documented.get(answer.code).unwrap_or_else(|| panic!("{} is not documented", answer.code));
        let retry = answer.should_retry.map_or("default".into(), |retry| retry.to_string());
        let (status, grpc) = (answer.status.as_str().to_owned(), format!("{:?}", answer.grpc));
        let expected = [status, answer.kind.into(), answer.anthropic.into(), grpc, row[4].clone(), retry];
        assert_eq!(*row, expected, "{}", answer.code);
        // A refusal and an outcome with the same code share one error response.
        seen.insert(answer.code, error.outcome_or_refusal());
    }
    assert_eq!(seen.keys().collect::<Vec<_>>(), documented.keys().collect::<Vec<_>>());
    for refusal in Refusal::ALL {
        assert!(seen.contains_key(refusal.answer().code), "{refusal:?} is among those");
    }
    for outcome in Outcome::ALL {
        // These outcomes need no error response: one was sent already, or the client is gone.
        let silent = [Outcome::Completed, Outcome::ClientGone, Outcome::ClientStalled].contains(&outcome);
        assert!(silent || seen.contains_key(outcome.name()), "{outcome:?} is among those");
    }
}

#[test]
fn repeated_start_failure_is_not_retryable() {
    let route = "tiny".into();
    let error = ProxyError::ColdStartFailed { route, reason: "because".into(), retry_after: None };
    let answer = error.answer();
    assert_eq!((answer.code, answer.status.as_u16()), ("cold_start_failed", 503));
    assert_eq!((answer.should_retry, error.retry_after()), (Some(false), None));
    assert!(error.to_string().contains("twice for the same reason"), "{error}");
}

#[test]
fn errors_document_names_every_outcome() {
    let text = include_str!("../../docs/errors.md");
    let (_, metrics) = text.split_once("## In the metrics").unwrap();
    let unnamed =
        Outcome::ALL.into_iter().filter(|outcome| !metrics.contains(&format!("`{}`", outcome.name())));
    assert_eq!(unnamed.collect::<Vec<_>>(), []);
}

#[test]
fn retry_after_stays_within_sdk_limits() {
    let documented = documented();
    for (known, expected) in [(None, 5), (Some(0), 1), (Some(17), 17), (Some(3600), 60)] {
        for error in every_error(known.map(Duration::from_secs)) {
            let code = error.answer().code;
            let wait = error.retry_after().map(|wait| wait.as_secs());
            let says = match &*documented[code][4] {
                "none" => None,
                "until ready" | "next try" if matches!(error, ProxyError::BuffersFull(_)) => Some(1),
                "until ready" | "next try" => Some(expected),
                seconds => Some(seconds.parse().unwrap()),
            };
            assert_eq!(wait, says, "{code} with {known:?}");
        }
    }
}

#[test]
fn should_retry_header_stops_sdk_retries() {
    for error in every_error(None) {
        let answer = error.answer();
        let status = answer.status.as_u16();
        let by_default = [408, 409, 429].contains(&status) || status >= 500;
        // Errors with a Retry-After permit the retry.
        if error.retry_after().is_some() {
            assert!(answer.should_retry.unwrap_or(by_default), "{}", answer.code);
        }
        if (400..500).contains(&status) && ![408, 429].contains(&status) {
            assert_eq!(answer.should_retry, Some(false), "{}", answer.code);
        }
        assert!(!error.to_string().is_empty());
    }
}
