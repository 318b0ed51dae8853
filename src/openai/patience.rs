//! Maximum wait of a client: stated in a header, or implied by its SDK.

use std::time::Duration;

use http::{HeaderMap, HeaderName};
use thiserror::Error;

use crate::domain::Period;

/// Request header that bounds the wait: seconds, or a duration such as `5m`; `0` disables waiting.
pub const MAX_WAIT: HeaderName = HeaderName::from_static("x-anteroom-max-wait");

/// Maximum wait of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientTimeouts {
    /// Total wait, from `x-anteroom-max-wait`.
    pub total: Option<Duration>,
    /// Wait between two bytes, from the SDK's timeout.
    pub silence: Option<Duration>,
}

/// Invalid value of `x-anteroom-max-wait`.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("x-anteroom-max-wait: \"{0}\" is not a number of seconds or a duration such as 90s or 5m.")]
pub struct InvalidMaxWait(String);

impl ClientTimeouts {
    /// Reads the headers of a request.
    ///
    /// openai-python sends its read timeout in seconds as `x-stainless-read-timeout`; openai-node sends the timeout of
    /// the request, if set, as `x-stainless-timeout`, and undici below it times out after 300 s without a response
    /// head.
    ///
    /// # Errors
    ///
    /// If `x-anteroom-max-wait` is invalid: a guess would wait too long or too short.
    pub fn of(headers: &HeaderMap) -> Result<Self, InvalidMaxWait> {
        const UNDICI_HEAD_TIMEOUT: Duration = Duration::from_secs(300);
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
        let stated = ["x-stainless-read-timeout", "x-stainless-timeout"]
            .into_iter()
            .filter_map(header)
            .filter_map(|text| seconds(text.trim()))
            .filter(|stated| !stated.is_zero())
            .min();
        let is_node = header("x-stainless-lang") == Some("js");
        let silence = match (stated, is_node) {
            (Some(stated), true) => Some(stated.min(UNDICI_HEAD_TIMEOUT)),
            (None, true) => Some(UNDICI_HEAD_TIMEOUT),
            (stated, false) => stated,
        };
        Ok(Self { total, silence })
    }

    /// Returns whether the request may be held at all.
    pub fn may_wait(&self) -> bool {
        self.total != Some(Duration::ZERO)
    }

    /// Returns the tolerated silence less a margin for the response to arrive: a quarter of it, at most 2 s.
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

    fn of(pairs: &[(&'static str, &str)]) -> Result<ClientTimeouts, InvalidMaxWait> {
        ClientTimeouts::of(
            &pairs.iter().map(|(k, v)| (HeaderName::from_static(k), v.parse().unwrap())).collect(),
        )
    }

    #[test]
    fn max_wait_is_seconds_or_a_duration() {
        for (text, expected) in [("0", 0), ("90", 90), ("90s", 90), ("5m", 300)] {
            let patience = of(&[("x-anteroom-max-wait", text)]).unwrap();
            assert_eq!(patience.total, Some(Duration::from_secs(expected)), "{text}");
        }
        for text in ["", "soon", "-1", "NaN", "1e99"] {
            assert!(of(&[("x-anteroom-max-wait", text)]).is_err(), "{text}");
        }
    }

    #[test]
    fn silence_follows_from_sdk_headers() {
        let python = of(&[("x-stainless-lang", "python"), ("x-stainless-read-timeout", "600")]).unwrap();
        assert_eq!(python.silence, Some(Duration::from_secs(600)));
        assert_eq!(python.safe_silence(), Some(Duration::from_secs(598)));
        assert_eq!(of(&[("x-stainless-lang", "js")]).unwrap().silence, Some(Duration::from_secs(300)));
        let node = of(&[("x-stainless-lang", "js"), ("x-stainless-timeout", "20")]).unwrap();
        assert_eq!(node.silence, Some(Duration::from_secs(20)));
        assert_eq!(of(&[]).unwrap(), ClientTimeouts::default());
        let brief = of(&[("x-stainless-read-timeout", "2")]).unwrap();
        assert_eq!(brief.safe_silence(), Some(Duration::from_millis(1500)), "2 s less a quarter");
    }
}
