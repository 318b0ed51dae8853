//! The configuration file from outside: accepted files, error messages, and documentation.

// Clippy's exemption for tests covers functions with `#[test]`, but not the helpers of a test file.
#![allow(clippy::unwrap_used)]

#[path = "config/docs.rs"]
mod docs;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anteroom::{
    config::{self, Config, ConfigError, LoadedConfig, LogFormat, LogSettings, MemoryLimit, Overrides},
    domain::{Period, Target},
};
use clap::{Parser, error::ErrorKind};
use proptest::prelude::*;

const ROUTE_CONFIG: &str = "routes: [{ name: a, target: { url: http://127.0.0.1:8000 } }]\n";

/// Compares with a file, or writes it if `UPDATE_DOCS` is set.
fn same_as_file(path: &Path, actual: &str) {
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(path, actual).unwrap();
    }
    let expected = fs::read_to_string(path).unwrap_or_default();
    assert!(
        expected == actual,
        "{} differs; if the new text is right: UPDATE_DOCS=1 cargo test --test config\n--- now:\n{actual}",
        path.display()
    );
}

fn in_tree(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Returns the files of a folder, each with the path of its expected text.
fn fixtures(folder: &str) -> Vec<(String, String, PathBuf)> {
    let mut paths =
        fs::read_dir(in_tree(folder)).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    paths.sort();
    assert!(!paths.is_empty());
    let fixture = |path: PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, fs::read_to_string(&path).unwrap(), path.with_extension("txt"))
    };
    paths.into_iter().map(fixture).collect()
}

#[derive(Debug, Parser)]
struct OverrideArgs {
    #[command(flatten)]
    overrides: Overrides,
}

fn overrides(arguments: &[&str]) -> Overrides {
    OverrideArgs::try_parse_from([&["anteroom"], arguments].concat()).unwrap().overrides
}

#[test]
fn errors_name_position_and_remedy() {
    for (name, text, expected) in fixtures("tests/config/bad") {
        let error = Config::parse(&text, &name).expect_err(&name);
        assert!(!error.problems().is_empty(), "{name}");
        assert_eq!(error.to_string().lines().count(), error.problems().len(), "{name}: one line a problem");
        assert!(!error.to_string().contains("secret"), "{name}: this goes to the log");
        same_as_file(&expected, &error.report());
    }
}

#[test]
fn valid_files_match_their_description() {
    for (name, text, expected) in fixtures("tests/config/good") {
        let path = expected.with_extension("yaml");
        let report = config::check(&path, &Overrides::default(), None, None).expect(&name);
        assert!(report.lines().last().unwrap().starts_with("ok: "), "{name}");
        let description = Config::parse(&text, &name).unwrap().describe();
        assert!(description.lines().all(|line| line.chars().count() <= 110), "{name}: {description}");
        let narrow = config::check(&path, &Overrides::default(), None, Some(80)).expect(&name);
        let table = narrow.split("\nwarning: ").next().unwrap();
        assert!(table.lines().all(|line| line.chars().count() <= 80), "{name}: {table}");
        same_as_file(&expected, &report.replace(path.to_str().unwrap(), &name));
    }
}

/// Only limits that are not set in the file are lowered; those that are set cause a warning.
#[test]
fn limits_follow_the_memory_unless_they_are_set() {
    let memory = MemoryLimit { bytes: 1 << 30, source: "the memory limit of the cgroup" };
    let loaded = |limits: &str| {
        let text = format!("limits: {{ {limits} }}\n{ROUTE_CONFIG}");
        LoadedConfig::parse(&text, "a.yaml", &Overrides::default()).unwrap().fit(Some(&memory))
    };
    let limits = |loaded: &LoadedConfig| {
        let limits = loaded.config.limits;
        (limits.max_buffered_bytes.get() >> 20, limits.max_connections)
    };
    let unset = loaded("");
    assert_eq!((limits(&unset), unset.warnings.len()), ((256, 6553), 0));
    let set = loaded("maxBufferedBytes: 512MiB");
    assert_eq!((limits(&set), set.warnings.len()), ((512, 6553), 1));
    assert!(set.warnings[0].to_string().starts_with("a.yaml: limits: clients can make this process take "));
    let set = loaded("maxConnections: 1024");
    assert_eq!((limits(&set), set.warnings.len()), ((256, 1024), 0));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.yaml");
    fs::write(&path, ROUTE_CONFIG).unwrap();
    let report = config::check(&path, &Overrides::default(), Some(&memory), None).unwrap();
    let told = "all bodies 256MiB, head 64KiB, 6553 connections\n\
                memory     clients take at most 913 MiB, of 1024 MiB (the memory limit of the cgroup)\n           \
                6553 connections 256 MiB, bodies 256 MiB, requests 64 MiB, answers 96 MiB, all else 241 MiB\n";
    assert!(report.contains(told), "{report}");
}

