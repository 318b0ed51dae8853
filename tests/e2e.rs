//! The proxy from end to end: real listener and threads, raw clients, scripted model servers.

// Clippy's exemption for tests covers functions with `#[test]`, but not the helpers of a test file.
#![allow(clippy::unwrap_used)]

mod support;

#[path = "e2e/bad_input.rs"]
mod bad_input;
#[path = "e2e/cluster.rs"]
mod cluster;
#[path = "e2e/cross_site.rs"]
mod cross_site;
#[path = "e2e/dashboard.rs"]
mod dashboard;
#[path = "e2e/dialects.rs"]
mod dialects;
#[path = "e2e/drain.rs"]
mod drain;
#[path = "e2e/errors.rs"]
mod errors;
#[path = "e2e/failure_detail.rs"]
mod failure_detail;
#[path = "e2e/forwarding.rs"]
mod forwarding;
#[path = "e2e/gateways.rs"]
mod gateways;
#[path = "e2e/grpc.rs"]
mod grpc;
#[path = "e2e/hangup.rs"]
mod hangup;
#[path = "e2e/hold.rs"]
mod hold;
#[path = "e2e/instruments.rs"]
mod instruments;
#[path = "e2e/interceptor.rs"]
mod interceptor;
#[path = "e2e/keepalive.rs"]
mod keepalive;
#[path = "e2e/limits.rs"]
mod limits;
#[path = "e2e/lockouts.rs"]
mod lockouts;
#[path = "e2e/models.rs"]
mod models;
#[path = "e2e/obstacles.rs"]
mod obstacles;
#[path = "e2e/preflight.rs"]
mod preflight;
#[path = "e2e/reload.rs"]
mod reload;
#[path = "e2e/replicas.rs"]
mod replicas;
#[path = "e2e/report.rs"]
mod report;
#[path = "e2e/requests.rs"]
mod requests;
#[path = "e2e/responses.rs"]
mod responses;
#[path = "e2e/scaler.rs"]
mod scaler;
#[path = "e2e/scaler_tls.rs"]
mod scaler_tls;
#[path = "e2e/sleep.rs"]
mod sleep;
#[path = "e2e/slow.rs"]
mod slow;
#[path = "e2e/start.rs"]
mod start;
#[path = "e2e/traces.rs"]
mod traces;
#[path = "e2e/traces_tls.rs"]
mod traces_tls;
#[path = "e2e/upstream.rs"]
mod upstream;
#[path = "e2e/websocket.rs"]
mod websocket;
#[path = "e2e/zero.rs"]
mod zero;
