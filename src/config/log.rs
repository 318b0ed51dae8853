//! Settings of the log.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, IntoDeserializer, value::MapAccessDeserializer},
};

/// Format of the log, and the lines that are off by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LogSettings {
    /// Format of the log.
    pub format: LogFormat,
    /// Log a line for each request of a route, with its id, model, path, status, outcome and times, and for each one that
    /// was refused. Not rate-limited, unlike all other lines.
    pub access: bool,
}

/// Format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// Human-readable lines.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

// === impl LogSettings ===

impl LogSettings {
    /// Returns the schema of both forms, the mapping first.
    pub(super) fn either_form(generator: &mut SchemaGenerator) -> Schema {
        let (mapping, format) = (generator.subschema_for::<Self>(), generator.subschema_for::<LogFormat>());
        json_schema!({ "anyOf": [mapping, format] })
    }
}

impl<'de> Deserialize<'de> for LogSettings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Default, Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
        struct LogKeys {
            format: LogFormat,
            access: bool,
        }

        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = LogSettings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a format or keys with values")
            }

            fn visit_str<E: de::Error>(self, format: &str) -> Result<LogSettings, E> {
                let format = LogFormat::deserialize(format.into_deserializer())?;
                Ok(LogSettings { format, ..LogSettings::default() })
            }

            fn visit_map<A: de::MapAccess<'de>>(self, keys: A) -> Result<LogSettings, A::Error> {
                let LogKeys { format, access } = LogKeys::deserialize(MapAccessDeserializer::new(keys))?;
                Ok(LogSettings { format, access })
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}
