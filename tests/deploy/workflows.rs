//! `.github` and the justfile name parts, scripts, tests and actions that exist.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt as _, process::Command};

use serde_json::Value;

use super::{files, in_tree, read, yaml};

const CI: &str = ".github/workflows/ci.yml";

/// Asserts that the first word of a command is a script of this repository.
fn assert_script(command: &str) {
    let script = command.split(' ').next().unwrap();
    let mode = fs::metadata(in_tree(script))
        .unwrap_or_else(|error| panic!("{command}: {error}"))
        .permissions()
        .mode();
    assert!(script.contains('/') && mode & 0o100 != 0, "{command}");
}

/// Returns every step of a workflow, with the name of its job.
fn steps(workflow: &Value) -> Vec<(String, Value)> {
    let jobs = workflow["jobs"].as_object().unwrap();
    let steps = |job: &Value| job["steps"].as_array().cloned().unwrap_or_default();
    jobs.iter().flat_map(|(name, job)| steps(job).into_iter().map(move |step| (name.clone(), step))).collect()
}

#[test]
fn every_part_runs_in_one_job() {
    let run = read(".ci/run");
    let all = run.lines().find_map(|line| line.strip_prefix("all=(")).unwrap().trim_end_matches(')');
    let known: BTreeSet<_> = all.split(' ').map(|part| part.split('=').next().unwrap()).collect();
    let workflow = yaml(CI);
    let groups = workflow["jobs"]["parts"]["strategy"]["matrix"]["include"].as_array().unwrap();
    let named: Vec<_> = groups.iter().flat_map(|group| group["parts"].as_str().unwrap().split(' ')).collect();
    assert_eq!(named.iter().copied().collect::<BTreeSet<_>>(), known);
    assert_eq!(named.len(), known.len(), "a part runs twice: {named:?}");

    // The job's limit leaves time for every part's own.
    let limit = workflow["jobs"]["parts"]["timeout-minutes"].as_u64().unwrap();
    for group in groups {
        let parts: BTreeSet<_> = group["parts"].as_str().unwrap().split(' ').collect();
        let limits = all.split(' ').filter_map(|part| part.split_once('='));
        let sum: u64 = limits
            .filter(|(part, _)| parts.contains(part))
            .map(|(_, minutes)| minutes.parse::<u64>().unwrap())
            .sum();
        assert!(limit > sum, "{parts:?} may take {sum} minutes");
    }
}

#[test]
fn workflows_only_run_scripts() {
    for path in files(".github/workflows", ".yml") {
        let workflow = yaml(&path);
        assert_eq!(workflow["permissions"], serde_json::json!({"contents": "read"}), "{path}");
        for (job, step) in steps(&workflow) {
            let Some(command) = step["run"].as_str() else { continue };
            assert!(!command.contains('\n'), "{path}: {job}: {command}");
            assert_script(command);
            if let Some(arguments) = command.strip_prefix(".ci/release ") {
                let usage = format!("#        .ci/release {}", arguments.split(' ').next().unwrap());
                let first = usage.replace("#        ", "# Usage: ");
                let script = read(".ci/release");
                assert!(script.contains(&usage) || script.contains(&first), "{path}: {command}");
            }
        }
    }
}

#[test]
fn actions_are_pinned_by_commit() {
    let mut pinned = BTreeSet::new();
    for path in files(".github/workflows", ".yml") {
        for line in read(&path).lines() {
            let Some((_, action)) = line.split_once("uses: ") else { continue };
            if let Some(own) = action.strip_prefix("./") {
                assert!(in_tree(own).exists(), "{path}: {action}");
                continue;
            }
            let (name, rest) = action.split_once('@').unwrap();
            let (commit, version) = rest.split_once(" # v").unwrap_or_else(|| panic!("{path}: {action}"));
            assert!(
                commit.len() == 40 && commit.bytes().all(|byte| byte.is_ascii_hexdigit()),
                "{path}: {action}"
            );
            pinned.insert((name.to_owned(), commit.to_owned(), version.to_owned()));
        }
    }
    let names: BTreeSet<_> = pinned.iter().map(|(name, ..)| name).collect();
    assert_eq!(names.len(), pinned.len(), "one version of each: {pinned:?}");
}

#[test]
fn checks_run_with_the_pinned_compiler() {
    let toolchain = read("rust-toolchain.toml");
    let channel =
        toolchain.lines().find_map(|line| line.strip_prefix("channel = ")).unwrap().trim_matches('"');
    let image = yaml(CI)["jobs"]["parts"]["container"]["image"].as_str().unwrap().to_owned();
    assert!(image.starts_with(&format!("rust:{channel}-")), "{image}");
}

#[test]
fn issue_forms_have_distinct_fields() {
    for form in ["bug", "feature"] {
        let form = yaml(&format!(".github/ISSUE_TEMPLATE/{form}.yml"));
        assert!(form["name"].is_string() && form["description"].is_string(), "{form}");
        let fields = form["body"].as_array().unwrap();
        let ids: BTreeSet<_> = fields.iter().map(|field| field["id"].as_str().unwrap()).collect();
        assert_eq!(ids.len(), fields.len(), "{form}");
        for field in fields {
            assert!(["input", "textarea"].contains(&field["type"].as_str().unwrap()), "{field}");
            assert!(field["attributes"]["label"].is_string(), "{field}");
        }
    }
    assert_eq!(yaml(".github/ISSUE_TEMPLATE/config.yml")["blank_issues_enabled"], false);
}

#[test]
fn recipes_run_what_exists() {
    let justfile = read("justfile");
    let mut seen = 0;
    for line in justfile.lines().filter_map(|line| line.strip_prefix("    ")) {
        let mut words =
            line.trim_start_matches('@').split(' ').skip_while(|word| word.starts_with("UPDATE_DOCS="));
        let program = words.next().unwrap();
        let words: Vec<_> = words.collect();
        seen += 1;
        match program {
            "just" => continue,
            "cargo" => assert!(["clippy", "fmt", "run", "test"].contains(&words[0]), "{line}"),
            script => assert_script(script),
        }
        for pair in words.windows(2) {
            let exists = match pair {
                ["--test", name] => in_tree(&format!("tests/{name}.rs")).exists(),
                ["--lib", filter] => in_tree(&format!("src/{}/tests.rs", filter.replace("::", "/"))).exists(),
                ["--", command] if !command.starts_with('-') => {
                    let help =
                        Command::new(env!("CARGO_BIN_EXE_anteroom")).args([*command, "--help"]).output();
                    help.unwrap().status.success()
                }
                _ => true,
            };
            assert!(exists, "{line}");
        }
    }
    assert!(seen >= 8, "{seen} commands were found");
}
