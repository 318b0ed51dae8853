//! Writes `docs/configuration.md`.

use std::fmt::Write;

use anteroom::config::{Kind, Section};

const BEGIN: &str = "<!-- begin: by hand -->";
const END: &str = "<!-- end: by hand -->";

/// The whole document. What stands between the marks of `now` is kept as it is.
pub(crate) fn configuration(sections: &[Section], example: &str, now: &str) -> String {
    let by_hand = now
        .split_once(BEGIN)
        .and_then(|(_, rest)| Some(rest.split_once(END)?.0))
        .unwrap_or("\n## Request headers\n\nTo be written.\n\n");
    let mut text = format!(
        "# Configuration\n\n\
         <!-- Written by `UPDATE_DOCS=1 cargo test --test config`, from the types; only the part between the marks at \
         the end is written by hand. -->\n\n\
         One YAML file, given with `--config`. `anteroom check --config FILE` says what it understood, or what is wrong \
         with it: file, line, key and the way out. `anteroom schema` prints the JSON Schema, so that editors complete and \
         check it; the first line of a file can name it:\n\n\
         ```yaml\n# yaml-language-server: $schema=./anteroom.schema.json\n```\n\n\
         The keys of the top level can also be given as variables and flags (`anteroom serve --help`): a flag beats its \
         variable, which beats the file. A change of the file, or SIGHUP, loads it again without dropping a request; a bad \
         file changes nothing and is told in the log.\n\n\
         ## Example\n\n\
         With every key. All values but the addresses, `workers` and the routes themselves are the defaults.\n\n\
         ```yaml\n{example}```\n\n\
         ## Values\n\n\
         | type | what is written |\n| --- | --- |\n\
         | duration | a number and a unit (`ms`, `s`, `m`, `h`, `d`), or several: `100ms`, `15m`, `1h 30m`; at most `30d` |\n\
         | bytes | a number and a unit: `64KiB` is 65,536, `64KB` is 64,000; without a unit, bytes |\n\
         | address | IP address and port: `0.0.0.0:8080`, `[::]:8080`; port 0 takes a free one |\n\
         | map | names that are free, with a text each |\n\n\
         An unknown key is an error, never ignored. So is a key that is given twice.\n\n"
    );
    for section in sections {
        write_section(&mut text, section).unwrap();
    }
    text + BEGIN + by_hand + END + "\n"
}

fn write_section(text: &mut String, section: &Section) -> std::fmt::Result {
    if section.path.is_empty() {
        writeln!(text, "## Top level\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |")?;
    } else {
        writeln!(text, "## `{}`\n", section.path)?;
        writeln!(
            text,
            "{}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |",
            section.description
        )?;
    }
    for key in &section.keys {
        let path =
            if section.path.is_empty() { key.name.clone() } else { format!("{}.{}", section.path, key.name) };
        let default = match (&key.kind, &key.default) {
            _ if section.either => "exactly one".to_owned(),
            (Kind::Section(_), _) if !key.required => "see there".to_owned(),
            (_, None) if key.required => "**required**".to_owned(),
            (_, None) => "none".to_owned(),
            (_, Some(value)) => match value.as_str() {
                Some(word) => format!("`{word}`"),
                None if value.as_array().is_some_and(|items| !items.is_empty()) => {
                    let items = value.as_array().into_iter().flatten().map(ToString::to_string);
                    format!("`[{}]`", items.collect::<Vec<_>>().join(", "))
                }
                None if value.is_array() || value.is_object() => "empty".to_owned(),
                None => format!("`{value}`"),
            },
        };
        let mut meaning = key.description.clone();
        if let Kind::Choice(choices) = &key.kind {
            for (word, description) in choices {
                write!(meaning, "<br>`{word}`: {description}")?;
            }
        }
        let kind = match &key.kind {
            Kind::List(item) if matches!(**item, Kind::Section(_)) => {
                format!("list of [mappings](#{})", anchor(&path))
            }
            Kind::Section(_) => format!("[mapping](#{})", anchor(&path)),
            kind => word(kind),
        };
        writeln!(text, "| `{}` | {kind} | {default} | {meaning} |", key.name)?;
    }
    text.push('\n');
    Ok(())
}

fn word(kind: &Kind) -> String {
    match kind {
        Kind::Duration => "duration".to_owned(),
        Kind::Bytes => "bytes".to_owned(),
        Kind::Number(0) => "number".to_owned(),
        Kind::Number(least) => format!("number, at least {least}"),
        Kind::Ratio => "number from 0 to 1".to_owned(),
        Kind::Boolean => "boolean".to_owned(),
        Kind::Address => "address".to_owned(),
        Kind::Text => "text".to_owned(),
        Kind::Choice(_) => "word".to_owned(),
        Kind::List(item) if matches!(**item, Kind::Number(_)) => "list of numbers".to_owned(),
        Kind::List(item) => format!("list of {}s", word(item)),
        Kind::Map => "map".to_owned(),
        Kind::Section(_) => "mapping".to_owned(),
    }
}

/// As GitHub makes it of a heading.
fn anchor(path: &str) -> String {
    path.chars().filter(|character| character.is_alphanumeric()).collect::<String>().to_lowercase()
}
