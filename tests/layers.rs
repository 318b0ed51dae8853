//! Allowed dependencies between modules, checked in the source. `docs/architecture.md` has the same table.

#[path = "layers/paths.rs"]
mod paths;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use paths::PathDependency;

/// Rule in the third column of the table, for the modules in the first.
#[derive(Debug, PartialEq, Eq)]
enum LayerRule<'a> {
    /// The modules must not use any of these: our modules, other crates, or parts of either. The prefix `crate::`
    /// limits a name to our modules.
    MustNotUse(Vec<&'a str>),
    /// Only these modules may use them.
    OnlyFor(Vec<&'a str>),
}

/// Forbidden dependencies.
const MUST_NOT_USE: &[(&[&str], &[&str])] = &[
    (&["domain", "error", "openai"], &["tokio", "hyper", "hyper_util", "kube"]),
    (&["pick"], &["tokio", "std::time", "std::net", "std::io", "std::fs"]),
    (&["admission", "hold", "demand"], &["hyper", "hyper_util", "kube", "scaler", "proxy"]),
    (
        &["state", "coldstart", "telemetry", "history"],
        &["hyper", "hyper_util", "kube", "scaler", "proxy", "hold"],
    ),
    (&["upstream"], &["kube", "hold", "admission", "scaler"]),
    (&["proxy"], &["kube", "scaler", "admin"]),
    (&["kube"], &["proxy", "hold", "scaler"]),
    (&["scaler"], &["proxy", "hyper", "hyper_util", "crate::kube"]),
    (&["peer"], &["proxy", "scaler", "state", "hold", "admin", "hyper", "hyper_util", "kube"]),
    (&["grpc"], &["admission", "demand", "state", "hold", "proxy", "scaler", "peer", "kube"]),
    (&["probe", "guardian", "sim"], &["admission", "state", "hold", "proxy", "scaler", "config", "kube"]),
    (&["config"], &["admission", "state", "hold", "proxy", "scaler", "hyper", "kube"]),
    (&["admin"], &["proxy", "scaler", "hyper", "kube"]),
];

/// Modules restricted to certain users.
const ONLY_FOR: &[(&[&str], &[&str])] =
    &[(&["app"], &["cli", "demo", "bench"]), (&["cli", "demo", "bench"], &["cli"])];

#[test]
fn no_arrow_is_forbidden() {
    let arrows = arrows();
    let mut wrong = Vec::new();
    for arrow in &arrows {
        let forbidden = MUST_NOT_USE.iter().filter(|(modules, _)| modules.contains(&arrow.from()));
        for name in forbidden.flat_map(|(_, names)| *names).filter(|name| arrow.leads_to(name)) {
            wrong.push(format!("{arrow}: `{}` must not use `{name}`", arrow.from()));
        }
        let reserved = ONLY_FOR.iter().filter(|(modules, users)| {
            arrow.to_ours().is_some_and(|to| modules.contains(&to) && to != arrow.from())
                && !users.contains(&arrow.from())
        });
        wrong.extend(reserved.map(|(_, users)| format!("{arrow}: only for {users:?}")));
    }
    assert!(wrong.is_empty(), "forbidden arrows (docs/architecture.md, Layers):\n{}", wrong.join("\n"));
    // Guards against a parser that finds no dependencies at all.
    for (from, to) in [("app", "scaler"), ("proxy", "hold"), ("scaler", "state"), ("upstream", "hyper")] {
        let found = arrows.iter().any(|arrow| arrow.from() == from && arrow.leads_to(to));
        assert!(found, "the arrow from `{from}` to `{to}` was not seen");
    }
}

#[test]
fn dependencies_are_found_in_every_notation() {
    let text = r##"
        //! use crate::comment;
        use std::{fmt, sync::{Arc, atomic::AtomicBool}};
        use crate::{admission::{self, Gate as Entrance}, hold};
        use super::super::{super::demand, body::Body};
        mod wire;
        #[cfg(test)]
        mod tests { use crate::exempt; fn nothing() { { crate::exempt::too(); } } }
        #[cfg(test)]
        use crate::exempt::{also, this};
        fn path<'a>(gate: &'a admission::Gate) -> impl Sized + use<'a> {
            wire::read(r#"use crate::raw::text;"#, "crate::text \" crate::text", 'c', b'\'');
            let _ = Entrance::new as fn(&kube::Client) -> <crate::state::Endpoint as std::ops::Deref>::Target;
        }
    "##;
    let module = ["proxy", "dispatch", "deep"].map(String::from);
    let seen = paths::named(text, &module).into_iter().map(|path| path.join("::")).collect::<BTreeSet<_>>();
    let expected = [
        "crate::admission",
        "crate::admission::Gate",
        "crate::admission::Gate::new",
        "crate::demand",
        "crate::hold",
        "crate::proxy::body::Body",
        "crate::proxy::dispatch::deep::wire::read",
        "crate::state::Endpoint",
        "kube::Client",
        "std::fmt",
        "std::ops::Deref",
        "std::sync::Arc",
        "std::sync::atomic::AtomicBool",
    ];
    assert_eq!(seen.iter().map(String::as_str).collect::<Vec<_>>(), expected);
}

