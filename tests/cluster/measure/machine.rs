//! Description of the machine.

use std::{fs, process::Command, thread};

use serde_json::{Value, json};

use crate::world::{FIXTURES_DIR, TestCluster};

/// Returns the load average of the last minute.
pub(super) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// Returns the machine, and the versions of everything that runs on it.
pub(super) fn describe(world: &TestCluster) -> Value {
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = processors.lines().find_map(|line| line.strip_prefix("model name\t: "));
    let cores = thread::available_parallelism().map_or(0, Into::into);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kubernetes = version_of("kubernetes", "k8s.io/kubernetes");
    let keda = version_of("keda", "github.com/kedacore/keda/v2");
    let program = world.ground.programs["anteroom"].display().to_string();
    let version = Command::new(&program).arg("--version").output().unwrap().stdout;
    let version = String::from_utf8_lossy(&version).trim().to_owned();
    let (processor, kernel) = (processor.unwrap_or("?"), kernel.trim());
    let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let text = format!(
        "{now}: {cores} cores of {processor}, Linux {kernel}, load average {}; {version} ({program}), Kubernetes \
         {kubernetes}, KEDA {keda}",
        load()
    );
    json!({
        "text": text, "time": now, "cores": cores, "processor": processor, "kernel": kernel, "load_average": load(),
        "anteroom": version, "program": program, "kubernetes": kubernetes, "keda": keda,
    })
}

/// Returns the version of a module from which the programs of the cluster are built.
fn version_of(folder: &str, module: &str) -> String {
    let modules = fs::read_to_string(format!("{FIXTURES_DIR}/{folder}/go.mod")).unwrap();
    let mut words = modules.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let found = words.find(|words| words.len() > 1 && words[0] == module);
    found.unwrap_or_else(|| panic!("{module} is not in {folder}/go.mod"))[1].to_owned()
}
