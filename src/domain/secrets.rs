//! Masking of secrets in texts from outside, before they are logged or shown.

use std::borrow::Cow;

/// Replacement of a secret.
const MASK: &str = "…";

/// Prefixes of well-known tokens, each with the minimum number of characters after it.
const SECRET_TOKEN_PREFIXES: &[(&str, usize)] = &[
    ("sk-", 8),
    ("hf_", 8),
    ("AKIA", 8),
    ("ASIA", 8),
    ("ghp_", 8),
    ("github_pat_", 8),
    ("glpat-", 8),
    ("nvapi-", 8),
    ("AIza", 16),
    ("xoxb-", 8),
];

/// Suffixes of names whose values are secrets, in lower case.
const SECRET_NAME_SUFFIXES: &[&str] = &[
    "token",
    "apikey",
    "api-key",
    "api_key",
    "access-key",
    "access_key",
    "secret-key",
    "secret_key",
    "secret",
    "password",
    "passwd",
    "authorization",
];

/// Words before `token` that mark a token of a vocabulary rather than a secret.
const VOCABULARY_WORDS: &[&str] =
    &["bos", "eos", "pad", "unk", "sep", "cls", "mask", "stop", "special", "image", "per"];

/// Masks tokens, keys and passwords, recognized by their prefix (`hf_…`, `sk-…`, `AKIA…`), by the word before them
/// (`Bearer …`), by the name they are assigned to (`--api-key …`, `token=…`, `"password": "…"`), or as the credentials
/// of a URL.
pub fn mask_secrets(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let mut masked = String::new();
    let mut copied = 0;
    let mut at = 0;
    while at < bytes.len() {
        let begins_word = is_of_word(bytes[at]) && (at == 0 || !is_of_word(bytes[at - 1]));
        match begins_word.then(|| secret_at(bytes, at)).flatten() {
            Some((from, to)) => {
                masked.push_str(&text[copied..from]);
                masked.push_str(MASK);
                (copied, at) = (to, to);
            }
            None => at += 1,
        }
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    masked.push_str(&text[copied..]);
    Cow::Owned(masked)
}

/// Masks secrets in a command line, as [`mask_secrets`] does in a text. A secret may contain spaces here, and a flag may
/// have several.
pub fn mask_command(words: &[String]) -> String {
    let mut follows_name = false;
    let masked = words.iter().map(|word| {
        if follows_name && !word.starts_with('-') {
            return Cow::Borrowed(MASK);
        }
        let (name, value) = word.split_once('=').map_or((&**word, None), |(name, value)| (name, Some(value)));
        let is_secret = secret_name(name.as_bytes()).is_some();
        follows_name = is_secret && value.is_none() && word.starts_with("--");
        if is_secret && value.is_some() { format!("{name}={MASK}").into() } else { mask_secrets(word) }
    });
    masked.collect::<Vec<_>>().join(" ")
}

/// Returns the suffix that marks the name of a secret.
fn secret_name(word: &[u8]) -> Option<&'static str> {
    let name = word.to_ascii_lowercase();
    let Some(known) = SECRET_NAME_SUFFIXES.iter().find(|known| name.ends_with(known.as_bytes())) else {
        // Names in lower case are ignored here: they mostly are keys of caches and databases.
        let is_variable = word.iter().all(|byte| !byte.is_ascii_lowercase());
        return (is_variable && (word == b"KEY" || word.ends_with(b"_KEY"))).then_some("key");
    };
    let before = name[..name.len() - known.len()].strip_suffix(b"_").unwrap_or_default();
    (!VOCABULARY_WORDS.iter().any(|of| before.ends_with(of.as_bytes()))).then_some(*known)
}

/// Returns the range of the secret that the word at `at` is or introduces.
fn secret_at(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let end = run(bytes, at, is_of_word);
    let word = &bytes[at..end];
    for (prefix, least) in SECRET_TOKEN_PREFIXES {
        if let Some(rest) = word.strip_prefix(prefix.as_bytes())
            && rest.len() >= *least
            && (*prefix != "hf_" || looks_random(rest))
        {
            return Some((at + prefix.len(), end));
        }
    }
    if bytes[end..].starts_with(b"://") {
        let from = end + 3;
        let to = run(bytes, from, |byte| !byte.is_ascii_whitespace() && !b"/\"'<>".contains(&byte));
        let user = bytes[from..to].iter().rposition(|byte| *byte == b'@')?;
        return Some((from, from + user));
    }
    if word.eq_ignore_ascii_case(b"bearer") {
        return value(bytes, run(bytes, end, |byte| byte == b' '), 8).filter(|(from, _)| *from > end);
    }
    let known = secret_name(word)?;
    // A closing quote, then the separator between name and value.
    let quoted = matches!(bytes.get(end), Some(b'"' | b'\''));
    let after = end + usize::from(quoted);
    let sign = run(bytes, after, |byte| byte == b' ');
    let from = match bytes.get(sign) {
        Some(b'=') => sign + 1,
        // In prose, a colon after such a word may introduce anything.
        Some(b':') if quoted || word.len() > known.len() || matches!(known, "password" | "authorization") => {
            sign + 1
        }
        _ if word.starts_with(b"--") && sign > after && bytes.get(sign) != Some(&b'-') => sign,
        // A list of arguments: `'--api-key', 'X'`.
        Some(b',') if word.starts_with(b"--") && quoted => sign + 1,
        _ => return None,
    };
    let from = run(bytes, from, |byte| b" [\"'".contains(&byte));
    let (from, to) = value(bytes, from, 1)?;
    let scheme = bytes[from..to].to_ascii_lowercase();
    if scheme == b"bearer" || scheme == b"basic" {
        return value(bytes, run(bytes, to, |byte| byte == b' '), 1);
    }
    let is_literal = ["none", "null", "true", "false"].iter().any(|word| scheme == word.as_bytes());
    (!is_literal).then_some((from, to))
}