#[test]
fn modules_do_not_use_each_other_in_a_circle() {
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for arrow in arrows() {
        let to = arrow.to_ours().filter(|to| *to != arrow.from());
        uses.entry(arrow.from().into()).or_default().extend(to.map(Into::into));
    }
    assert_no_circle(uses);
}

#[test]
fn files_do_not_use_each_other_in_a_circle() {
    // Known dependencies that the parser must find: by a path, and by a path through a re-export.
    for (folder, from, to) in [("loadtest/src", "rig", "clients"), ("src", "demo/proxy", "app/start_error")] {
        let uses = paths::graph(&root().join(folder), &non_test_sources(folder));
        assert!(uses[from].contains(to), "the arrow from `{from}` to `{to}` was not seen: {:?}", uses[from]);
        assert_no_circle(uses);
    }
}

/// Fails if any of these use each other in a circle.
fn assert_no_circle(mut uses: BTreeMap<String, BTreeSet<String>>) {
    // A file that uses none of the remaining ones, or is used by none of them, is in no circle and is removed.
    let outside = |uses: &BTreeMap<String, BTreeSet<String>>| {
        let used: BTreeSet<_> = uses.values().flatten().collect();
        let is_outside = |(name, uses_of): &(&String, &BTreeSet<String>)| {
            !used.contains(name) || uses_of.iter().all(|other| !uses.contains_key(other))
        };
        uses.iter().find(is_outside).map(|(name, _)| name.clone())
    };
    while let Some(name) = outside(&uses) {
        uses.remove(&name);
    }
    let left: BTreeSet<_> = uses.keys().cloned().collect();
    uses.values_mut().for_each(|others| others.retain(|other| left.contains(other)));
    assert!(uses.is_empty(), "in a circle, or between two: {uses:?}");
}

#[test]
fn the_documents_have_the_same_table() {
    let document = read("docs/architecture.md");
    let table = document
        .split_once("<!-- begin: layers -->")
        .and_then(|(_, rest)| rest.split_once("<!-- end: layers -->"))
        .map(|(table, _)| table)
        .expect("docs/architecture.md has the table between its marks");
    let documented: Vec<_> = table.lines().filter(|line| line.starts_with("| `")).map(row).collect();
    let must_not =
        MUST_NOT_USE.iter().map(|(modules, names)| (modules.to_vec(), LayerRule::MustNotUse(names.to_vec())));
    let only_for =
        ONLY_FOR.iter().map(|(modules, users)| (modules.to_vec(), LayerRule::OnlyFor(users.to_vec())));
    assert_eq!(documented, must_not.chain(only_for).collect::<Vec<_>>());
}

