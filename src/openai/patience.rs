//! How long a client will wait: what it says, and what its SDK does.

use std::time::Duration;

use http::{HeaderMap, HeaderName};
use thiserror::Error;

use crate::domain::Period;

/// The request header by which a client bounds its wait: seconds, or a duration such as `5m`; `0` means not at all.
pub const MAX_WAIT: HeaderName = HeaderName::from_static("x-anteroom-max-wait");

/// How long a client will wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Patience {
    /// In all, as `x-anteroom-max-wait` says.
    pub total: Option<Duration>,
    /// Without receiving a byte, as its SDK says.
    pub silence: Option<Duration>,
}

/// `x-anteroom-max-wait` is not a duration.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("x-anteroom-max-wait: \"{0}\" is neither a number of seconds nor a duration such as 90s or 5m.")]
pub struct InvalidMaxWait(String);

impl Patience {
    /// Reads the headers of a request.
    ///
    /// openai-python tells its read time-out (seconds) in `x-stainless-read-timeout`. openai-node tells the one of
    /// the request in `x-stainless-timeout`, when set; undici below it gives up after 300 s without a head.
    ///
    /// # Errors
    /// When `x-anteroom-max-wait` cannot be read: guessing would wait too long or not long enough.
    pub fn of(headers: &HeaderMap) -> Result<Self, InvalidMaxWait> {
        const UNDICI: Duration = Duration::from_secs(300);
        let total =
            match headers.get(MAX_WAIT) {
                None => None,
                Some(value) => {
                    let text = value.to_str().map(str::trim).unwrap_or_default();
                    Some(seconds(text).or_else(|| text.parse().ok().map(Period::get)).ok_or_else(|| {
                        InvalidMaxWait(String::from_utf8_lossy(value.as_bytes()).into_owned())
                    })?)
                }
            };
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let told = ["x-stainless-read-timeout", "x-stainless-timeout"]
            .into_iter()
            .filter_map(header)
            .filter_map(|text| seconds(text.trim()))
            .filter(|told| !told.is_zero())
            .min();
        let node = header("x-stainless-lang") == Some("js");
        let silence = match (told, node) {
            (Some(told), true) => Some(told.min(UNDICI)),
            (None, true) => Some(UNDICI),
            (told, false) => told,
        };
        Ok(Self { total, silence })
    }

    /// Whether it waits at all.
    pub fn may_wait(&self) -> bool {
        self.total != Some(Duration::ZERO)
    }

    /// The silence that the client will bear, less what the answer needs to get there: a quarter, at most 2 s.
    pub fn safe_silence(&self) -> Option<Duration> {
        self.silence.map(|silence| silence - (silence / 4).min(Duration::from_secs(2)))
    }
}

fn seconds(text: &str) -> Option<Duration> {
    text.parse().ok().and_then(|seconds: f64| Duration::try_from_secs_f64(seconds).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&'static str, &str)]) -> Result<Patience, InvalidMaxWait> {
        Patience::of(&pairs.iter().map(|(k, v)| (HeaderName::from_static(k), v.parse().unwrap())).collect())
    }

    #[test]
    fn the_header_is_seconds_or_a_duration() {
        for (text, expected) in [("0", 0), ("90", 90), ("90s", 90), ("5m", 300)] {
            let patience = of(&[("x-anteroom-max-wait", text)]).unwrap();
            assert_eq!(patience.total, Some(Duration::from_secs(expected)), "{text}");
        }
        for text in ["", "soon", "-1", "NaN", "1e99"] {
            assert!(of(&[("x-anteroom-max-wait", text)]).is_err(), "{text}");
        }
    }

    #[test]
    fn sdks_say_how_long_they_bear_silence() {
        let python = of(&[("x-stainless-lang", "python"), ("x-stainless-read-timeout", "600")]).unwrap();
        assert_eq!(python.silence, Some(Duration::from_secs(600)));
        assert_eq!(python.safe_silence(), Some(Duration::from_secs(598)));
        assert_eq!(of(&[("x-stainless-lang", "js")]).unwrap().silence, Some(Duration::from_secs(300)));
        let node = of(&[("x-stainless-lang", "js"), ("x-stainless-timeout", "20")]).unwrap();
        assert_eq!(node.silence, Some(Duration::from_secs(20)));
        assert_eq!(of(&[]).unwrap(), Patience::default());
        let brief = of(&[("x-stainless-read-timeout", "2")]).unwrap();
        assert_eq!(brief.safe_silence(), Some(Duration::from_millis(1500)), "2 s less a quarter");
    }
}
