//! Parsing, with errors in terms of the file: its keys, units and positions.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_saphyr::{
    DefaultMessageFormatter, Error, MessageFormatter, NonFiniteFloatPolicy, Options, Spanned,
    options::DuplicateKeyPolicy,
};

use super::{
    Config,
    env::{self, Expansion},
    error::Problem,
    overlay::{Edits, Overlay},
    schema::{Section, ValueKind, sections},
    source::{Faults, KeyPath, NodeKind, PathSegment, SourceFile, SourceNode, known_position},
};

/// Maximum number of decodings of one file. Each decoding finds one more value of a wrong type.
const MAX_DECODINGS: usize = 50;

/// Parses a text into a configuration, not validated yet, and the positions of its nodes. Adds problems to `problems`;
/// the configuration then lacks the values that have them.
///
/// # Errors
///
/// Returns an error if no part of the configuration is left to be validated.
pub(super) fn decode<'a>(
    name: &'a str,
    text: &'a str,
    problems: &mut Vec<Problem>,
) -> Result<(Config, SourceFile<'a>), ()> {
    let source = SourceFile::new(name, text);
    let root = match serde_saphyr::from_str_with_options::<Spanned<NodeKind>>(text, options()) {
        Ok(root) => root,
        // Invalid YAML: no further checks are possible.
        Err(error) => {
            problems.push(explain(&source, &KeyPath::default(), &error, &[]));
            return Err(());
        }
    };
    let mut source = source.with_root(root);
    let sections = sections();
    let mut faults = Faults::default();
    check_keys(&source, &sections, source.root(), &KeyPath::default(), &mut faults, problems);
    let mut expansions = BTreeMap::new();
    expand_variables(&source, source.root(), &KeyPath::default(), &mut expansions, &mut faults, problems);
    (source.faults, source.expansions) = (faults, expansions);

    let mut reported = Vec::new();
    for _ in 0..MAX_DECODINGS {
        let texts = source.expansions.iter().map(|(path, expansion)| (path.clone(), &*expansion.value));
        let (path, error) = match decode_edited(text, Edits::new(&source.faults, texts.collect())) {
            Ok(config) => return Ok((config, source)),
            Err(failed) => *failed,
        };
        let place = match error.without_snippet() {
            Error::SerdeMissingField { field, .. } => path.key(*field),
            _ => path.clone(),
        };
        // A value beside or within a skipped one may be invalid only because of that. A value that an alias repeats is
        // reported once.
        let defined = source.node(&place).and_then(|node| known_position(node.defined));
        let is_repeated = defined.is_some_and(|defined| reported.contains(&defined));
        reported.extend(defined);
        if !source.faults.has_problem_at(&place) && !is_repeated {
            problems.push(explain(&source, &path, &error, &sections));
        }
        // A variant of an enum cannot be left out alone, only together with the whole value.
        let mut skipped = path;
        while source.faults.skipped.contains(&skipped) {
            skipped = skipped.parent();
        }
        if skipped.steps().is_empty() {
            break;
        }
        source.faults.skipped.insert(skipped);
    }
    Err(())
}

/// Decodes the file of a valid configuration again, for a summary: texts show the names of variables, not their values.
/// Values of other types appear as they take effect.
pub(super) fn decode_masked(source: &SourceFile<'_>) -> Option<Config> {
    let expansions = &source.expansions;
    let mut texts = expansions
        .iter()
        .map(|(path, expansion)| (path.clone(), &*expansion.shown))
        .collect::<BTreeMap<_, _>>();
    loop {
        match decode_edited(source.text(), Edits::new(&source.faults, texts.clone())) {
            Ok(config) => return Some(config),
            // The value has another type than text, so it appears as it takes effect.
            Err(failed) => {
                let (path, _) = *failed;
                let value = &*expansions.get(&path)?.value;
                if texts.insert(path, value) == Some(value) {
                    return None;
                }
            }
        }
    }
}

/// Decodes an edited file. Returns the path of the value that fails, and the error.
fn decode_edited(text: &str, edits: Edits<'_>) -> Result<Config, Box<(KeyPath, Error)>> {
    let config = serde_saphyr::with_deserializer_from_str_with_options(text, options(), |deserializer| {
        Config::deserialize(Overlay::new(deserializer, &edits))
    });
    config.map_err(|error| Box::new((edits.failed(), error)))
}