#[test]
fn every_file_opens_with_its_purpose() {
    let mute = sources("src").into_iter().filter(|file| {
        let is_tests = file.file_stem().is_some_and(|stem| stem == "tests");
        !is_tests && !read(&file.display().to_string()).starts_with("//! ")
    });
    assert_eq!(mute.collect::<Vec<_>>(), Vec::<PathBuf>::new(), "no `//!` line");
}

#[test]
fn every_dependency_is_explained_and_used() {
    let document = read("docs/dependencies.md");
    let mut sections: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in document.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            sections.push((title, Vec::new()));
        } else if let (Some(name), Some((_, names))) =
            (line.strip_prefix("| `").and_then(|rest| rest.split('`').next()), sections.last_mut())
        {
            names.push(name);
        }
    }
    let expected = [
        // The compiled protocols are in `OUT_DIR`.
        ("anteroom", "Cargo.toml", "dependencies", &["src", env!("OUT_DIR")][..]),
        (
            "anteroom, for tests and benchmarks",
            "Cargo.toml",
            "dev-dependencies",
            &["src", "tests", "benches"],
        ),
        ("anteroom-loadtest", "loadtest/Cargo.toml", "dependencies", &["loadtest/src"]),
        ("anteroom-fuzz", "fuzz/Cargo.toml", "dependencies", &["fuzz/src", "fuzz/targets"]),
    ];
    let titles = expected.map(|(title, ..)| title);
    assert_eq!(sections.iter().map(|(title, _)| *title).collect::<Vec<_>>(), titles, "docs/dependencies.md");
    for ((title, documented), (_, manifest, table, folders)) in sections.into_iter().zip(expected) {
        let manifest = read(manifest);
        assert_eq!(documented, dependencies(&manifest, table), "docs/dependencies.md, {title}");
        let sources = folders.iter().flat_map(|folder| self::sources(folder));
        let text: String = sources.map(|file| fs::read_to_string(file).expect("a source file")).collect();
        let unused = |name: &&str| !text.contains(&format!("{}::", name.replace('-', "_")));
        assert_eq!(
            documented.iter().copied().filter(unused).collect::<Vec<_>>(),
            [""; 0],
            "nothing uses them"
        );
    }
    let manifest = read("loadtest/Cargo.toml");
    assert_eq!(
        dependencies(&manifest, "dev-dependencies"),
        [""; 0],
        "docs/dependencies.md has no section for them"
    );
}

/// Returns the names in a table of a manifest.
fn dependencies<'a>(manifest: &'a str, table: &str) -> Vec<&'a str> {
    let lines = manifest.lines().skip_while(|line| *line != format!("[{table}]")).skip(1);
    lines
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split_once([' ', '=', '.']).map(|(name, _)| name))
        .collect()
}

fn row(line: &str) -> (Vec<&str>, LayerRule<'_>) {
    let cells: Vec<_> = line.split('|').map(str::trim).collect();
    let [_, modules, _, rule, _] = cells[..] else { panic!("not three columns: {line}") };
    let rule = match rule.strip_prefix("only for ") {
        Some(users) => LayerRule::OnlyFor(quoted(users)),
        None => LayerRule::MustNotUse(quoted(rule)),
    };
    (quoted(modules), rule)
}

/// Returns the parts of a text in backticks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Returns every dependency of our modules.
fn arrows() -> Vec<PathDependency> {
    non_test_sources("src").iter().flat_map(|file| paths::arrows(&root().join("src"), file)).collect()
}

/// Returns the Rust files in a folder and below, except for tests.
fn non_test_sources(folder: &str) -> Vec<PathBuf> {
    sources(folder).into_iter().filter(|file| !file.ends_with("tests.rs")).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Returns the Rust files in a folder and below.
fn sources(folder: &str) -> Vec<PathBuf> {
    let mut folders = vec![root().join(folder)];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}
