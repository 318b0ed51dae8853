//! Where traces go.

use std::{collections::BTreeMap, fmt};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::Ratio;

/// Traces, exported to a collector with OpenTelemetry's protocol, OTLP.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Traces {
    /// Where the collector is: `http://` or `https://` with host and port. With `http` as protocol it may have a path;
    /// without one, `/v1/traces` is asked.
    pub endpoint: String,
    /// How it is spoken to.
    #[serde(default)]
    pub protocol: TracesProtocol,
    /// How many of the traces that begin here are exported, from 0 to 1. Of a trace that began elsewhere its
    /// `traceparent` says whether it is.
    #[serde(default)]
    pub sample_ratio: Ratio,
    /// Headers (gRPC: metadata) of every export. Secrets are better off in the variable `OTEL_EXPORTER_OTLP_HEADERS`.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// What we are called in traces: `service.name`.
    #[serde(default = "Traces::default_service_name")]
    pub service_name: String,
}

/// How the collector is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum TracesProtocol {
    /// OTLP over gRPC, mostly at port 4317.
    #[default]
    Grpc,
    /// OTLP as Protobuf over HTTP/1.1, mostly at port 4318.
    Http,
}

// === impl Traces ===

impl Traces {
    fn default_service_name() -> String {
        "anteroom".into()
    }
}

/// Without the values of headers, which are credentials more often than not.
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
