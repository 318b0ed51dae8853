//! The report as a table for people.

use std::fmt;

use crate::contender::Contender;
use crate::report::{Line, Report, plural};
use crate::stats::Spread;

const HEADER: [&str; 10] = [
    "contender",
    "requests/s (min–max)",
    "× haproxy",
    "× envoy",
    "p50 µs",
    "added µs",
    "p99 µs",
    "CPU s/100k (min–max)",
    "busy",
    "rig busy",
];

// === impl Report ===

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (machine, settings) = (&self.machine, &self.settings);
        writeln!(
            f,
            "{}, {}: {} ({} cores), Linux {}",
            self.scenario, machine.date, machine.processor, machine.cores, machine.kernel
        )?;
        writeln!(f, "medians of {} rounds of {} s, and their spread", settings.rounds, settings.seconds)?;
        for (name, version) in &self.versions {
            writeln!(f, "  {name}: {version}")?;
        }
        for group in self.results.chunk_by(|one, next| one.series.connections == next.series.connections) {
            writeln!(f, "\n{}", plural(group[0].series.connections))?;
            let rows: Vec<_> =
                std::iter::once(HEADER.map(str::to_owned)).chain(group.iter().map(row)).collect();
            write_aligned(f, &rows)?;
        }
        writeln!(
            f,
            "\nadded: median latency beyond direct's; busy: of its core, the contender's process; \
             rig busy: of the other core, the clients and the backend"
        )?;
        if !self.aims.is_empty() {
            writeln!(f)?;
        }
        for aim in &self.aims {
            writeln!(
                f,
                "aim, {}, {}: {:.2} {} {}: {}",
                aim.contender.name(),
                plural(aim.connections),
                aim.measured,
                aim.what,
                aim.limit,
                if aim.met { "met" } else { "MISSED" }
            )?;
        }
        if !self.notes.is_empty() {
            writeln!(f)?;
        }
        for note in &self.notes {
            writeln!(f, "NOTE {note}")?;
        }
        Ok(())
    }
}

fn row(line: &Line) -> [String; 10] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let direct = line.series.contender == Contender::Direct;
    let times = |spread: Option<Spread>| or_dash(spread.map(|spread| format!("{:.2}", spread.median)));
    let rate = line.requests_per_second;
    [
        line.series.contender.name().to_owned(),
        format!("{} ({}–{})", thousands(rate.median), thousands(rate.min), thousands(rate.max)),
        times(line.times_haproxy),
        times(line.times_envoy),
        format!("{:.1}", line.p50_us.median),
        or_dash(line.added_p50_us.filter(|_| !direct).map(|added| format!("{:.1}", added.median))),
        format!("{:.1}", line.p99_us.median),
        or_dash(line.cpu_per_100k.map(|cpu| format!("{:.3} ({:.3}–{:.3})", cpu.median, cpu.min, cpu.max))),
        or_dash(line.busy.map(|busy| format!("{:.0} %", busy.median * 100.0))),
        format!("{:.0} %", line.rig_busy.median * 100.0),
    ]
}

/// The first column to the left, the others to the right.
fn write_aligned<const N: usize>(f: &mut fmt::Formatter<'_>, rows: &[[String; N]]) -> fmt::Result {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    for row in rows {
        write!(f, "  {:<1$}", row[0], widths[0])?;
        for (cell, width) in row.iter().zip(widths).skip(1) {
            write!(f, "  {cell:>width$}")?;
        }
        writeln!(f)?;
    }
    Ok(())
}

fn thousands(value: f64) -> String {
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
    use crate::machine::Machine;
    use crate::report::Settings;
    use crate::stats::series;

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(["7", "999", "1,000", "123,457"], [7.0, 999.0, 1000.0, 123_456.7].map(thousands));
    }

    #[test]
    fn a_table_has_every_contender_aim_and_note() {
        let all = vec![
            series(Contender::Direct, 64, &[300_000.0, 310_000.0]),
            series(Contender::Anteroom, 64, &[90_000.0, 91_000.0]),
            series(Contender::Envoy, 64, &[30_000.0, 30_000.0]),
        ];
        let settings = Settings { seconds: 1, rounds: 2 };
        let text = Report::new("warm", Machine::here(), settings, &[], all).to_string();
        assert!(text.contains("64 connections\n"), "{text}");
        assert!(text.contains("90,500 (90,000–91,000)"), "{text}");
        assert!(text.contains("3.02 times Envoy's throughput, at least 2: met"), "{text}");
        assert!(!text.contains("NOTE"), "{text}");
    }
}
