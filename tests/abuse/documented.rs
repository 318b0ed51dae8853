//! `docs/security.md` is what these tests show: every key in its table is one of the configuration, with that default;
//! every key of `limits` is in it; and every test that it names exists.

use std::{collections::HashSet, fs, path::Path};

use anteroom::config::sections;

fn in_tree(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The names of all functions in the sources and tests.
fn functions(folder: &Path, found: &mut HashSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.extend(text.split("fn ").skip(1).map(|rest| {
                rest.chars()
                    .take_while(|character| character.is_alphanumeric() || *character == '_')
                    .collect()
            }));
        }
    }
}

/// The texts between backticks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

#[test]
fn the_limits_and_the_tests_of_the_document_exist() {
    let document = fs::read_to_string(in_tree("docs/security.md")).unwrap();
    let (_, table) = document.split_once("<!-- begin: limits -->").expect("a table of limits");
    let (table, _) = table.split_once("<!-- end: limits -->").expect("an end of the table of limits");
    let sections = sections();
    let key_of = |path: &str| {
        let (section, name) = path.rsplit_once('.').unwrap_or(("", path));
        let section = sections.iter().find(|known| known.path == section)?;
        section.keys.iter().find(|key| key.name == name)
    };
    let mut tests = HashSet::new();
    for folder in ["src", "tests"] {
        functions(&in_tree(folder), &mut tests);
    }

    let mut named = HashSet::new();
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ")).skip(2).collect();
    assert!(rows.len() > 20, "{rows:?}");
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [limit, default, what, shown] = cells[..] else { panic!("four cells in {row}") };
        assert!(!what.is_empty(), "{row}");
        // A limit without a key is a constant, in words.
        if let Some(path) = quoted(limit).first() {
            let key = key_of(path).unwrap_or_else(|| panic!("no key {path}"));
            let told = quoted(default).first().map_or_else(|| default.to_owned(), |told| (*told).to_owned());
            let real = key
                .default
                .as_ref()
                .map_or("none".to_owned(), |real| real.as_str().map_or(real.to_string(), Into::into));
            assert_eq!(told, real, "the default of {path}");
            named.insert((*path).to_owned());
        }
        let shown = quoted(shown);
        assert!(!shown.is_empty(), "no test in {row}");
        for test in shown {
            assert!(tests.contains(test), "no test {test}");
        }
    }
    for key in &sections.iter().find(|section| section.path == "limits").unwrap().keys {
        assert!(named.contains(&format!("limits.{}", key.name)), "limits.{} is not in the table", key.name);
    }
    // And what the text around the table names as a test.
    for test in
        quoted(&document).into_iter().filter(|word| word.matches('_').count() >= 3 && !word.contains(' '))
    {
        assert!(tests.contains(test), "no test {test}");
    }
}
