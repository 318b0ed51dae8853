//! The configuration file: errors point into it, and its serialized form parses to the same configuration.

use anteroom::config::{Config, ConfigError, LoadedConfig, Overrides, Problem};

/// Checks an input that is the file.
pub fn holds(file: &[u8]) {
    let Ok(text) = str::from_utf8(file) else { return };
    match LoadedConfig::parse(text, "a.yaml", &Overrides::default()) {
        Err(error) => error_has_position(text, &error),
        Ok(LoadedConfig { config, warnings, .. }) => {
            assert!(warnings.iter().all(|warning| is_in(text, warning)), "{warnings:?}");
            assert!(!config.describe().is_empty());
            // JSON is valid YAML.
            let written = serde_json::to_string(&config).expect("plain types");
            // A value that is escaped in the file is serialized without its escape and would be expanded when parsed
            // again.
            if written.contains("${env:") {
                return;
            }
            match Config::parse(&written, "again.yaml") {
                Ok(again) => assert_eq!(again, config, "written as {written}"),
                Err(error) => panic!("what we write is refused: {error}\n{written}"),
            }
        }
    }
}

fn error_has_position(text: &str, error: &ConfigError) {
    assert!(!error.problems().is_empty(), "an error says what is wrong");
    for problem in error.problems() {
        assert!(is_in(text, problem), "not a place in the file: {problem:?}");
        assert!(!problem.message.is_empty());
    }
    assert!(!error.report().is_empty());
    assert_eq!(error.to_string().lines().count(), error.problems().len(), "one line a problem: {error}");
}

/// Returns `true` if the problem has no position, or one in the file or at its end.
fn is_in(text: &str, problem: &Problem) -> bool {
    let Some(place) = problem.position else { return true };
    // Line breaks as defined by YAML 1.2.2, section 5.4.
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let mut lines = text.split('\n');
    let line = place.line.checked_sub(1).and_then(|line| lines.nth(usize::try_from(line).ok()?));
    match line {
        Some(line) => place.column >= 1 && place.column <= line.chars().count() as u64 + 1,
        None => false,
    }
}
