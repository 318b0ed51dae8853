//! The unit for systemd agrees with the program's flags and default times.

use std::{process::Command, time::Duration};

use anteroom::{config::Config, domain::ProcessTarget};

use super::{in_tree, read};

const UNIT: &str = "deploy/systemd/anteroom.service";

/// Directives that keep model servers from GPUs or from compiling code for them.
const HARMFUL: [&str; 6] = [
    "DeviceAllow",
    "DevicePolicy",
    "MemoryDenyWriteExecute",
    "PrivateDevices",
    "ProtectClock",
    "SystemCallFilter",
];

struct Directive {
    section: String,
    key: String,
    value: String,
}

/// Returns the directives in order. Panics at a line that is none.
fn directives() -> Vec<Directive> {
    let (mut section, mut found) = (String::new(), Vec::new());
    for line in read(UNIT).lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            assert!(["Unit", "Service", "Install"].contains(&name), "{line}");
            name.clone_into(&mut section);
            continue;
        }
        let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("no directive: {line}"));
        let named = key.starts_with(|c: char| c.is_ascii_uppercase())
            && key.bytes().all(|byte| byte.is_ascii_alphabetic());
        assert!(named && !section.is_empty(), "{line}");
        assert!(!value.ends_with('\\'), "one line per directive: {line}");
        found.push(Directive { section: section.clone(), key: key.into(), value: value.into() });
    }
    found
}

fn value(key: &str) -> String {
    let all = directives();
    let mut values = all.iter().filter(|directive| directive.key == key).map(|directive| &directive.value);
    let value = values.next().unwrap_or_else(|| panic!("no {key}"));
    assert!(values.next().is_none(), "{key} twice");
    value.clone()
}

#[test]
fn unit_has_directives_in_known_sections() {
    let all = directives();
    for section in ["Unit", "Service", "Install"] {
        assert!(all.iter().any(|directive| directive.section == section), "{section}");
    }
    for directive in &all {
        assert!(!HARMFUL.contains(&directive.key.as_str()), "{}", directive.key);
        let in_unit = directive.section == "Unit";
        assert_eq!(
            in_unit,
            ["Wants", "After", "Description"].contains(&directive.key.as_str()),
            "{}",
            directive.key
        );
    }
}

#[test]
fn unit_starts_with_flags_that_exist() {
    let command = value("ExecStart");
    let mut words = command.split(' ');
    assert_eq!(words.next(), Some("/usr/local/bin/anteroom"));
    let subcommand = words.next().unwrap();
    let help = Command::new(env!("CARGO_BIN_EXE_anteroom")).args([subcommand, "--help"]).output().unwrap();
    assert!(help.status.success(), "{subcommand}");
    let help = String::from_utf8(help.stdout).unwrap();
    let flags = words.filter(|word| word.starts_with('-')).collect::<Vec<_>>();
    assert!(!flags.is_empty(), "{command}");
    for flag in flags {
        assert!(help.split([' ', ',', '\n']).any(|word| word == flag), "{flag} in {help}");
    }
    let page = read("docs/install.md");
    for path in command.split(' ').filter(|word| word.starts_with('/')) {
        assert!(page.contains(path), "docs/install.md does not install {path}");
    }
    assert!(page.contains(UNIT) && in_tree(UNIT).exists());
}

/// systemd kills what is left after `TimeoutStopSec`: requests and model servers must have ended before.
#[test]
fn unit_has_time_to_drain() {
    let config = Config::default();
    let process = serde_saphyr::from_str::<ProcessTarget>("command: [vllm]").unwrap();
    let needed = config.drain_delay.get() + config.drain_timeout.get() + process.stop_timeout.get();
    let seconds = value("TimeoutStopSec");
    let seconds = seconds.strip_suffix('s').unwrap().parse::<u64>().unwrap();
    assert!(Duration::from_secs(seconds) > needed, "{seconds} s, needed: {needed:?}");
    assert_eq!(value("KillMode"), "mixed", "model servers must not get SIGTERM before the drain");
    assert_eq!(value("OOMPolicy"), "continue", "a model server out of memory must not stop the proxy");
}
