//! Pieces of HTML: text that is safe in it, times, axes.

use crate::{bench::samples::Of, terminal::duration};

/// Text as text: nothing in it is taken for HTML, in an element or in an attribute.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            // HTML has no way to write these.
            char if char.is_control() && !char.is_whitespace() => safe.push('\u{fffd}'),
            char => safe.push(char),
        }
    }
    safe
}

/// A template with its `{{name}}`s filled in, in one pass: what is filled in is not looked at.
pub(super) fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut text = String::with_capacity(template.len() * 2);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        text.push_str(before);
        let (name, after) = after.split_once("}}").unwrap_or((after, ""));
        text.push_str(values.iter().find(|(known, _)| *known == name).map_or("", |(_, value)| value));
        rest = after;
    }
    text + rest
}

/// A cell with a time: in words, and exactly, for programs.
pub(super) fn time_cell(ms: f64, class: &str) -> String {
    let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
    format!("<td{class} data-ms=\"{ms}\">{}</td>", nowrap(&duration(ms)))
}

/// A time in words that is never broken.
pub(super) fn time(ms: f64) -> String {
    nowrap(&duration(ms))
}

fn nowrap(text: &str) -> String {
    escape(text).replace(' ', "&nbsp;")
}

/// A share as a coordinate.
pub(super) fn percent(part: f64, whole: f64) -> String {
    format!("{:.3}%", 100.0 * part / whole.max(f64::MIN_POSITIVE))
}

/// A share in words.
pub(super) fn share(part: f64, whole: f64) -> String {
    match 100.0 * part / whole.max(f64::MIN_POSITIVE) {
        percent if percent < 0.05 => "&lt;0.1&nbsp;%".to_owned(),
        percent if percent < 9.95 => format!("{percent:.1}&nbsp;%"),
        percent => format!("{percent:.0}&nbsp;%"),
    }
}

/// What something is called on the page: phases and parts in words, totals as others write them.
pub(super) fn label(of: Of) -> String {
    let name = of.name();
    match of {
        Of::Phase(_) => name.replace('_', " "),
        Of::Part(..) => name.split('.').next_back().unwrap_or_default().replace('_', " "),
        Of::ClientTtft => "TTFT".to_owned(),
        _ => name.replacen("t_", "T_", 1),
    }
}

/// The colour of a phase; of a part, that of its phase.
pub(super) fn colour(name: &str) -> String {
    let phase = name.split('.').next().unwrap_or_default();
    format!("var(--phase-{})", phase.replace('_', "-"))
}

/// Round marks on an axis from 0 to so many milliseconds, about five; above a minute those of clocks.
pub(super) fn ticks(whole_ms: f64) -> Vec<f64> {
    const CLOCK: [f64; 10] = [15e3, 30e3, 60e3, 120e3, 300e3, 600e3, 1800e3, 3600e3, 7200e3, 21_600e3];
    let rough = (whole_ms / 5.0).max(1e-3);
    let power = 10f64.powf(rough.log10().floor());
    let round = || [1.0, 2.0, 5.0].into_iter().map(|digit| digit * power).find(|step| *step >= rough);
    let of_clock = || CLOCK.into_iter().find(|step| *step >= rough);
    let step = if whole_ms > 75e3 { of_clock().unwrap_or(86_400e3) } else { round().unwrap_or(10.0 * power) };
    (0..).map(|mark| f64::from(mark) * step).take_while(|at| *at <= whole_ms * 1.0001).take(64).collect()
}

/// The words at such a mark.
pub(super) fn tick_words(ms: f64) -> String {
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
    fn text_stays_text() {
        assert_eq!(
            escape("<a href=\"x\">'&'</a>\u{7}\n"),
            "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;&lt;/a&gt;\u{fffd}\n"
        );
    }

    #[test]
    fn what_is_filled_in_is_no_template() {
        assert_eq!(fill("<{{a}}|{{b}}|{{c}}>", &[("a", "{{b}}"), ("b", "2")]), "<{{b}}|2|>");
    }

    #[test]
    fn axes_have_round_marks() {
        let words = |whole| ticks(whole).into_iter().map(tick_words).collect::<Vec<_>>().join(", ");
        assert_eq!(words(350.0), "0, 100 ms, 200 ms, 300 ms");
        assert_eq!(words(4_200.0), "0, 1 s, 2 s, 3 s, 4 s");
        assert_eq!(words(95_000.0), "0, 30 s, 1 min, 1:30 min");
        assert_eq!(words(0.9), "0, 0.2 ms, 0.4 ms, 0.6 ms, 0.8 ms");
        assert_eq!(ticks(0.0).len(), 1);
    }
}