#[test]
fn omitted_keys_have_their_defaults() {
    let config = Config::parse(ROUTE_CONFIG, "a.yaml").unwrap();
    assert_eq!(Config { routes: Vec::new(), ..config.clone() }, Config::default());
    assert_eq!(config.routes[0].hold.max_requests, 256);
    assert_eq!(config.routes[0].target, Target::Url("http://127.0.0.1:8000".into()));
}

#[test]
fn example_states_the_defaults_and_fits_the_schema() {
    let text = fs::read_to_string(in_tree("docs/example.yaml")).unwrap();
    let config = Config::parse(&text, "docs/example.yaml").unwrap();
    assert_eq!(config.limits, Config::default().limits);
    let mut policy = config.routes[0].policy();
    assert!(policy.workload.take().is_some() && policy.scaling.request_rate.take().is_some(), "every key");
    assert_eq!(policy, config.routes[1].policy());

    let schema = serde_json::from_str(&config::schema()).unwrap();
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    let example = serde_saphyr::from_str::<serde_json::Value>(&text).unwrap();
    validator.validate(&example).unwrap();
    // Serialized configurations fit the schema, too.
    validator.validate(&serde_json::to_value(&config).unwrap()).unwrap();
    for wrong in ["listn: 127.0.0.1:1", "drainDelay: 5", "log: xml", "routes: [{ name: a, target: {} }]"] {
        assert!(!validator.is_valid(&serde_saphyr::from_str(wrong).unwrap()), "{wrong}");
    }
}

#[test]
fn every_key_of_the_file_is_in_the_example() {
    let text = fs::read_to_string(in_tree("docs/example.yaml")).unwrap();
    for key in config::sections().iter().flat_map(|section| &section.keys) {
        assert!(text.contains(&format!("{}:", key.name)), "{} is not in the example", key.name);
    }
}

#[test]
fn every_key_has_a_meaning() {
    for section in config::sections() {
        for key in section.keys {
            assert!(!key.description.is_empty(), "{}.{} has none", section.path, key.name);
        }
    }
}

#[test]
fn documents_match_the_schema() {
    let path = in_tree("docs/configuration.md");
    let now = fs::read_to_string(&path).unwrap_or_default();
    same_as_file(&path, &docs::configuration(&config::sections(), &now));
}

