//! Go durations, as used by the Kubernetes API: `300ms`, `1h30m`, `1.5s`.

use std::time::Duration;

/// Parses a non-negative duration, truncated to nanoseconds. Returns `None` if the text is invalid or negative.
pub(super) fn parse(text: &str) -> Option<Duration> {
    let text = text.strip_prefix('+').unwrap_or(text);
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut sum = None;
    while !rest.is_empty() {
        let end = rest.find(|character: char| !character.is_ascii_digit() && character != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        let (nanoseconds, length) = unit(&rest[end..])?;
        let part = Duration::try_from_secs_f64(number * nanoseconds / 1e9).ok()?;
        sum = Some(sum.unwrap_or(Duration::ZERO).checked_add(part)?);
        rest = &rest[end + length..];
    }
    sum
}

/// Returns the leading unit in nanoseconds, and its length in bytes. Longer names precede their prefixes.
fn unit(text: &str) -> Option<(f64, usize)> {
    const GO_DURATION_UNITS: [(&str, f64); 8] = [
        ("ns", 1.0),
        ("us", 1e3),
        ("\u{b5}s", 1e3),
        ("\u{3bc}s", 1e3),
        ("ms", 1e6),
        ("s", 1e9),
        ("m", 60e9),
        ("h", 3600e9),
    ];
    GO_DURATION_UNITS
        .into_iter()
        .find(|(name, _)| text.starts_with(name))
        .map(|(name, size)| (size, name.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_parse_as_in_go() {
        for (text, milliseconds) in [
            ("0", 0.0),
            ("0s", 0.0),
            ("300ms", 300.0),
            ("1m", 60_000.0),
            ("1m0s", 60_000.0),
            ("1h30m", 5_400_000.0),
            ("1.5s", 1500.0),
            ("2us", 0.002),
            ("+2\u{b5}s", 0.002),
        ] {
            assert_eq!(parse(text), Some(Duration::from_nanos((milliseconds * 1e6) as u64)), "{text}");
        }
        for text in ["", "5", "-5s", "s", "1..5s", "5 s", "5d", "1e3s", "9999999999999999999999h"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
