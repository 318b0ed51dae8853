//! Batch export of spans by a single task; submitters never wait for the collector.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::KeyValue;
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_otlp::{
    ExporterBuildError, Protocol, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
    tonic_types::{metadata::MetadataMap, transport::ClientTlsConfig},
};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter as Exporter},
};
use thiserror::Error;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::rustls::crypto::ring;
use tokio_util::sync::CancellationToken;

use super::{SpanCounts, SpanQueue};
use crate::config::{self, TracesProtocol};

/// Error while setting up the export of traces.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum TracesError {
    #[error("cannot export traces to {endpoint}: {source}")]
    Exporter { endpoint: String, source: ExporterBuildError },
    #[error("cannot export traces to {endpoint}: no root certificates were found on this machine: {source}")]
    Roots { endpoint: String, source: std::io::Error },
}

/// The exporting task, not running yet.
pub struct Export<E = SpanExporter> {
    exporter: E,
    spans: mpsc::Receiver<Vec<SpanData>>,
    counts: Arc<SpanCounts>,
    endpoint: String,
    /// Failed spans since the last log line.
    unlogged: u64,
    /// Time of the last log line about failures.
    last_logged: Option<Instant>,
}

/// Number of spans that completes a batch.
const MAX_BATCH_SPANS: usize = 512;

/// Time that an incomplete batch waits for more spans.
const BATCH_DELAY: Duration = Duration::from_secs(1);

/// Timeout of one export, including its retries.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Minimum interval between log lines about failures.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(60);

// === impl SpanQueue ===

impl SpanQueue {
    /// Sets up the export to a collector, without connecting yet.
    ///
    /// # Errors
    ///
    /// If the endpoint is invalid, or no root certificates are found for TLS.
    pub fn with_exporter(config: &config::Traces) -> Result<(Arc<Self>, Export), TracesError> {
        let (traces, spans) = Self::new(config.sample_ratio.get());
        let mut exporter = exporter(config)?;
        exporter.set_resource(&resource(&config.service_name));
        let export = Export::new(exporter, spans, traces.counts().clone(), config.endpoint.clone());
        Ok((Arc::new(traces), export))
    }
}

/// Describes this process, including `OTEL_RESOURCE_ATTRIBUTES`.
fn resource(service_name: &str) -> Resource {
    Resource::builder()
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        // The last one wins: the file takes precedence over the environment.
        .with_service_name(service_name.to_owned())
        .build()
}

fn exporter(config: &config::Traces) -> Result<SpanExporter, TracesError> {
    let endpoint = config.endpoint.clone();
    let is_tls = endpoint.starts_with("https:");
    let built = match config.protocol {
        TracesProtocol::Grpc => {
            let headers = config.headers.iter().filter_map(|(name, value)| {
                Some((name.parse::<HeaderName>().ok()?, HeaderValue::from_str(value).ok()?))
            });
            let metadata = MetadataMap::from_headers(headers.collect::<HeaderMap>());
            let builder = SpanExporter::builder()
                .with_tonic()
                .with_endpoint(&endpoint)
                .with_timeout(EXPORT_TIMEOUT)
                .with_metadata(metadata);
            let tls = || ClientTlsConfig::new().with_native_roots();
            if is_tls { builder.with_tls_config(tls()).build() } else { builder.build() }
        }
        TracesProtocol::Http => {
            let builder = SpanExporter::builder()
                .with_http()
                .with_protocol(Protocol::HttpBinary)
                .with_endpoint(signal(&endpoint))
                .with_timeout(EXPORT_TIMEOUT)
                .with_headers(config.headers.clone().into_iter().collect());
            if is_tls {
                let roots = hyper_rustls::HttpsConnectorBuilder::new()
                    .with_provider_and_native_roots(ring::default_provider())
                    .map_err(|source| TracesError::Roots { endpoint: endpoint.clone(), source })?;
                let connector = roots.https_only().enable_http1().build();
                builder.with_http_client(HyperClient::new(connector, EXPORT_TIMEOUT, None)).build()
            } else {
                builder.with_http_client(HyperClient::with_default_connector(EXPORT_TIMEOUT, None)).build()
            }
        }
    };
    built.map_err(|source| TracesError::Exporter { endpoint, source })
}

/// Returns the URL for spans, with the conventional path if the endpoint has none.
fn signal(endpoint: &str) -> String {
    let after_scheme = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    match after_scheme.split_once('/') {
        None => format!("{endpoint}/v1/traces"),
        Some((_, "")) => format!("{endpoint}v1/traces"),
        Some(_) => endpoint.to_owned(),
    }
}

// === impl Export ===

impl<E> fmt::Debug for Export<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl<E: Exporter> Export<E> {
    fn new(
        exporter: E,
        spans: mpsc::Receiver<Vec<SpanData>>,
        counts: Arc<SpanCounts>,
        endpoint: String,
    ) -> Self {
        Self { exporter, spans, counts, endpoint, unlogged: 0, last_logged: None }
    }

    /// Exports until `stopping`, then exports the remaining spans. The caller must bound the time after that.
    pub async fn run(mut self, stopping: CancellationToken) {
        while let Some(batch) = self.batch(&stopping).await {
            self.export(batch).await;
        }
    }

