//! Reasons of failures, in full for operators and redacted for clients.

use std::{borrow::Cow, fmt, net::IpAddr, ops::Deref, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::mask_secrets;

/// Reason why a target is unavailable. Secrets are masked on construction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// Text without output of the model server.
    brief: Arc<str>,
    /// Text with output of the model server; often the same as `brief`.
    full: Arc<str>,
}

/// Detail of failure messages sent to clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Failure {
    /// Level of detail.
    pub detail: FailureDetail,
}

/// Level of detail of failure messages sent to clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum FailureDetail {
    /// The reason, without output of the model server and addresses of endpoints. Both are in the log, the admin API
    /// and Kubernetes Events.
    #[default]
    Short,
    /// Everything. Choose it only if every client may read the model server's output.
    Full,
}

// === impl Reason ===

impl Reason {
    /// Creates a reason whose `full` text has output of the model server that `brief` leaves out.
    pub fn with_output(brief: &str, full: &str) -> Self {
        Self { brief: mask_secrets(brief).into(), full: mask_secrets(full).into() }
    }

    /// Returns the text without output of the model server.
    pub fn brief(&self) -> &Arc<str> {
        &self.brief
    }

    /// Returns the text with output of the model server.
    pub fn full(&self) -> &Arc<str> {
        &self.full
    }

    /// Returns whether the full text has output of the model server.
    pub fn has_output(&self) -> bool {
        self.brief != self.full
    }

    /// Applies `put` to both texts.
    pub fn map(&self, put: impl Fn(&str) -> String) -> Self {
        Self::with_output(&put(&self.brief), &put(&self.full))
    }

    /// Redacts the reason for clients.
    pub fn for_client(&self, detail: FailureDetail) -> Self {
        match detail {
            FailureDetail::Full => self.clone(),
            FailureDetail::Short => withhold_addresses(&self.brief).into(),
        }
    }
}

impl From<Cow<'_, str>> for Reason {
    fn from(text: Cow<'_, str>) -> Self {
        let text: Arc<str> = mask_secrets(&text).into();
        Self { brief: text.clone(), full: text }
    }
}

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        Cow::Borrowed(text).into()
    }
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Cow::<str>::Owned(text).into()
    }
}

impl Deref for Reason {
    type Target = str;

    fn deref(&self) -> &str {
        &self.full
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.full)
    }
}

/// Replaces addresses and URLs, so that clients learn nothing about the network behind the proxy.
pub fn withhold_addresses(text: &str) -> Cow<'_, str> {
    const WITHHELD: &str = "the endpoint";
    let is_edge = |char: char| char.is_whitespace() || "\"'`()<>,;".contains(char);
    let mut kept = String::new();
    let mut copied = 0;
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let end = at + rest.find(is_edge).unwrap_or(rest.len());
        let word = text[at..end].trim_end_matches([':', '.', '!', '?']);
        if is_address(word) {
            kept.push_str(&text[copied..at]);
            kept.push_str(WITHHELD);
            copied = at + word.len();
        }
        at = end + text[end..].chars().next().map_or(1, char::len_utf8);
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    kept.push_str(&text[copied..]);
    Cow::Owned(kept)
}

/// Returns whether a word is a URL, an address, or a name with a port.
fn is_address(word: &str) -> bool {
    if word.contains("://") {
        return true;
    }
    let plain = |host: &str| host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok();
    let Some((host, port)) = word.rsplit_once(':') else { return plain(word) };
    let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let is_name = host.bytes().all(is_of_name) && host.bytes().any(|byte| byte.is_ascii_alphabetic());
    plain(word) || (port.parse::<u16>().is_ok() && (is_name || plain(host)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_withheld_and_nothing_else() {
        for (text, expected) in [
            (
                "Nothing listens at 127.0.0.1:8000 (connection refused)",
                "Nothing listens at the endpoint (connection refused)",
            ),
            ("[fd00::1]:8000 broke off", "the endpoint broke off"),
            ("cannot connect to 10.1.2.3:80: refused", "cannot connect to the endpoint: refused"),
            ("a gateway (http://user:pass@envoy.llm:80/v1), then", "a gateway (the endpoint), then"),
            ("`vllm.llm.svc:8000`, fd00::7 and 10.0.0.1.", "`the endpoint`, the endpoint and the endpoint."),
        ] {
            assert_eq!(withhold_addresses(text), expected);
        }
        for text in [
            "the command exited with code 1 while loading",
            "Pod `llm/chat-x2k9p` cannot have its image `registry.example:5000/vllm:v0.9.1` (ErrImagePull)",
            "/health answers 404: is `readiness.path` right?",
            "`models/tiny` failed: after 12:30, 3.5 s; ü",
            "",
        ] {
            assert!(matches!(withhold_addresses(text), Cow::Borrowed(_)), "{text}");
        }
    }
}
