//! Routes of sleep mode, which vLLM serves in development mode.

use super::{
    answer::{ApiError, SimResponse, json},
    call::{parse, read},
};
use crate::sim::server::SimServer;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::json;
use std::time::Duration;
use tokio::time::sleep;

#[derive(Deserialize)]
struct Rpc {
    method: String,
}

pub(super) async fn answer(server: &SimServer, request: Request<Incoming>) -> Result<SimResponse, ApiError> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    match (request.method(), request.uri().path()) {
        (&Method::POST, "/sleep") => fall_asleep(server, &query).await,
        (&Method::POST, "/wake_up") if server.args.fail_wake => {
            Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "Failure injected by --fail-wake."))
        }
        (&Method::POST, "/wake_up") => Ok(wake_up(server, &query).await),
        (&Method::GET, "/is_sleeping") => Ok(is_sleeping(server)),
        (&Method::POST, "/collective_rpc") => collective_rpc(server, &read(request).await?),
        _ => Err(ApiError::http(StatusCode::METHOD_NOT_ALLOWED)),
    }
}

/// Handles `POST /sleep?level=1&mode=abort`. Running requests finish, like in vLLM's mode `wait`.
async fn fall_asleep(server: &SimServer, query: &str) -> Result<SimResponse, ApiError> {
    let level = match values(query, "level").next().unwrap_or("1") {
        "1" => 1,
        "2" => 2,
        level => return Err(ApiError::bad_request(format!("invalid sleep level {level}"))),
    };
    server.engine.sleep.fall_asleep(level);
    sleep(server.args.sleep_time).await;
    server.log.engine("abstract.py:390", &took(server.args.sleep_time, "fall asleep"));
    Ok(json(&json!({"status": "sleeping", "level": level})))
}

/// Handles `POST /wake_up`, optionally with `?tags=weights` or `?tags=kv_cache`.
async fn wake_up(server: &SimServer, query: &str) -> SimResponse {
    let tags: Vec<_> = values(query, "tags").collect();
    let wants = |tag| tags.is_empty() || tags.contains(&tag);
    if wants("weights") {
        sleep(server.args.wake_time).await;
        server.log.engine("abstract.py:408", &took(server.args.wake_time, "wake up tags"));
    }
    let awake = server.engine.sleep.wake_up(wants("weights"), wants("kv_cache"));
    let tags = (!tags.is_empty()).then_some(tags);
    json(&json!({"status": if awake { "awake" } else { "sleeping" }, "tags": tags}))
}

fn is_sleeping(server: &SimServer) -> SimResponse {
    json(&json!({"is_sleeping": server.engine.sleep.is_sleeping()}))
}

/// Handles `POST /collective_rpc`. Supports only `reload_weights`, which a wake from level 2 needs.
fn collective_rpc(server: &SimServer, body: &[u8]) -> Result<SimResponse, ApiError> {
    let rpc: Rpc = parse(body)?;
    if rpc.method != "reload_weights" {
        return Err(ApiError::bad_request(format!("unknown method {}", rpc.method)));
    }
    server.engine.sleep.reload_weights();
    Ok(json(&json!({"results": [null]})))
}

fn took(time: Duration, what: &str) -> String {
    format!("It took {:.6} seconds to {what}.", time.as_secs_f64())
}

/// Returns the values of a query parameter, without percent-decoding.
fn values<'a>(query: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    query
        .split('&')
        .filter_map(move |pair| pair.split_once('='))
        .filter(move |(name, _)| *name == key)
        .map(|(_, value)| value)
}
