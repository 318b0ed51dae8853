//! Formatting of numbers and paragraphs.

use std::fmt::Write as _;

use crate::domain::Period;

/// Line width of paragraphs, in characters.
const MAX_LINE_CHARS: usize = 110;

/// Adds a wrapped list item.
pub(in super::super) fn item(text: &mut String, words: &str) {
    paragraph(text, "  - ", "    ", words);
}

pub(in super::super) fn paragraph(text: &mut String, first: &str, further: &str, words: &str) {
    let mut line = first.to_owned();
    let mut is_empty = true;
    for word in words.split(' ') {
        if !is_empty && line.chars().count() + 1 + word.chars().count() > MAX_LINE_CHARS {
            let _ = writeln!(text, "{line}");
            further.clone_into(&mut line);
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(word);
        is_empty = false;
    }
    let _ = writeln!(text, "{line}");
}

/// Formats a time as in the configuration.
pub(in super::super) fn period(ms: u64) -> String {
    Period::from_millis(ms).to_string().replace(' ', "")
}

/// Formats a wait with up to two units.
pub(in super::super) fn wait(ms: Option<u64>) -> String {
    match ms {
        None => "∞".into(),
        Some(0) => "0".into(),
        Some(ms @ 1..1_000) => format!("{ms} ms"),
        Some(ms @ 1_000..60_000) => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        Some(ms @ 60_000..3_600_000) => format!("{}m {:02}s", ms / 60_000, ms / 1_000 % 60),
        Some(ms) => format!("{}h {:02}m", ms / 3_600_000, ms / 60_000 % 60),
    }
}

/// Summarizes sorted samples.
pub(in super::super) fn samples(sorted: &[u64]) -> String {
    let at = |share: f64| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to their number")]
        let rank = (share * sorted.len() as f64).ceil() as usize;
        wait(sorted.get(rank.max(1) - 1).copied())
    };
    match (sorted.first(), sorted.last()) {
        (Some(first), Some(last)) if first == last => wait(Some(*first)),
        _ => format!("median {}, p90 {}, maximum {}", at(0.5), at(0.9), at(1.0)),
    }
}

pub(in super::super) fn days(days: f64) -> String {
    if days < 1.5 { format!("{:.1} hours", days * 24.0) } else { format!("{:.0} days", days) }
}

pub(in super::super) fn percent(share: f64) -> String {
    match share * 100.0 {
        0.0 => "0".into(),
        percent if percent < 0.01 => "<0.01 %".into(),
        percent if percent < 0.1 => format!("{percent:.2} %"),
        percent if percent < 10.0 => format!("{percent:.1} %"),
        percent => format!("{percent:.0} %"),
    }
}

pub(in super::super) fn share(part: f64, all: f64) -> String {
    percent(part / all.max(f64::MIN_POSITIVE))
}

pub(in super::super) fn signed(share: f64) -> String {
    let rounded = (share * 100.0).round();
    if rounded == 0.0 { "0".into() } else { format!("{rounded:.0} %") }
}

/// Formats a number with one decimal below 10, else as an integer.
pub(in super::super) fn number(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.1}"),
        value => thousands(value.round() as usize),
    }
}

pub(in super::super) fn money(value: f64) -> String {
    if value < 100.0 { format!("{value:.2}") } else { thousands(value.round() as usize) }
}

pub(in super::super) fn thousands(count: usize) -> String {
    let digits = count.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}
