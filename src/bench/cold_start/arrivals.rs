//! Arrival patterns of a burst.

use std::{path::PathBuf, str::FromStr, time::Duration};

/// Arrival pattern of the requests of a burst.
#[derive(Clone, Debug, PartialEq)]
pub enum Arrivals {
    /// All at the same time.
    Together,
    /// Evenly over this time, from its start to its end inclusive.
    Spread(Duration),
    /// Poisson process with this rate per second.
    Poisson(f64),
    /// Times from a file, one per line, in seconds.
    File(PathBuf),
}

// === impl Arrivals ===

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "together" => Ok(Self::Together),
            Some(("spread", time)) => Ok(Self::Spread(time.parse::<crate::domain::Period>()?.get())),
            Some(("poisson", rate)) => match rate.trim_end_matches("/s").parse() {
                Ok(rate) if rate > 0.0 && f64::is_finite(rate) => Ok(Self::Poisson(rate)),
                _ => Err(format!("poisson={rate}: expected a rate in requests per second above 0, such as poisson=2.5")),
            },
            _ if text.contains(['/', '.']) => Ok(Self::File(text.into())),
            _ => Err("expected together, spread=2s, poisson=2.5 (requests per second), or a file with one time in \
                      seconds per line"
                .to_owned()),
        }
    }
}

impl Arrivals {
    /// Returns the pattern as on the command line; `file` for any file.
    pub(super) fn pattern(&self) -> String {
        match self {
            Self::Together => "together".to_owned(),
            Self::Spread(time) => format!("spread={}", humantime::format_duration(*time)),
            Self::Poisson(rate) => format!("poisson={rate}"),
            Self::File(_) => "file".to_owned(),
        }
    }

    /// Returns the send times of `count` requests, relative to the first. `file` is the output of [`times`].
    pub(super) fn offsets(
        &self,
        count: usize,
        file: &[Duration],
        random: &mut fastrand::Rng,
    ) -> Vec<Duration> {
        match self {
            Self::Together => vec![Duration::ZERO; count],
            Self::Spread(time) => {
                let gaps = u32::try_from(count.saturating_sub(1)).unwrap_or(u32::MAX).max(1);
                (0..count).map(|place| *time * u32::try_from(place).unwrap_or(u32::MAX) / gaps).collect()
            }
            Self::Poisson(rate) => {
                let mut at = 0.0;
                let mut next = |place| {
                    // `1 - f64()` is in (0, 1]: its logarithm is finite.
                    at += if place == 0 { 0.0 } else { -(1.0 - random.f64()).ln() / rate };
                    Duration::from_secs_f64(at)
                };
                (0..count).map(&mut next).collect()
            }
            Self::File(_) => file.iter().take(count).copied().collect(),
        }
    }
}

/// Parses a file of arrival times, which become relative to the first.
///
/// # Errors
/// Names the line.
pub(super) fn times(text: &str) -> Result<Vec<Duration>, String> {
    let mut times: Vec<f64> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let number = number + 1;
        let time = line.parse::<f64>().ok().filter(|time| *time >= 0.0 && *time < 1e6);
        let time =
            time.ok_or_else(|| format!("line {number}: \"{line}\" is not a non-negative time in seconds"))?;
        if times.last().is_some_and(|last| *last > time) {
            return Err(format!("line {number}: {time} comes before the time above it; sort the file"));
        }
        times.push(time);
    }
    let first = *times.first().ok_or("the file contains no times; write one per line, in seconds")?;
    Ok(times.iter().map(|time| Duration::from_secs_f64(time - first)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offsets(text: &str, count: usize) -> Vec<u128> {
        let mut random = fastrand::Rng::with_seed(7);
        let offsets = text.parse::<Arrivals>().unwrap().offsets(count, &[], &mut random);
        offsets.iter().map(Duration::as_millis).collect()
    }

    #[test]
    fn offsets_follow_the_pattern() {
        assert_eq!(offsets("together", 3), [0, 0, 0]);
        assert_eq!(offsets("spread=2s", 5), [0, 500, 1000, 1500, 2000]);
        assert_eq!(offsets("spread=2s", 1), [0]);
        let many = offsets("poisson=10", 10_001);
        assert_eq!(many[0], 0);
        assert!(many.is_sorted());
        // 10,000 gaps with a mean of 100 ms: 1000 s, standard deviation 10 s.
        assert!((950_000..1_050_000).contains(&many[10_000]), "{}", many[10_000]);
        assert_eq!(offsets("poisson=10", 3), offsets("poisson=10", 3));
    }

    #[test]
    fn invalid_pattern_error_shows_a_valid_one() {
        for text in ["sometimes", "spread=2", "poisson=0", "poisson=x", "poisson=inf", "all=1"] {
            let error = text.parse::<Arrivals>().unwrap_err();
            assert!(error.contains("expected") || error.contains("such as"), "{text}: {error}");
        }
        assert_eq!("./a.txt".parse(), Ok(Arrivals::File("./a.txt".into())));
    }

    #[test]
    fn times_of_a_file_start_at_zero() {
        let ms = |text| times(text).map(|times| times.iter().map(Duration::as_millis).collect::<Vec<_>>());
        assert_eq!(ms("# a log\n10.5\n\n10.75 # the second\n12\n").unwrap(), [0, 250, 1500]);
        assert!(ms("1\nx\n").unwrap_err().starts_with("line 2: \"x\""));
        assert!(ms("2\n1\n").unwrap_err().contains("sort"));
        assert!(ms("-1\n").unwrap_err().contains("line 1"));
        assert!(ms("# nothing\n").unwrap_err().contains("no times"));
    }
}
