//! Settings for the export of traces.

use std::{collections::BTreeMap, fmt};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::Ratio;

/// Export of traces to a collector, over OTLP.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Traces {
    /// Collector: `http://` or `https://` with host and port. With protocol `http` it may have a path; the default is
    /// `/v1/traces`.
    pub endpoint: String,
    /// Protocol of the export.
    #[serde(default)]
    pub protocol: TracesProtocol,
    /// Share of the traces started here that is exported, from 0 to 1. For a trace started elsewhere, its `traceparent`
    /// decides.
    #[serde(default)]
    pub sample_ratio: Ratio,
    /// Headers (gRPC: metadata) of each export. Put secrets into `OTEL_EXPORTER_OTLP_HEADERS` instead.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// The `service.name` of exported traces.
    #[serde(default = "Traces::default_service_name")]
    pub service_name: String,
}

/// Protocol of the export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum TracesProtocol {
    /// OTLP over gRPC, usually port 4317.
    #[default]
    Grpc,
    /// OTLP as Protobuf over HTTP/1.1, usually port 4318.
    Http,
}

// === impl Traces ===

impl Traces {
    fn default_service_name() -> String {
        "anteroom".into()
    }
}

/// Omits the values of headers: they are often credentials.
impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traces")
            .field("endpoint", &self.endpoint)
            .field("protocol", &self.protocol)
            .field("sample_ratio", &self.sample_ratio)
            .field("headers", &self.headers.keys())
            .field("service_name", &self.service_name)
            .finish()
    }
}
