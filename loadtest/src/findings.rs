//! Findings of a scenario, in the same shape for all: tables for people, figures for programs, aims, and notes that
//! qualify the figures.

use serde::Serialize;
use serde_json::Value;

/// Share of a core used by other processes above which a measurement counts as noisy.
pub(crate) const NOISY_CORE_SHARE: f64 = 0.05;

/// Findings of one scenario.
#[derive(Debug, Serialize)]
pub(crate) struct Findings {
    pub(crate) scenario: &'static str,
    /// Method of measurement: `5 rounds of 3 s`.
    pub(crate) how: String,
    /// Tables for people; all their figures are in `results`, too.
    #[serde(skip)]
    pub(crate) tables: Vec<Table>,
    pub(crate) results: Value,
    pub(crate) aims: Vec<Criterion>,
    /// Reasons to distrust a figure.
    pub(crate) notes: Vec<String>,
}

/// A table. Its first column is left-aligned, the others right-aligned.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) title: String,
    pub(crate) header: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
    /// Meaning of the columns, if the header does not make it clear.
    pub(crate) legend: Option<&'static str>,
}

/// A goal for Anteroom.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Criterion {
    /// Contender and circumstances of the figure: `anteroom, 64 connections`.
    pub(crate) who: String,
    /// Quantity with its unit and the direction of the limit: `times Envoy's throughput, at least`.
    pub(crate) what: &'static str,
    pub(crate) limit: f64,
    pub(crate) measured: f64,
    pub(crate) met: bool,
}

// === impl Criterion ===

impl Criterion {
    pub(crate) fn at_least(who: impl Into<String>, what: &'static str, limit: f64, measured: f64) -> Self {
        Self { who: who.into(), what, limit, measured, met: measured >= limit }
    }

    pub(crate) fn at_most(who: impl Into<String>, what: &'static str, limit: f64, measured: f64) -> Self {
        Self { who: who.into(), what, limit, measured, met: measured <= limit }
    }
}

/// Returns a note if other processes used so much of a core that the figures are noisy.
pub(crate) fn disturbed(others: f64) -> Option<String> {
    (others > NOISY_CORE_SHARE)
        .then(|| format!("other processes used up to {:.0} % of a core, so this is noisy", others * 100.0))
}

/// Returns one note for all disturbed measurements, given each with the cores used by other processes.
pub(crate) fn noise(measured: impl IntoIterator<Item = (String, f64)>) -> Option<String> {
    let noisy: Vec<_> = measured.into_iter().filter(|(_, others)| *others > NOISY_CORE_SHARE).collect();
    let (worst, others) = noisy.iter().max_by(|one, other| one.1.total_cmp(&other.1))?;
    let measurements = plural(noisy.len(), "measurement");
    Some(format!(
        "other processes disturbed {measurements}, so that the figures are noisy: worst {worst}, with {:.0} % of a core",
        others * 100.0
    ))
}

pub(crate) fn plural(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Formats a number without decimals and with commas between the thousands.
pub(crate) fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_separated_by_commas() {
        assert_eq!(["7", "999", "1,000", "123,457"], [7.0, 999.0, 1000.0, 123_456.7].map(thousands));
    }

    #[test]
    fn noise_is_reported_once_at_its_maximum() {
        let measured = |others: [f64; 3]| noise(["a", "b", "c"].map(str::to_owned).into_iter().zip(others));
        assert_eq!(measured([0.0, 0.01, NOISY_CORE_SHARE]), None);
        let told = measured([0.06, 0.3, 0.0]).unwrap();
        assert!(told.contains("2 measurements") && told.ends_with("worst b, with 30 % of a core"), "{told}");
    }

    #[test]
    fn noise_below_threshold_is_ignored() {
        assert_eq!(disturbed(NOISY_CORE_SHARE), None);
        assert!(disturbed(0.3).unwrap().contains("up to 30 % of a core"));
    }

    #[test]
    fn criterion_respects_its_direction() {
        assert!(Criterion::at_least("a", "b", 2.0, 2.0).met && !Criterion::at_least("a", "b", 2.0, 1.9).met);
        assert!(
            Criterion::at_most("a", "b", 2.0, 2.0).met && !Criterion::at_most("a", "b", 2.0, f64::NAN).met
        );
    }
}
