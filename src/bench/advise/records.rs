//! How long starts take, from cold-start records: what `bench cold-start` has written, the JSON lines of `report.dir`,
//! or what `/api/v1/cold-starts` answers.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::Value;

/// What the records say of one route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// From the first request until it may be sent on, in milliseconds, of each start that got there.
    pub until_ready: Vec<u64>,
    /// How many starts failed.
    pub failed: usize,
    /// Whose they are.
    pub routes: BTreeSet<String>,
}

/// As much of a record as is needed. It is read leniently: records of older and newer versions serve as well.
#[derive(Debug, Deserialize)]
struct Record {
    route: String,
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    outcome: Option<String>,
    #[serde(default)]
    phases: Vec<Phase>,
    #[serde(default)]
    t_actuation_ms: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct Phase {
    name: String,
    start_ms: f64,
    duration_ms: f64,
}

/// Phases that are over when the target is ready: all others.
const AFTER_READY: [&str; 3] = ["dispatch", "first_byte", "first_token"];

// === impl Measured ===

impl Measured {
    /// Adds what is in a file or an answer, of `route` alone if one is said. Wakes from sleep mode are left out: they
    /// say nothing of a start from zero.
    ///
    /// # Errors
    /// What is no record.
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

// === impl Record ===

impl Record {
    fn until_ready(&self) -> Option<u64> {
        let ready = |phase: &&Phase| !AFTER_READY.contains(&phase.name.as_str());
        let end = self.phases.iter().filter(ready).map(|phase| phase.start_ms + phase.duration_ms);
        let ms = self.t_actuation_ms.or_else(|| end.max_by(f64::total_cmp))?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked, and saturates")]
        (ms.is_finite() && ms >= 0.0).then_some(ms.round() as u64)
    }
}

fn records(text: &str) -> Result<Vec<Record>, String> {
    let wrong = |error: serde_json::Error| format!("no record of a cold start: {error}");
    // One document, or one a line.
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
            lines.map(|line| serde_json::from_str(line).map_err(wrong)).collect::<Result<_, _>>()?
        }
    };
    values.into_iter().map(|value| serde_json::from_value(value).map_err(wrong)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPLETED: &str = r#"{"id":7,"route":"tiny","kind":"cold_start","outcome":"completed","total_ms":3073.0,
        "phases":[{"name":"signal","start_ms":0.0,"duration_ms":1.0},{"name":"load","start_ms":1.0,"duration_ms":3020.4},
        {"name":"dispatch","start_ms":3021.4,"duration_ms":1.0}]}"#;

    fn of(text: &str, route: Option<&str>) -> Measured {
        let mut measured = Measured::default();
        measured.read(text, route).unwrap();
        measured
    }

    #[test]
    fn every_place_that_has_records_is_read() {
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
        assert_eq!(of(COMPLETED, None).until_ready, [3021], "one record, over several lines");
    }

    #[test]
    fn what_is_no_record_is_told() {
        let mut measured = Measured::default();
        for text in ["", "hello", "{\"a\": 1}", "[1]", "{\"route\":\"a\"}\n{"] {
            let result = measured.read(text, None);
            assert!(text.is_empty() || result.unwrap_err().contains("no record of a cold start"), "{text}");
        }
        assert_eq!(measured, Measured::default());
    }
}