    /// Returns the next batch. After `stopping`, returns the remaining spans, and then `None`.
    async fn batch(&mut self, stopping: &CancellationToken) -> Option<Vec<SpanData>> {
        let mut batch = tokio::select! {
            // Queued spans first, also while stopping.
            biased;
            spans = self.spans.recv() => spans?,
            () = stopping.cancelled() => {
                self.spans.close();
                return None;
            }
        };
        let full = Instant::now() + BATCH_DELAY;
        while batch.len() < MAX_BATCH_SPANS {
            let more = tokio::select! {
                // Queued spans first, as above.
                biased;
                more = timeout_at(full, self.spans.recv()) => more,
                () = stopping.cancelled() => break,
            };
            let Ok(Some(more)) = more else { break };
            batch.extend(more);
        }
        Some(batch)
    }

    async fn export(&mut self, batch: Vec<SpanData>) {
        let count = batch.len() as u64;
        let error = match timeout(EXPORT_TIMEOUT, self.exporter.export(batch)).await {
            Ok(Ok(())) => {
                self.counts.exported.fetch_add(count, Ordering::Relaxed);
                if self.last_logged.take().is_some() {
                    tracing::info!(endpoint = self.endpoint, "trace export has recovered");
                }
                self.unlogged = 0;
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", EXPORT_TIMEOUT.as_secs()),
        };
        self.counts.failed.fetch_add(count, Ordering::Relaxed);
        self.unlogged += count;
        if self.last_logged.is_none_or(|last_logged| last_logged.elapsed() >= FAILURE_LOG_INTERVAL) {
            let (endpoint, spans) = (&self.endpoint, std::mem::take(&mut self.unlogged));
            tracing::warn!(
                endpoint,
                spans,
                error,
                "cannot export traces; these spans are lost, requests are not affected"
            );
            self.last_logged = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
    use parking_lot::Mutex;

    use super::*;
    use crate::telemetry::traces::{ClockAnchor, Context, Span, SpanDirection};

    /// Records the sizes of batches and takes a fixed time for each.
    #[derive(Clone, Debug, Default)]
    struct FakeExporter {
        batches: Arc<Mutex<Vec<usize>>>,
        takes: Duration,
        fails: bool,
    }

    impl Exporter for FakeExporter {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            tokio::time::sleep(self.takes).await;
            self.batches.lock().push(batch.len());
            if self.fails { Err(OTelSdkError::InternalFailure("down".into())) } else { Ok(()) }
        }
    }

    fn exporting(fake: FakeExporter) -> (SpanQueue, CancellationToken, tokio::task::JoinHandle<()>) {
        let (traces, spans) = SpanQueue::new(1.0);
        let export = Export::new(fake, spans, traces.counts().clone(), "there".into());
        let stopping = CancellationToken::new();
        (traces, stopping.clone(), tokio::spawn(export.run(stopping)))
    }

    fn submit(traces: &SpanQueue, count: usize) {
        let span = || Span::new("POST".into(), SpanDirection::Server, 0, Instant::now());
        let spans = (0..count).map(|_| span()).collect();
        traces.submit(&Context::new(), &ClockAnchor::now(), spans, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn spans_are_sent_in_batches_or_after_a_second() {
        let fake = FakeExporter::default();
        let (traces, ..) = exporting(fake.clone());
        submit(&traces, 3);
        tokio::time::sleep(Duration::from_millis(900)).await;
        submit(&traces, 2);
        assert!(fake.batches.lock().is_empty());
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(*fake.batches.lock(), [5], "1.0 s after the first, at 1.1 s");
        for _ in 0..6 {
            submit(&traces, 100);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(
            *fake.batches.lock(),
            [5, 600],
            "512 complete a batch, and a request's spans are not split"
        );
        assert_eq!(traces.counts().all(), [("exported", 605), ("dropped", 0), ("failed", 0)]);
    }

    #[tokio::test(start_paused = true)]
    async fn remaining_spans_are_exported_on_stop() {
        let fake = FakeExporter { takes: Duration::from_secs(2), ..FakeExporter::default() };
        let (traces, stopping, running) = exporting(fake.clone());
        submit(&traces, 1);
        tokio::time::sleep(Duration::from_millis(1500)).await;
        for _ in 0..7 {
            submit(&traces, 100);
        }
        stopping.cancel();
        running.await.unwrap();
        assert_eq!(*fake.batches.lock(), [1, 600, 100]);
        submit(&traces, 1);
        assert_eq!(traces.counts().all(), [("exported", 701), ("dropped", 1), ("failed", 0)]);
    }

    #[tokio::test(start_paused = true)]
    async fn silent_collector_costs_only_spans() {
        let down = FakeExporter { fails: true, ..FakeExporter::default() };
        let (traces, ..) = exporting(down);
        submit(&traces, 4);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(traces.counts().all(), [("exported", 0), ("dropped", 0), ("failed", 4)]);
        let silent = FakeExporter { takes: Duration::from_secs(3600), ..FakeExporter::default() };
        let (traces, ..) = exporting(silent);
        submit(&traces, 4);
        tokio::time::sleep(Duration::from_millis(10_900)).await;
        assert_eq!(traces.counts().all()[2], ("failed", 0), "1 s for more, then 10 s for an answer");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(traces.counts().all()[2], ("failed", 4));
    }

    #[test]
    fn endpoint_without_a_path_gets_the_default_one() {
        for (endpoint, url) in [
            ("http://collector:4318", "http://collector:4318/v1/traces"),
            ("http://collector:4318/", "http://collector:4318/v1/traces"),
            ("https://api.example.com/otlp/v1/traces", "https://api.example.com/otlp/v1/traces"),
        ] {
            assert_eq!(signal(endpoint), url);
        }
    }
}
