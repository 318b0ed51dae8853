//! Start-up times from cold-start records: output of `bench cold-start`, JSON lines of `report.dir`, or the response of
//! `/api/v1/cold-starts`.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::Value;

/// Start-up times of cold-start records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StartUpRecords {
    /// First request until ready, in milliseconds, of each successful start.
    pub until_ready: Vec<u64>,
    /// Number of failed starts.
    pub failed: usize,
    /// Routes of the records.
    pub routes: BTreeSet<String>,
}

/// Subset of a record that all versions have in common.
#[derive(Debug, Deserialize)]
struct ColdStartRecord {
    route: String,
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    outcome: Option<String>,
    #[serde(default)]
    phases: Vec<RecordedPhase>,
    #[serde(default)]
    t_actuation_ms: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct RecordedPhase {
    name: String,
    start_ms: f64,
    duration_ms: f64,
}

/// Phases that follow readiness; all others precede it.
const PHASES_AFTER_READY: [&str; 3] = ["dispatch", "first_byte", "first_token"];

// === impl StartUpRecords ===

impl StartUpRecords {
    /// Adds the records in `text`, optionally of one route. Ignores wakes from sleep mode, which are no starts from zero.
    ///
    /// # Errors
    /// If a record is invalid.
    pub fn read(&mut self, text: &str, route: Option<&str>) -> Result<(), String> {
        for record in records(text)? {
            if route.is_some_and(|route| route != record.route) || record.kind.as_deref() == Some("wake") {
                continue;
            }
            self.routes.insert(record.route.clone());
            match (record.outcome.as_deref(), record.until_ready()) {
                (Some("failed"), _) => self.failed += 1,
                (Some(_), Some(ms)) => self.until_ready.push(ms),
                _ => {}
            }
        }
        Ok(())
    }
}

// === impl ColdStartRecord ===

impl ColdStartRecord {
    fn until_ready(&self) -> Option<u64> {
        let ready = |phase: &&RecordedPhase| !PHASES_AFTER_READY.contains(&phase.name.as_str());
        let end = self.phases.iter().filter(ready).map(|phase| phase.start_ms + phase.duration_ms);
        let ms = self.t_actuation_ms.or_else(|| end.max_by(f64::total_cmp))?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked, and saturates")]
        (ms.is_finite() && ms >= 0.0).then_some(ms.round() as u64)
    }
}

fn records(text: &str) -> Result<Vec<ColdStartRecord>, String> {
    let invalid = |error: serde_json::Error| format!("invalid cold-start record: {error}");
    // A single document, or one per line.
    let values = match serde_json::from_str::<Value>(text) {
        Ok(Value::Array(list)) => list,
        Ok(value) => match (value.get("cycles"), value.get("cold_starts")) {
            (Some(Value::Array(cycles)), _) => {
                let records = cycles.iter().filter_map(|cycle| cycle.get("cold_start"));
                records.filter(|record| !record.is_null()).cloned().collect()
            }
            (_, Some(Value::Array(list))) => list.clone(),
            _ => vec![value],
        },
        Err(_) => {
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            lines.map(|line| serde_json::from_str(line).map_err(invalid)).collect::<Result<_, _>>()?
        }
    };
    values.into_iter().map(|value| serde_json::from_value(value).map_err(invalid)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPLETED: &str = r#"{"id":7,"route":"tiny","kind":"cold_start","outcome":"completed","total_ms":3073.0,
        "phases":[{"name":"signal","start_ms":0.0,"duration_ms":1.0},{"name":"load","start_ms":1.0,"duration_ms":3020.4},
        {"name":"dispatch","start_ms":3021.4,"duration_ms":1.0}]}"#;

    fn of(text: &str, route: Option<&str>) -> StartUpRecords {
        let mut measured = StartUpRecords::default();
        measured.read(text, route).unwrap();
        measured
    }

    #[test]
    fn records_are_read_from_every_format() {
        let line = COMPLETED.replace('\n', " ");
        let actuation = line.replace("\"phases\"", "\"t_actuation_ms\":2999.6,\"phases\"");
        let failed = line.replace("completed", "failed").replace("tiny", "large");
        let wake = line.replace("cold_start", "wake");
        for text in [
            format!("{line}\n{actuation}\n\n{failed}\n{wake}\n"),
            format!("[{line},{actuation},{failed},{wake}]"),
            format!("{{\"cold_starts\":[{line},{actuation},{failed},{wake}]}}"),
            format!(
                r#"{{"schema":"anteroom.dev/bench/v1","cycles":[{{"cold_start":{line}}},{{"cold_start":{actuation}}},
                   {{"cold_start":null,"error":"x"}},{{"cold_start":{failed}}}]}}"#
            ),
        ] {
            let all = of(&text, None);
            assert_eq!(
                (&*all.until_ready, all.failed),
                (&[3021, 3000][..], 1),
                "1 + 3020.4, and 2999.6: {text}"
            );
            assert_eq!(all.routes.into_iter().collect::<Vec<_>>(), ["large", "tiny"]);
            assert_eq!(of(&text, Some("large")).failed, 1);
            assert_eq!(of(&text, Some("tiny")).failed, 0);
        }
        assert_eq!(of(COMPLETED, None).until_ready, [3021], "a record of several lines");
    }

    #[test]
    fn invalid_record_is_an_error() {
        let mut measured = StartUpRecords::default();
        for text in ["", "hello", "{\"a\": 1}", "[1]", "{\"route\":\"a\"}\n{"] {
            let result = measured.read(text, None);
            assert!(text.is_empty() || result.unwrap_err().contains("invalid cold-start record"), "{text}");
        }
        assert_eq!(measured, StartUpRecords::default());
    }
}