#[test]
fn flags_override_file_and_are_validated() {
    let text = format!("listen: 127.0.0.1:1\nlog: json\n{ROUTE_CONFIG}");
    let given = overrides(&[
        "--listen=127.0.0.1:0",
        "--admin=127.0.0.1:0",
        "--workers=3",
        "--drain-delay=0",
        "--drain-timeout=1m",
        "--log-format=text",
    ]);
    let config = LoadedConfig::parse(&text, "a.yaml", &given).unwrap().config;
    assert_eq!(config.listen, "127.0.0.1:0".parse().unwrap());
    assert_eq!(config.admin, "127.0.0.1:0".parse().unwrap());
    assert_eq!(config.workers.unwrap().get(), 3);
    assert_eq!((config.drain_delay, config.drain_timeout), (Period::from_secs(0), Period::from_secs(60)));
    assert_eq!(config.log.format, LogFormat::Text);

    // The address in the file is valid, so the error does not point at it.
    let error = LoadedConfig::parse(&text, "a.yaml", &overrides(&["--listen=0.0.0.0:8081"])).unwrap_err();
    let message =
        "a.yaml: admin: 127.0.0.1:8081 is already used by listen, 0.0.0.0:8081; use different ports";
    assert_eq!(error.to_string(), message);

    let error = OverrideArgs::try_parse_from(["anteroom", "--drain-delay=5"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ValueValidation);
    assert!(error.to_string().contains("100ms, 20s or 15m"), "{error}");
}

#[test]
fn log_may_be_its_format_alone() {
    let log = |value: &str| {
        Config::parse(&format!("log: {value}\n{ROUTE_CONFIG}"), "a.yaml").map(|config| config.log)
    };
    let json = LogSettings { format: LogFormat::Json, access: false };
    assert_eq!(log("json").unwrap(), json);
    assert_eq!(log("{ format: json }").unwrap(), json);
    assert_eq!(log("{ format: json, access: true }").unwrap(), LogSettings { access: true, ..json });
    assert_eq!(log("{ access: true }").unwrap().format, LogFormat::Text);
    let error = log("{ format: xml, acess: true }").unwrap_err().to_string();
    let messages = "a.yaml:1:16: log.format: unknown value \"xml\"; expected one of \"text\", \"json\"\n\
                    a.yaml:1:21: log: unknown key \"acess\", did you mean \"access\"?";
    assert_eq!(error, messages);
}

#[test]
fn every_override_has_help_and_a_variable() {
    use clap::CommandFactory;
    for argument in OverrideArgs::command().get_arguments() {
        let variable = argument.get_env().unwrap().to_str().unwrap();
        let flag = argument.get_long().unwrap();
        assert_eq!(variable, format!("ANTEROOM_{}", flag.to_uppercase().replace('-', "_")));
        assert!(argument.get_help().is_some(), "{flag}");
    }
}

#[test]
fn unreadable_file_is_reported() {
    let missing = config::check(Path::new("/nowhere/a.yaml"), &Overrides::default(), None, None).unwrap_err();
    let message = "/nowhere/a.yaml: cannot be read: No such file or directory (os error 2); \
                   name another file with --config";
    assert_eq!(missing.to_string(), message);
    let endless = Config::load(Path::new("/dev/zero"), &Overrides::default()).unwrap_err();
    assert!(endless.to_string().contains("larger than 4MiB"), "{endless}");
    let folder = Config::load(Path::new("/"), &Overrides::default()).unwrap_err();
    assert!(matches!(folder, ConfigError::Read { .. }), "{folder}");
}

#[test]
fn alias_bomb_is_rejected_quickly() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
        text.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
    }
    let error = Config::parse(&text, "bomb.yaml").unwrap_err();
    assert!(error.to_string().contains("alias"), "{error}");
}

#[test]
fn depth_is_bounded_for_any_stack() {
    let blocks: String = (0..200).map(|level| format!("{:level$}a:\n", "")).collect();
    for text in [blocks, format!("a: {}{}", "[".repeat(200), "]".repeat(200)), "- ".repeat(200)] {
        let error = Config::parse(&text, "deep.yaml").unwrap_err();
        assert!(error.to_string().contains("budget"), "{error}");
    }
}

/// Generates texts that resemble a configuration enough to pass the first step of parsing.
fn config_like_text() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        "[a-zA-Z]{1,8}",
        prop::sample::select(vec![
            "listen",
            "limits",
            "routes",
            "name",
            "match",
            "target",
            "url",
            "process",
            "command",
            "hold",
            "headers",
            "hosts",
            "paths",
            "\"{port}\"",
            "http://a:80",
            "[",
            "]",
            "{",
            "}",
            "&a",
            "*a",
            "<<",
            "0",
            "-1",
            "5s",
            "1e9",
            "~",
            "9999999999999999d",
            "18446744073709551616",
            "!!binary",
            "| ",
            "\u{1F680}",
            "\"",
            "'",
            "off",
            ".nan",
        ])
        .prop_map(str::to_owned),
    ];
    let line = (0usize..8, prop_oneof![Just(""), Just("- ")], word.clone(), word)
        .prop_map(|(indent, item, key, value)| format!("{:indent$}{item}{key}: {value}\n", ""));
    prop::collection::vec(line, 0..12).prop_map(|lines| lines.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_text_never_panics(text in prop_oneof![any::<String>(), config_like_text()]) {
        if let Err(error) = Config::parse(&text, "a.yaml") {
            prop_assert!(!error.report().is_empty());
        }
    }

    #[test]
    fn arbitrary_value_never_panics(value in any::<String>(), key in 0usize..8) {
        let value = serde_json::to_string(&value).unwrap();
        let mut places = [const { "x" }; 8].map(str::to_owned);
        places[key] = value;
        let [name, model, host, path, header, content, url, readiness] = places;
        let text = format!(
            "routes: [{{ name: {name}, match: {{ models: [{model}], hosts: [{host}], paths: [{path}], \
             headers: {{ {header}: {content} }} }}, target: {{ url: {url} }}, readiness: {{ path: {readiness} }} }}]"
        );
        match Config::parse(&text, "a.yaml") {
            Ok(config) => prop_assert!(!config.describe().is_empty()),
            Err(error) => prop_assert!(!error.report().is_empty()),
        }
    }
}
