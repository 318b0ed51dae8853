//! Generates `docs/configuration.md`.

use std::fmt::Write;

use anteroom::config::{Section, ValueKind};

const BY_HAND_BEGIN: &str = "<!-- begin: by hand -->";
const BY_HAND_END: &str = "<!-- end: by hand -->";

/// Generates the whole document, keeping the text between the two marks in `now`.
pub(crate) fn configuration(sections: &[Section], now: &str) -> String {
    let by_hand = now
        .split_once(BY_HAND_BEGIN)
        .and_then(|(_, rest)| Some(rest.split_once(BY_HAND_END)?.0))
        .unwrap_or("\n## Request headers\n\nTo be written.\n\n");
    let mut text = String::from(
        "# Configuration\n\n\
         <!-- Generated from the types by `UPDATE_DOCS=1 cargo test --test config`, except the part between the marks at \
         the end. -->\n\n\
         One YAML file, given with `--config`. A first one:\n\n\
         ```yaml\n\
         # yaml-language-server: $schema=./anteroom.schema.json\n\
         routes:\n  \
         - name: qwen\n    \
         match: { models: [qwen] }\n    \
         target: { process: { command: [vllm, serve, ./qwen, --port, \"{port}\"] } }\n\
         ```\n\n\
         [example.yaml](example.yaml) has every key, mostly with its default.\n\n\
         | to | use |\n| --- | --- |\n\
         | validate a file | `anteroom check --config FILE`: a summary, or the errors with line, key and remedy |\n\
         | complete and validate keys in an editor | `anteroom schema > anteroom.schema.json`, and the first line above |\n\
         | override a key of the top level | for most, a flag or an environment variable (`anteroom serve --help`); a flag beats its \
         variable, which beats the file |\n\
         | reload | change the file, or send SIGHUP: no request is dropped; the log has invalid files, which change nothing, and keys that need a restart |\n\n\
         Most used: [a route](#routes), [its match](#routesmatch), [its target](#routestarget), [holding](#routeshold), \
         [heartbeats](#routeskeepalive), [limits](#limits), [request headers](#request-headers), [notes](#notes).\n\n\
         ## Values\n\n\
         | type | format |\n| --- | --- |\n\
         | duration | a number and a unit (`ms`, `s`, `m`, `h`, `d`), or several: `100ms`, `15m`, `1h 30m`; at most `30d` |\n\
         | bytes | a number and a unit: `64KiB` is 65,536, `64KB` is 64,000; without a unit, bytes |\n\
         | address | IP address and port: `0.0.0.0:8080`, `[::]:8080`; port 0 picks a free one |\n\
         | map | arbitrary names, each with a text |\n\n\
         Unknown and duplicate keys are errors.\n\n\
         `${env:NAME}` in a value stands for an environment variable of the proxy, also for numbers and durations; one that \
         is not set is an error. Values of variables are texts, never YAML, and errors and `anteroom check` show the \
         reference instead of a text. Quote it between `[` `]` and `{` `}`. `$${env:` is the text `${env:`. Nothing else is \
         expanded: not `$NAME`, not `~`. Editors that use the schema complain about a reference in place of a number or \
         duration. A `ModelRoute` cannot refer to variables.\n\n",
    );
    for section in sections {
        write_section(&mut text, section).unwrap();
    }
    text + BY_HAND_BEGIN + by_hand + BY_HAND_END + "\n"
}

fn write_section(text: &mut String, section: &Section) -> std::fmt::Result {
    if section.path.is_empty() {
        writeln!(text, "## Top level\n\n| key | type, default | meaning |\n| --- | --- | --- |")?;
    } else {
        writeln!(text, "## `{}`\n", section.path)?;
        writeln!(text, "{}\n\n| key | type, default | meaning |\n| --- | --- | --- |", section.description)?;
    }
    for key in &section.keys {
        let path =
            if section.path.is_empty() { key.name.clone() } else { format!("{}.{}", section.path, key.name) };
        let default = match (&key.kind, &key.default) {
            _ if section.requires_one_key => ", exactly one".to_owned(),
            (ValueKind::Section(_), _) if !key.required => String::new(),
            (_, None) if key.required => ", **required**".to_owned(),
            (_, None) => String::new(),
            (_, Some(value)) => match value.as_str() {
                Some(word) => format!(", `{word}`"),
                None if value.as_array().is_some_and(|items| !items.is_empty()) => {
                    let items = value.as_array().into_iter().flatten().map(ToString::to_string);
                    format!(", `[{}]`", items.collect::<Vec<_>>().join(", "))
                }
                None if value.is_array() || value.is_object() => ", empty".to_owned(),
                None => format!(", `{value}`"),
            },
        };
        let mut meaning = key.description.clone();
        if let ValueKind::Choice(choices) = &key.kind {
            for (word, description) in choices {
                write!(meaning, "<br>`{word}`: {description}")?;
            }
        }
        let kind = match &key.kind {
            ValueKind::List(item) if matches!(**item, ValueKind::Section(_)) => {
                format!("[list](#{})", anchor(&path))
            }
            ValueKind::Section(_) => format!("[keys](#{})", anchor(&path)),
            kind => word(kind),
        };
        writeln!(text, "| `{}` | {kind}{default} | {meaning} |", key.name)?;
    }
    text.push('\n');
    Ok(())
}

fn word(kind: &ValueKind) -> String {
    match kind {
        ValueKind::Duration => "duration".to_owned(),
        ValueKind::Bytes => "bytes".to_owned(),
        ValueKind::Number(0) => "number".to_owned(),
        ValueKind::Number(least) => format!("number, at least {least}"),
        ValueKind::Ratio => "number from 0 to 1".to_owned(),
        ValueKind::Boolean => "boolean".to_owned(),
        ValueKind::Address => "address".to_owned(),
        ValueKind::Text => "text".to_owned(),
        ValueKind::Choice(_) => "word".to_owned(),
        ValueKind::List(item) if matches!(**item, ValueKind::Number(_)) => "list of numbers".to_owned(),
        ValueKind::List(item) => format!("list of {}s", word(item)),
        ValueKind::Map => "map".to_owned(),
        ValueKind::Section(_) => "mapping".to_owned(),
    }
}

/// Returns the anchor that GitHub generates for a heading.
fn anchor(path: &str) -> String {
    path.chars().filter(|character| character.is_alphanumeric()).collect::<String>().to_lowercase()
}