/// Expands the references to environment variables in all values.
fn expand_variables(
    source: &SourceFile<'_>,
    node: &SourceNode,
    path: &KeyPath,
    expansions: &mut BTreeMap<KeyPath, Expansion>,
    faults: &mut Faults,
    problems: &mut Vec<Problem>,
) {
    match &node.value {
        NodeKind::Leaf(_) => {}
        NodeKind::Text(text) if env::has_reference(text) && !faults.has_problem_at(path) => {
            match env::expand(text) {
                Ok(expansion) => drop(expansions.insert(path.clone(), expansion)),
                Err(message) => {
                    problems.push(source.problem(path, message));
                    faults.skipped.insert(path.clone());
                }
            }
        }
        NodeKind::Text(_) => {}
        NodeKind::List(items) => {
            for (index, item) in items.iter().enumerate() {
                expand_variables(source, item, &path.index(index), expansions, faults, problems);
            }
        }
        NodeKind::Map(entries) => {
            for (key, child) in entries {
                expand_variables(source, child, &path.key(&key.value), expansions, faults, problems);
            }
        }
    }
}

/// Limits on aliases and depth are stricter than the parser's defaults: an alias bomb of 500 bytes would take seconds,
/// and the default depth overflows a thread's stack in debug builds. Our keys nest at most six deep.
fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: 16 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
        duplicate_keys: DuplicateKeyPolicy::Error,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        with_snippet: false,
    }
}

/// Collects all unknown and missing keys; typos rarely come alone.
fn check_keys(
    source: &SourceFile<'_>,
    sections: &[Section],
    node: &SourceNode,
    path: &KeyPath,
    faults: &mut Faults,
    problems: &mut Vec<Problem>,
) {
    match &node.value {
        NodeKind::Leaf(_) | NodeKind::Text(_) => {}
        NodeKind::List(items) => {
            for (index, item) in items.iter().enumerate() {
                check_keys(source, sections, item, &path.index(index), faults, problems);
            }
        }
        NodeKind::Map(entries) => {
            let Some(section) = sections.iter().find(|section| section.path == pattern(path)) else { return };
            let is_missing = |name: &str| entries.iter().all(|(key, _)| key.value != name);
            for (key, child) in entries {
                if section.keys.iter().any(|known| known.name == key.value) {
                    check_keys(source, sections, child, &path.key(&key.value), faults, problems);
                } else {
                    let message = format!(
                        "unknown key \"{}\"{}",
                        key.value,
                        suggest_key(&key.value, section, sections)
                    );
                    problems.push(source.problem_at(known_position(key.referenced), path, message));
                    faults.skipped.insert(path.key(&key.value));
                    let names = section.keys.iter().map(|known| known.name.as_str());
                    let meant = nearest(&key.value, names).filter(|near| is_missing(near));
                    faults.doubtful.extend(meant.map(|near| path.key(near)));
                }
            }
            for key in section.keys.iter().filter(|key| key.required && is_missing(&key.name)) {
                if faults.doubtful.insert(path.key(&key.name)) {
                    problems.push(source.problem(path, format!("the key \"{}\" is missing", key.name)));
                }
            }
        }
    }
}

/// Suggests a fix for an unknown key: a similar key, the section it belongs to, or all keys of this section.
fn suggest_key(key: &str, section: &Section, sections: &[Section]) -> String {
    let names = || section.keys.iter().map(|known| known.name.as_str());
    if let Some(near) = nearest(key, names()) {
        return format!(", did you mean \"{near}\"?");
    }
    let elsewhere = sections.iter().filter(|other| other.keys.iter().any(|known| same(&known.name, key)));
    let elsewhere = elsewhere.map(|other| match other.path.as_str() {
        "" => "the top level",
        path => path,
    });
    match elsewhere.collect::<Vec<_>>().join(" or ") {
        none if none.is_empty() => format!("; the keys here are {}", names().collect::<Vec<_>>().join(", ")),
        places => format!("; it belongs to {places}"),
    }
}

/// Returns the most similar word, if it is similar enough for a typo.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let slips = |name: &str| strsim::damerau_levenshtein(&normalize_key(word), &normalize_key(name));
    let (near, slips) = known.map(|name| (name, slips(name))).min_by_key(|(_, slips)| *slips)?;
    (slips <= (word.chars().count() / 3).max(1)).then_some(near)
}

fn same(one: &str, other: &str) -> bool {
    normalize_key(one) == normalize_key(other)
}

/// Normalizes a key: `max_requests` and `max-requests` match `maxRequests`.
fn normalize_key(word: &str) -> String {
    word.chars().filter(|character| !matches!(character, '_' | '-')).flat_map(char::to_lowercase).collect()
}

/// Formats a path as sections do: `routes[].hold`.
fn pattern(path: &KeyPath) -> String {
    let mut pattern = String::new();
    for step in path.steps() {
        match step {
            PathSegment::Key(name) if pattern.is_empty() => pattern.push_str(name),
            PathSegment::Key(name) => pattern.extend([".", name]),
            PathSegment::Index(_) => pattern.push_str("[]"),
        }
    }
    pattern
}

