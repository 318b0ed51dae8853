//! HTML helpers: times, ratios, axes.

use maud::{Markup, html};

use crate::{bench::samples::Metric, terminal::duration};

/// Renders a table cell with a rounded time, and the exact one in `data-ms`; a dash without one.
pub(super) fn time_cell(ms: impl Into<Option<f64>>, class: Option<&str>) -> Markup {
    let ms: Option<f64> = ms.into();
    match ms {
        Some(ms) => html! { td class=[class] data-ms=(ms) { (time(ms)) } },
        None => html! { td { "–" } },
    }
}

/// Formats a time without line breaks.
pub(super) fn time(ms: f64) -> String {
    duration(ms).replace(' ', "\u{a0}")
}

/// Formats a ratio as an SVG coordinate.
pub(super) fn percent(part: f64, whole: f64) -> String {
    format!("{:.3}%", 100.0 * part / whole.max(f64::MIN_POSITIVE))
}

/// Formats a ratio for a table cell.
pub(super) fn share(part: f64, whole: f64) -> String {
    match 100.0 * part / whole.max(f64::MIN_POSITIVE) {
        percent if percent < 0.05 => "<0.1\u{a0}%".to_owned(),
        percent if percent < 9.95 => format!("{percent:.1}\u{a0}%"),
        percent => format!("{percent:.0}\u{a0}%"),
    }
}

/// Returns the display name of a metric.
pub(super) fn label(metric: Metric) -> String {
    let name = metric.name();
    match metric {
        Metric::Phase(_) => name.replace('_', " "),
        Metric::Part(..) => name.split('.').next_back().unwrap_or_default().replace('_', " "),
        Metric::ClientTtft => "TTFT".to_owned(),
        _ => name.replacen("t_", "T_", 1),
    }
}

/// Returns the CSS colour of a phase, or of the phase of a part.
pub(super) fn colour(name: &str) -> String {
    let phase = name.split('.').next().unwrap_or_default();
    format!("var(--phase-{})", phase.replace('_', "-"))
}

/// Returns about five round tick positions from 0 to `whole_ms`; above 75 s, multiples of clock units.
pub(super) fn ticks(whole_ms: f64) -> Vec<f64> {
    const CLOCK_STEPS_MS: [f64; 10] =
        [15e3, 30e3, 60e3, 120e3, 300e3, 600e3, 1800e3, 3600e3, 7200e3, 21_600e3];
    let rough = (whole_ms / 5.0).max(1e-3);
    let power = 10f64.powf(rough.log10().floor());
    let round = || [1.0, 2.0, 5.0].into_iter().map(|digit| digit * power).find(|step| *step >= rough);
    let of_clock = || CLOCK_STEPS_MS.into_iter().find(|step| *step >= rough);
    let step = if whole_ms > 75e3 { of_clock().unwrap_or(86_400e3) } else { round().unwrap_or(10.0 * power) };
    (0..).map(|mark| f64::from(mark) * step).take_while(|at| *at <= whole_ms * 1.0001).take(64).collect()
}

/// Formats the label of a tick.
pub(super) fn tick_label(ms: f64) -> String {
    let digits = |value: f64| {
        let text = format!("{value:.2}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match ms {
        0.0 => "0".to_owned(),
        ms if ms < 1e3 => format!("{} ms", digits(ms)),
        ms if ms < 60e3 => format!("{} s", digits(ms / 1e3)),
        ms if ms % 60e3 == 0.0 => format!("{:.0} min", ms / 60e3),
        ms => format!("{:.0}:{:02.0} min", (ms / 60e3).floor(), ms % 60e3 / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers() {
        let words = |whole| ticks(whole).into_iter().map(tick_label).collect::<Vec<_>>().join(", ");
        assert_eq!(words(350.0), "0, 100 ms, 200 ms, 300 ms");
        assert_eq!(words(4_200.0), "0, 1 s, 2 s, 3 s, 4 s");
        assert_eq!(words(95_000.0), "0, 30 s, 1 min, 1:30 min");
        assert_eq!(words(0.9), "0, 0.2 ms, 0.4 ms, 0.6 ms, 0.8 ms");
        assert_eq!(ticks(0.0).len(), 1);
    }
}
