//! References to environment variables in values of the file: `${env:NAME}`.

use std::env::{self, VarError};

const OPENING: &str = "${env:";

/// A value of the file with references to variables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Expansion {
    /// Text with the values of the variables.
    pub(super) value: String,
    /// Text with the references, for messages and summaries: variables may be secrets.
    pub(super) shown: String,
    /// References, each with the value of its variable.
    variables: Vec<(String, String)>,
}

/// Replaces the references in a text. `$${env:` stands for the text `${env:`. Values are not expanded again.
///
/// # Errors
///
/// A message with a remedy, if a reference is malformed or its variable is not set.
pub(super) fn expand(text: &str) -> Result<Expansion, String> {
    let mut expansion = Expansion::default();
    let mut rest = text;
    while let Some(at) = rest.find(OPENING) {
        let (before, reference) = rest.split_at(at);
        if let Some(before) = before.strip_suffix('$') {
            expansion.push_text(before);
            expansion.push_text(OPENING);
            rest = &reference[OPENING.len()..];
            continue;
        }
        expansion.push_text(before);
        let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let (name, after) = reference[OPENING.len()..]
            .split_once('}')
            .filter(|(name, _)| !name.is_empty() && name.bytes().all(is_of_name))
            .ok_or(
                "`${env:` begins no reference to a variable; write ${env:NAME}, or $${env: for the text",
            )?;
        let value = env::var(name).map_err(|error| match error {
            VarError::NotPresent => {
                format!("the environment variable {name} is not set; set it, or write $${{env: for the text")
            }
            VarError::NotUnicode(_) => format!("the environment variable {name} is not valid UTF-8"),
        })?;
        expansion.value.push_str(&value);
        let reference = format!("{OPENING}{name}}}");
        expansion.shown.push_str(&reference);
        expansion.variables.push((reference, value));
        rest = after;
    }
    expansion.push_text(rest);
    Ok(expansion)
}

/// Returns whether the text has a reference, or one that is escaped.
pub(super) fn has_reference(text: &str) -> bool {
    text.contains(OPENING)
}

/// Returns the first reference in shell syntax, which the proxy does not expand: `$NAME`, `${NAME}` or `~/`, each
/// with the text to write instead. Names in lower case are left alone: they are more often parts of passwords.
pub(super) fn shell_reference(text: &str) -> Option<(String, String)> {
    let home = text.starts_with("~/") || text.contains("=~/") || text == "~";
    if home {
        return Some(("~".to_owned(), "${env:HOME}".to_owned()));
    }
    text.match_indices('$').find_map(|(at, _)| {
        let rest = &text[at + 1..];
        let braced = rest.strip_prefix('{');
        let name = braced.unwrap_or(rest);
        let is_of_name = |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b'_';
        let name = &name[..name.bytes().take_while(is_of_name).count()];
        let is_name = name.bytes().next().is_some_and(|byte| !byte.is_ascii_digit());
        let written = if braced.is_some() { format!("${{{name}}}") } else { format!("${name}") };
        (is_name && text[at..].starts_with(&written)).then(|| (written, format!("${{env:{name}}}")))
    })
}

// === impl Expansion ===

impl Expansion {
    fn push_text(&mut self, text: &str) {
        self.value.push_str(text);
        self.shown.push_str(text);
    }

    /// Replaces the whole value, and values of variables, in a message. A short value within a longer word is not
    /// replaced, since it is likely there by chance.
    pub(super) fn mask(&self, message: &str) -> String {
        const MIN_SECRET_BYTES: usize = 6;
        let whole = (&self.shown, &self.value);
        let variables = self.variables.iter().map(|(reference, value)| (reference, value));
        let mut masked = message.to_owned();
        for (reference, value) in [whole].into_iter().chain(variables).filter(|(_, value)| !value.is_empty())
        {
            let mut text = String::new();
            let mut rest = &masked[..];
            while let Some(at) = rest.find(value.as_str()) {
                let (before, after) = (&rest[..at], &rest[at + value.len()..]);
                let joins = |character: Option<char>| character.is_some_and(char::is_alphanumeric);
                let before_is_word = joins(before.chars().next_back().or_else(|| text.chars().next_back()));
                let within_word = before_is_word || joins(after.chars().next());
                text.push_str(before);
                text.push_str(if within_word && value.len() < MIN_SECRET_BYTES { value } else { reference });
                rest = after;
            }
            text.push_str(rest);
            masked = text;
        }
        masked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cargo sets this variable for tests.
    const NAME: &str = "CARGO_PKG_NAME";

    #[test]
    fn references_are_expanded_and_shown() {
        let expansion = expand("a-${env:CARGO_PKG_NAME}:$HOME ${env:CARGO_PKG_NAME}$${env:X} $$").unwrap();
        assert_eq!(expansion.value, "a-anteroom:$HOME anteroom${env:X} $$");
        assert_eq!(expansion.shown, "a-${env:CARGO_PKG_NAME}:$HOME ${env:CARGO_PKG_NAME}${env:X} $$");
        assert_eq!(env::var(NAME).unwrap(), "anteroom");
        for (text, part) in [
            ("${env:ANTEROOM_TEST_UNSET}", "ANTEROOM_TEST_UNSET is not set"),
            ("${env:}", "write ${env:NAME}"),
            ("${env:A-B}", "write ${env:NAME}"),
            ("${env:A", "write ${env:NAME}"),
        ] {
            assert!(expand(text).unwrap_err().contains(part), "{text}");
        }
    }

    #[test]
    fn values_are_masked_in_messages() {
        let expansion = expand("http://${env:CARGO_PKG_NAME}").unwrap();
        let masked = expansion.mask("\"http://anteroom\" or xanteroomx");
        assert_eq!(masked, "\"http://${env:CARGO_PKG_NAME}\" or x${env:CARGO_PKG_NAME}x");
    }

    #[test]
    fn shell_references_are_found() {
        for (text, found) in [
            ("$HOME/models", Some("$HOME")),
            ("--model=${MODEL_DIR}/x", Some("${MODEL_DIR}")),
            ("~/models", Some("~")),
            ("--model=~/models", Some("~")),
            ("pa$$word", None),
            ("${env:HOME}/x", None),
            ("$5 ${} $", None),
            ("a~/b", None),
        ] {
            assert_eq!(shell_reference(text).map(|(written, _)| written).as_deref(), found, "{text}");
        }
    }
}
