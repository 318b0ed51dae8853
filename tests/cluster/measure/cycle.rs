//! One cold start and the times of its events.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{MODEL, MeasurementSetup, machine};
use crate::{node::history::NodeEventKind, record, wait};

/// Times of a cold start, in milliseconds since the client began to write its request, which it writes in one piece.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct CycleTimes {
    pub(crate) round: usize,
    /// A stream beside KEDA's received `true`.
    pub(crate) pushed: Option<f64>,
    /// A watch delivered `spec.replicas` of 1.
    pub(crate) patched: f64,
    /// A watch delivered the pod.
    pub(crate) created: f64,
    /// A watch delivered the pod with its node: the observer's or the node's own watch.
    pub(crate) scheduled: f64,
    /// The node started the server's process.
    pub(crate) started: f64,
    /// The server logged that it is listening.
    pub(crate) answers: f64,
    /// The node's own readiness probe succeeded, if that was before the response.
    pub(crate) ready: Option<f64>,
    /// Upper bound of the dispatch: the first byte at the client minus the recorded time from dispatch to first byte.
    pub(crate) dispatched: f64,
    /// The first byte of the response reached the client.
    pub(crate) first_byte: f64,
    /// Durations of the phases in Anteroom's record.
    pub(crate) record: PhaseDurations,
    pub(crate) load_average: f64,
}

/// Durations of the phases of a cold-start record, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PhaseDurations {
    pub(crate) phases: BTreeMap<String, f64>,
    pub(crate) total: f64,
}

// === impl MeasurementSetup ===

impl MeasurementSetup {
    /// Sends a request and observes it to the end of its response.
    pub(super) async fn cold_start(&self, round: usize) -> CycleTimes {
        let load_average = machine::load();
        let replica = &self.anteroom.replicas[self.requested_replica_index()];
        let before = newest(&replica.cold_starts(&self.it, MODEL).await);
        let request = request();
        let mut stream = TcpStream::connect(replica.proxy()).await.unwrap();
        stream.set_nodelay(true).unwrap();

        let asked = SystemTime::now();
        stream.write_all(&request).await.unwrap();
        let mut answer = vec![0; 64 << 10];
        let length = stream.read(&mut answer).await.unwrap();
        let first_byte = SystemTime::now();
        answer.truncate(length);
        stream.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("data: [DONE]"), "{answer}");

        let since = |moment: SystemTime| ms(moment.duration_since(asked).unwrap_or_default());
        let pushed = match &self.tap {
            Some((_, tap)) => Some(since(tap.await_push(asked).await)),
            None => None,
        };
        let birth = self.pods.await_scheduled_pod(asked).await;
        let history: Vec<_> =
            self.it.history().into_iter().filter(|moment| moment.pod == birth.pod).collect();
        let if_it_did = |what: NodeEventKind| {
            let moment = history.iter().find(|moment| moment.what == what && moment.at <= first_byte);
            moment.map(|moment| since(moment.at))
        };
        let happened = |what: NodeEventKind| {
            if_it_did(what).unwrap_or_else(|| panic!("{what:?} of {} is not in {history:?}", birth.pod))
        };
        let (bound, answers) = (happened(NodeEventKind::Bound), happened(NodeEventKind::Answers));
        let records = wait::until("the record", wait::WAIT_LIMIT, async || {
            let records = replica.cold_starts(&self.it, MODEL).await;
            // The API returns a limited number of records, so the number cannot be compared.
            if newest(&records) > before { Ok(records) } else { Err(format!("{records:?}")) }
        });
        let record = PhaseDurations::read(&records.await[0]);
        CycleTimes {
            round,
            pushed,
            patched: since(self.replicas.time_of_value(1, asked)),
            // Two watches deliver the pod: uses the time of the first one.
            created: since(birth.created).min(bound),
            scheduled: since(birth.scheduled.unwrap()).min(bound),
            started: happened(NodeEventKind::Started),
            answers,
            ready: if_it_did(NodeEventKind::Ready),
            dispatched: rounded(since(first_byte) - record.phase("first_byte")),
            first_byte: since(first_byte),
            record,
            load_average,
        }
    }
}

/// Builds a request for a completion of one token, read until the connection ends.
fn request() -> Vec<u8> {
    let body = json!({
        "model": MODEL,
        "stream": true,
        "max_tokens": 1,
        "messages": [{ "role": "user", "content": "hello" }],
    })
    .to_string();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: models.test\r\ncontent-type: application/json\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Returns the id of the first record, which is the newest.
fn newest(records: &[Value]) -> Option<u64> {
    records.first()?["id"].as_u64()
}

fn ms(duration: Duration) -> f64 {
    rounded(duration.as_secs_f64() * 1e3)
}

/// Rounds to microseconds.
pub(super) fn rounded(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

// === impl PhaseDurations ===

impl PhaseDurations {
    fn read(record: &Value) -> Self {
        assert_eq!(record["outcome"], "completed", "{record}");
        let record = record::Record::read(record.clone());
        let phases = record.spans.iter().map(|span| (span.name.clone(), rounded(span.duration))).collect();
        Self { phases, total: rounded(record.total()) }
    }

    /// Returns the duration of a phase that every record has, in milliseconds.
    pub(crate) fn phase(&self, name: &str) -> f64 {
        self.phases.get(name).copied().unwrap_or_else(|| panic!("no phase {name} in {self:?}"))
    }
}

// === impl CycleTimes ===

impl CycleTimes {
    /// Returns the time from the start of the server's process until it listens, in milliseconds.
    pub(crate) fn load(&self) -> f64 {
        self.answers - self.started
    }
}
