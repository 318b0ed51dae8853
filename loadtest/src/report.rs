//! Report of all scenarios of a run, with the machine they ran on.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use serde::Serialize;

use crate::error::LoadtestError;
use crate::findings::Findings;
use crate::machine::RigMachine;
use crate::setup::Setup;
use crate::table;

/// Name and version of the JSON format.
const SCHEMA: &str = "anteroom.dev/loadtest/v1";

#[derive(Debug, Serialize)]
pub(crate) struct LoadtestReport {
    schema: &'static str,
    machine: RigMachine,
    /// Command line of the run.
    command: Vec<String>,
    /// Version output of the programs.
    versions: BTreeMap<&'static str, String>,
    scenarios: Vec<Findings>,
}

// === impl LoadtestReport ===

impl LoadtestReport {
    pub(crate) fn new(setup: &Setup) -> Self {
        Self {
            schema: SCHEMA,
            machine: RigMachine::here(),
            command: std::env::args().skip(1).collect(),
            versions: setup.versions(),
            scenarios: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, findings: Findings) {
        self.scenarios.push(findings);
    }

    pub(crate) fn missed(&self) -> usize {
        self.scenarios.iter().flat_map(|scenario| &scenario.aims).filter(|aim| !aim.met).count()
    }

    pub(crate) fn write(&self, file: &Path) -> Result<(), LoadtestError> {
        let mut json = serde_json::to_vec_pretty(self).map_err(|error| unwritable(file, error))?;
        json.push(b'\n');
        fs::write(file, json).map_err(|error| unwritable(file, error))
    }

    /// Formats the lines above the tables: the machine and the versions.
    pub(crate) fn head(&self) -> impl fmt::Display {
        fmt::from_fn(move |f| {
            let machine = &self.machine;
            writeln!(
                f,
                "{}: {} ({} cores), Linux {}",
                machine.date, machine.processor, machine.cores, machine.kernel
            )?;
            for (name, version) in &self.versions {
                writeln!(f, "  {name}: {version}")?;
            }
            Ok(())
        })
    }
}

// === impl Findings ===

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n## {}: {}", self.scenario, self.how)?;
        for (at, table) in self.tables.iter().enumerate() {
            writeln!(f)?;
            table::write(f, table)?;
            // A legend is printed below the last of the tables that share it.
            if let Some(legend) = table.legend
                && self.tables.get(at + 1).and_then(|next| next.legend) != Some(legend)
            {
                writeln!(f, "{legend}")?;
            }
        }
        for (at, aim) in self.aims.iter().enumerate() {
            if at == 0 {
                writeln!(f)?;
            }
            let (measured, met) = (figure(aim.measured), if aim.met { "met" } else { "MISSED" });
            writeln!(f, "aim, {}: {measured} {} {}: {met}", aim.who, aim.what, aim.limit)?;
        }
        for (at, note) in self.notes.iter().enumerate() {
            if at == 0 {
                writeln!(f)?;
            }
            writeln!(f, "NOTE {note}")?;
        }
        Ok(())
    }
}

/// Checks that the report can be written, before anything is measured. An existing file is not changed yet.
pub(crate) fn check(file: &Path) -> Result<(), LoadtestError> {
    let opened = OpenOptions::new().append(true).create(true).open(file);
    opened.map(drop).map_err(|error| unwritable(file, error))
}

fn unwritable(file: &Path, error: impl Into<io::Error>) -> LoadtestError {
    LoadtestError::io(format!("write {}, which --json names", file.display()), error)
}

/// Formats three significant digits.
fn figure(value: f64) -> String {
    let decimals = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::findings::{Criterion, Table};

    #[test]
    fn unwritable_report_is_named_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let there = dir.path().join("there.json");
        fs::write(&there, "{}").unwrap();
        check(&there).unwrap();
        check(&dir.path().join("new.json")).unwrap();
        assert_eq!(fs::read_to_string(&there).unwrap(), "{}");
        for wrong in [dir.path().to_owned(), dir.path().join("none/new.json")] {
            let error = check(&wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("{}, which --json names", wrong.display())), "{error}");
        }
    }

    #[test]
    fn findings_print_tables_aims_and_notes() {
        let findings = Findings {
            scenario: "warm",
            how: "2 rounds of 1 s".into(),
            tables: vec![Table {
                title: "64 connections".into(),
                header: ["contender", "requests/s"].map(str::to_owned).into(),
                rows: vec![["direct", "100"].map(str::to_owned).into()],
                legend: Some("requests/s: of all clients"),
            }],
            results: serde_json::json!([]),
            aims: vec![Criterion::at_least("anteroom", "times Envoy's throughput, at least", 2.0, 1.512)],
            notes: vec!["noisy".into()],
        };
        assert_eq!(
            findings.to_string(),
            "\n## warm: 2 rounds of 1 s\n\n64 connections\n  contender  requests/s\n  direct            100\n\
             requests/s: of all clients\n\naim, anteroom: 1.51 times Envoy's throughput, at least 2: MISSED\n\
             \nNOTE noisy\n"
        );
    }
}