/// Returns the expected kind at a path: of the key, or of the items of its list or map.
fn kind_at(path: &KeyPath, sections: &[Section]) -> Option<ValueKind> {
    let pattern = pattern(path);
    if sections.iter().any(|section| !section.path.is_empty() && section.path == pattern)
        && pattern.ends_with("[]")
    {
        return Some(ValueKind::Section(Vec::new()));
    }
    let kind_of = |pattern: &str| {
        let (section, name) = pattern.rsplit_once('.').unwrap_or(("", pattern));
        let section = sections.iter().find(|known| known.path == section)?;
        section.keys.iter().find(|key| key.name == name).map(|key| key.kind.clone())
    };
    if let Some(list) = pattern.strip_suffix("[]") {
        return match kind_of(list)? {
            ValueKind::List(item) => Some(*item),
            _ => None,
        };
    }
    kind_of(&pattern).or_else(|| match kind_of(pattern.rsplit_once('.')?.0)? {
        ValueKind::Map => Some(ValueKind::Text),
        _ => None,
    })
}

/// Converts an error of the parser to a problem of the file.
fn explain(source: &SourceFile<'_>, path: &KeyPath, error: &Error, sections: &[Section]) -> Problem {
    let error = error.without_snippet();
    if source.expansions.contains_key(path) {
        let message = mismatch(source, path, sections).unwrap_or_else(|| "is invalid".to_owned());
        return source.problem(path, format!("{message}, whose value is not shown"));
    }
    let place = error.location().and_then(known_position);
    // Errors of our own types get the position of their key from the tree.
    let (place, message) = match error {
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            (place, format!("the key \"{key}\" is given twice"))
        }
        Error::MultipleDocuments { .. } => {
            (place, "a second document begins here; the configuration is a single one".to_owned())
        }
        Error::SerdeUnknownVariant { variant, expected, .. } => {
            let way_out = match nearest(variant, expected.iter().copied()) {
                Some(near) => format!(", did you mean \"{near}\"?"),
                None if let Some(ValueKind::Section(either)) = kind_at(path, sections)
                    && !either.is_empty() =>
                {
                    format!("; expected {}", ValueKind::Section(either))
                }
                None => {
                    let words = expected.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>();
                    format!("; expected one of {}", words.join(", "))
                }
            };
            (source.position(path), format!("unknown value \"{variant}\"{way_out}"))
        }
        // Messages of our own types name the expected value.
        Error::Message { msg, .. } if kind_at(path, sections) != Some(ValueKind::Address) => {
            (source.position(path).or(place), msg.clone())
        }
        Error::ExpectedMappingEndAfterEnumVariantValue { .. } => {
            // Reported at the first variant, although the fault is the second one.
            let path = path.parent();
            let message = mismatch(source, &path, sections).unwrap_or_else(|| wording(error));
            return source.problem_at(place, &path, message);
        }
        Error::Message { .. } | Error::SerdeInvalidType { .. } | Error::SerdeInvalidValue { .. } => {
            let message = mismatch(source, path, sections).unwrap_or_else(|| wording(error));
            (source.position(path).or(place), message)
        }
        Error::Unexpected { .. }
        | Error::InvalidScalar { .. }
        | Error::NullIntoString { .. }
        | Error::ExpectedStringKeyForExternallyTaggedEnum { .. }
        | Error::ExternallyTaggedEnumExpectedScalarOrMapping { .. }
        | Error::UnexpectedValueForUnitEnumVariant { .. } => {
            (place, mismatch(source, path, sections).unwrap_or_else(|| wording(error)))
        }
        _ => (place, wording(error)),
    };
    source.problem_at(place, path, message)
}

fn wording(error: &Error) -> String {
    DefaultMessageFormatter.format_message(error).into_owned()
}

/// Describes the expected and the actual value at the path.
fn mismatch(source: &SourceFile<'_>, path: &KeyPath, sections: &[Section]) -> Option<String> {
    let kind =
        if path.steps().is_empty() { ValueKind::Section(Vec::new()) } else { kind_at(path, sections)? };
    let found = match (&kind, &source.node(path)?.value) {
        (ValueKind::Section(_), NodeKind::Map(entries)) => match entries.len() {
            0 => "none".to_owned(),
            _ => entries.iter().map(|(key, _)| key.value.clone()).collect::<Vec<_>>().join(" and "),
        },
        // The value is not shown: `env: TOKEN=…` may be a secret.
        (ValueKind::Map, NodeKind::Leaf(text) | NodeKind::Text(text)) if !text.is_empty() => {
            "a single value".to_owned()
        }
        (_, shape) => shape.to_string(),
    };
    let hint = match (&kind, found.as_str()) {
        (ValueKind::Text, "nothing") => "; an empty text is \"\"",
        (_, "nothing") => "; leave the key out for its default",
        // The value is a whole number, but out of range.
        (ValueKind::Number(_), number)
            if number.parse::<f64>().is_ok_and(|number| number > u32::MAX.into()) =>
        {
            "; choose a smaller one"
        }
        _ => "",
    };
    Some(format!("expected {kind}, found {found}{hint}"))
}