/// Returns the range of the value that begins at `from`, if it has at least `least` bytes and contains no mask.
fn value(bytes: &[u8], from: usize, least: usize) -> Option<(usize, usize)> {
    let to = run(bytes, from, |byte| !byte.is_ascii_whitespace() && !b"\"',;)]}&".contains(&byte));
    let is_masked = bytes[from..to].windows(MASK.len()).any(|part| part == MASK.as_bytes());
    (to - from >= least && !is_masked).then_some((from, to))
}

fn run(bytes: &[u8], from: usize, belongs: impl Fn(u8) -> bool) -> usize {
    bytes[from..].iter().position(|byte| !belongs(*byte)).map_or(bytes.len(), |count| from + count)
}

const fn is_of_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')
}

/// Returns whether the text after `hf_` is a token, unlike in `hf_transfer` or `hf_hub_download`.
fn looks_random(rest: &[u8]) -> bool {
    rest.iter().all(u8::is_ascii_alphanumeric)
        && (rest.len() >= 16 || rest.iter().any(|byte| !byte.is_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn secrets_are_masked() {
        for (text, expected) in [
            ("401 for hf_AbCdEfGhIjKlMnOp0123456789", "401 for hf_…"),
            ("key sk-proj-abcdef_0123, then", "key sk-…, then"),
            ("AWS AKIAIOSFODNN7EXAMPLE.", "AWS AKIA…."),
            ("authorization: Bearer abc.def-123", "authorization: Bearer …"),
            ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic …"),
            ("sent BEARER 0123456789 twice", "sent BEARER … twice"),
            ("vllm serve m --api-key letmein --port 8000", "vllm serve m --api-key … --port 8000"),
            ("vllm serve m --api-key=letmein", "vllm serve m --api-key=…"),
            ("['serve', '--api-key', 'letmein', '--port']", "['serve', '--api-key', '…', '--port']"),
            ("args: {'api_key': ['letmein'], 'x': 1}", "args: {'api_key': ['…'], 'x': 1}"),
            (r#"{"token":"letmein","n":1}"#, r#"{"token":"…","n":1}"#),
            ("GET /x?token=letmein&y=1", "GET /x?token=…&y=1"),
            ("HF_TOKEN=letmein HF_HOME=/x", "HF_TOKEN=… HF_HOME=/x"),
            ("HUGGING_FACE_HUB_TOKEN: letmein", "HUGGING_FACE_HUB_TOKEN: …"),
            ("password: letmein", "password: …"),
            ("KEY=letmein OPENAI_KEY=letmein", "KEY=… OPENAI_KEY=…"),
            ("vllm serve m --hf-token letmein --token=letmein", "vllm serve m --hf-token … --token=…"),
            ("AWS_SECRET_ACCESS_KEY=a/b+c", "AWS_SECRET_ACCESS_KEY=…"),
            ("https://user:letmein@host/x", "https://…@host/x"),
            ("ü token=ü ü", "ü token=… ü"),
            ("Bearer token=a", "Bearer token=…"),
        ] {
            assert_eq!(mask_secrets(text), expected);
        }
    }

    #[test]
    fn secrets_with_spaces_in_commands_are_masked() {
        let words = [
            "a",
            "--api-key",
            "let me",
            "in",
            "--port",
            "1",
            "--token=let me",
            "KEY=let me",
            "-x",
            "sk-012345678",
        ];
        let masked = mask_command(&words.map(str::to_owned));
        assert_eq!(masked, "a --api-key … … --port 1 --token=… KEY=… -x sk-…");
    }

    #[test]
    fn other_words_stay() {
        for text in [
            "hf_transfer and hf_hub_download, hf_overrides={}",
            "sk-learn",
            "unexpected token: '<'",
            "eos_token='</s>', pad_token_id=0, max_tokens=16, tokens: 5",
            "api_key=None, token=null",
            "cache_key=7",
            "--api-key --port 8000",
            "the bearer of news",
            "https://huggingface.co/org/name",
            "Bearer token=…",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        ] {
            assert!(matches!(mask_secrets(text), Cow::Borrowed(_)), "{text}: {}", mask_secrets(text));
        }
    }

    proptest! {
        #[test]
        fn masking_is_idempotent(text in "(token=|Bearer |--api-key |sk-|[a-zA-Z0-9:'\"ü …@/ ]){0,20}") {
            let masked = mask_secrets(&text).into_owned();
            prop_assert_eq!(mask_secrets(&masked), masked.as_str());
        }
    }
}
