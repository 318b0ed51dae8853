//! Files, headings, tests and metrics named in the documents exist.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers as well")]

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

/// Returns every Markdown page for people: at the top, in `docs`, and beside the files it describes.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [
        "",
        "docs",
        "docs/decisions",
        "deploy/examples",
        "deploy/chart/anteroom",
        "fuzz",
        "loadtest",
        "tests/cluster",
    ];
    let files = folders.iter().filter_map(|folder| fs::read_dir(root.join(folder)).ok()).flatten();
    let pages = files.map(|file| file.unwrap().path());
    pages.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

/// Returns the text without code blocks.
fn prose(path: &Path) -> String {
    fs::read_to_string(path).unwrap().split("```").step_by(2).collect()
}

/// Returns the anchors that GitHub generates for the headings of a page.
fn anchors(path: &Path) -> HashSet<String> {
    let headings = prose(path);
    let headings = headings.lines().filter_map(|line| line.strip_prefix('#'));
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    headings
        .map(|heading| {
            let heading = heading.trim_start_matches('#').trim().to_lowercase();
            heading.chars().filter(kept).map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut broken = Vec::new();
    for page in pages() {
        for link in prose(&page).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") || link.contains(' ') {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            let is_page = target.extension().is_some_and(|extension| extension == "md");
            if !target.exists() || (is_page && !anchor.is_empty() && !anchors(&target).contains(anchor)) {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// vLLM responds with 400 to a body without a content type, and `curl -d` alone does not send one.
#[test]
fn curl_commands_with_a_body_name_its_type() {
    let mut nameless = Vec::new();
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap().replace("\\\n", " ");
        let commands = text.lines().filter(|line| line.contains("curl ") && line.contains(" -d "));
        let nameless_here = commands.filter(|line| !line.contains("content-type: application/json"));
        nameless.extend(nameless_here.map(|line| format!("{}: {line}", page.display())));
    }
    assert!(nameless.is_empty(), "{nameless:#?}");
}

#[test]
fn readme_takes_two_minutes() {
    let words = include_str!("../README.md").split_whitespace().count();
    assert!(words <= 1400, "{words} words");
}

/// Returns true if a function of the file is run as a test, not merely defined.
fn is_test(file: &str, text: &str, name: &str) -> bool {
    if let Some(module) = file.strip_prefix("tests/cluster/scenarios/") {
        let scenario = format!("{}::{name},", module.trim_end_matches(".rs"));
        return include_str!("cluster/scenarios/mod.rs").contains(&scenario);
    }
    if file.ends_with(".py") {
        return name.starts_with("test_") && text.contains(&format!("def {name}("));
    }
    let function = format!("{name}(");
    let mut marked = ["#[test]", "#[tokio::test"].iter().flat_map(|mark| text.split(mark).skip(1));
    marked.any(|rest| rest.split_once("fn ").is_some_and(|(_, rest)| rest.starts_with(&function)))
}

/// Tests are named as `path::name` in backticks; a following `name` or `::name` is another test of the same file.
#[test]
fn every_fault_names_a_test_that_exists() {
    let (mut file, mut named) = (String::new(), 0);
    let rows = include_str!("../docs/faults.md").lines().filter(|line| line.starts_with("| "));
    for line in rows.filter(|line| !line.starts_with("| fault |") && !line.starts_with("| --- |")) {
        let tests = line.trim_end_matches(" |").rsplit_once(" | ").map(|(_, tests)| tests);
        let tests = tests.filter(|tests| tests.contains('`')).unwrap_or_else(|| panic!("no test: {line}"));
        for quoted in tests.split('`').skip(1).step_by(2) {
            let name = match quoted.rsplit_once("::") {
                Some((path, name)) => {
                    if !path.is_empty() {
                        path.clone_into(&mut file);
                    }
                    name
                }
                None if quoted.contains('/') => {
                    assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(quoted).exists(), "{quoted}: {line}");
                    continue;
                }
                None => quoted,
            };
            let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&file));
            let text = text.unwrap_or_else(|error| panic!("{file}: {error}: {line}"));
            assert!(is_test(&file, &text, name), "{file} has no test {name}: {line}");
            named += 1;
        }
    }
    assert!(named > 100, "{named} tests were found");
}

/// Metrics declared in the code and metrics in docs/metrics.md are the same.
#[test]
fn metrics_document_lists_every_metric() {
    let (code, document) = (include_str!("../src/admin/metrics.rs"), include_str!("../docs/metrics.md"));
    let word =
        |text: &str| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap().to_owned();
    let documented: HashSet<_> = document
        .split("`anteroom_")
        .skip(1)
        .map(|name| word(name).trim_end_matches("_total").trim_end_matches("_seconds").to_owned())
        .collect();
    for name in &documented {
        assert!(code.contains(&format!("\"{name}\"")), "anteroom_{name} is not in the code");
    }
    // The first string of a declaration is the name.
    let declarations = [
        "counter(&mut encoder, ",
        "counter(encoder, ",
        "gauge(&mut encoder, gates, ",
        "encode_descriptor(",
        "register_with_unit(",
    ];
    let code: String = code.split_whitespace().collect::<Vec<_>>().join(" ").replace("( ", "(");
    let mut declared = 0;
    for declaration in declarations {
        for name in code.split(declaration).skip(1).filter_map(|rest| rest.strip_prefix('"')).map(word) {
            assert!(documented.contains(&name), "anteroom_{name} is not in docs/metrics.md");
            declared += 1;
        }
    }
    assert!(declared > 15, "{declared} declarations were found");
}
