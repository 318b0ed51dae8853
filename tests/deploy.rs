//! The files in `deploy/` and what releases them, checked without a cluster: they parse, fit their schemas, and agree
//! with the program and each other.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers as well")]

#[path = "deploy/exported.rs"]
mod exported;
#[path = "deploy/monitoring.rs"]
mod monitoring;
#[path = "deploy/promql.rs"]
mod promql;
#[path = "deploy/release.rs"]
mod release;
#[path = "deploy/systemd.rs"]
mod systemd;
#[path = "deploy/workflows.rs"]
mod workflows;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anteroom::{config, domain::Scaling};
use serde_json::Value;

const CHART: &str = "deploy/chart/anteroom";

/// Metrics known to exist in vLLM (0.32.0).
const VLLM: [&str; 3] =
    ["vllm:kv_cache_usage_perc", "vllm:num_preemptions_total", "vllm:num_requests_waiting"];

fn in_tree(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(in_tree(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn yaml(path: &str) -> Value {
    serde_saphyr::from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Returns the files of a folder with this ending, by their path in the tree.
fn files(folder: &str, ending: &str) -> Vec<String> {
    let entries = fs::read_dir(in_tree(folder)).unwrap().map(|entry| entry.unwrap().file_name());
    let names = entries.map(|name| name.into_string().unwrap()).filter(|name| name.ends_with(ending));
    let mut paths = names.map(|name| format!("{folder}/{name}")).collect::<Vec<_>>();
    paths.sort();
    assert!(!paths.is_empty(), "{folder}");
    paths
}

/// Returns every object in the examples, with its file.
fn examples() -> Vec<(String, Value)> {
    let mut objects = Vec::new();
    for path in files("deploy/examples", ".yaml").into_iter().filter(|path| !path.ends_with("values.yaml")) {
        let documents = serde_saphyr::from_multiple::<Value>(&read(&path));
        for object in documents.unwrap_or_else(|error| panic!("{path}: {error}")) {
            objects.push((path.clone(), object));
        }
    }
    objects
}

fn of_kind(kind: &str) -> Vec<(String, Value)> {
    let objects = examples().into_iter().filter(|(_, object)| object["kind"] == kind).collect::<Vec<_>>();
    assert!(!objects.is_empty(), "{kind}");
    objects
}

fn name(object: &Value) -> (&str, &str) {
    let metadata = &object["metadata"];
    (metadata["namespace"].as_str().unwrap_or_default(), metadata["name"].as_str().unwrap())
}

/// Collects the leaf keys that a schema allows, as paths: `image.tag`.
fn paths(schema: &Value, prefix: &str, found: &mut BTreeSet<String>) {
    for (key, value) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{prefix}{key}");
        if value["properties"].is_object() {
            paths(value, &format!("{path}."), found);
        } else {
            found.insert(path);
        }
    }
}

/// Returns the words of a text that look like metric names.
fn metrics(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
    let names = words.filter(|word| word.starts_with("anteroom_") || word.starts_with("vllm:"));
    names.map(|name| name.trim_end_matches(':').to_owned()).collect()
}

#[test]
fn every_example_is_an_object_of_kubernetes() {
    for (path, object) in examples() {
        for key in ["/apiVersion", "/kind", "/metadata/name"] {
            assert!(object.pointer(key).is_some_and(Value::is_string), "{path}: {key}");
        }
        let own = object["kind"] == "Namespace";
        assert!(own || object["metadata"]["namespace"] == "llm", "{path}: in the example's namespace");
    }
    let readme = read("deploy/examples/README.md");
    for path in files("deploy/examples", ".yaml") {
        let file = path.rsplit('/').next().unwrap();
        assert!(readme.contains(&format!("({file})")), "{file}");
    }
}

#[test]
fn scaled_objects_ship_paused() {
    let linger = Scaling::default().linger.get().as_secs();
    let routes = of_kind("ModelRoute").into_iter().chain(of_kind("InterceptorRoute")).collect::<Vec<_>>();
    for (path, object) in of_kind("ScaledObject") {
        assert_eq!(object["metadata"]["annotations"]["autoscaling.keda.sh/paused"], "true", "{path}");
        let spec = &object["spec"];
        assert!(spec["fallback"].is_null(), "{path}: a fallback counts as demand");
        if spec["minReplicaCount"] == 0 {
            assert!(
                spec["pollingInterval"].as_u64().unwrap() * 2 <= linger,
                "{path}: a poll could miss requests"
            );
        } else {
            // Above zero, KEDA 2.21 leaves scaling to the HPA, and warns about keys without effect.
            for key in ["pollingInterval", "cooldownPeriod", "initialCooldownPeriod"] {
                assert!(spec[key].is_null(), "{path}: {key} has no effect");
            }
        }
        let triggers = spec["triggers"].as_array().unwrap();
        let pushes = triggers.iter().filter(|trigger| trigger["type"] == "external-push").collect::<Vec<_>>();
        let [push] = pushes[..] else { panic!("{path}: one trigger of ours") };
        let metadata = &push["metadata"];
        assert!(metadata["scalerAddress"].as_str().unwrap().starts_with("anteroom-scaler."), "{path}");
        let (kind, named) = match metadata["route"].as_str() {
            Some(route) => ("ModelRoute", route),
            None => ("InterceptorRoute", metadata["interceptorRoute"].as_str().unwrap()),
        };
        let namespace = name(&object).0;
        let known =
            routes.iter().any(|(_, route)| route["kind"] == kind && name(route) == (namespace, named));
        assert!(known, "{path}: no {kind} {namespace}/{named}");
        for query in triggers.iter().filter_map(|trigger| trigger["metadata"]["query"].as_str()) {
            let wrapped = query.starts_with("sum(") || query.starts_with("avg(");
            assert!(wrapped, "{path}: `{query}` has one value, whatever there is");
        }
    }
    for (profile, floor) in [("ha", 2), ("dev", 1), ("cost", 0)] {
        let object = yaml(&format!("deploy/examples/scaledobject-{profile}.yaml"));
        assert_eq!(object["spec"]["minReplicaCount"], floor, "{profile}");
    }
    assert_eq!(yaml(&format!("{CHART}/values.yaml"))["keda"]["paused"], true);
}

#[test]
fn model_servers_have_time_for_their_streams() {
    for (path, object) in of_kind("Deployment") {
        let pod = &object["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let before = container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap();
        let arguments = container["args"].as_array().unwrap().iter().filter_map(Value::as_str);
        let shutdown = arguments.filter_map(|argument| argument.strip_prefix("--shutdown-timeout="));
        let shutdown = shutdown.map(|seconds| seconds.parse::<u64>().unwrap()).sum::<u64>();
        let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
        assert!(grace > before + shutdown, "{path}: {grace} s for {before} and {shutdown}");
        assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false, "{path}");
        assert_eq!(container["securityContext"]["capabilities"]["drop"][0], "ALL", "{path}");
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{path}");
    }
    let server =
        of_kind("Deployment").into_iter().find(|(_, object)| name(object).1 == "qwen3-8b").unwrap().1;
    assert!(server["spec"]["replicas"].is_null(), "KEDA owns it");
    let container = &server["spec"]["template"]["spec"]["containers"][0];
    for (probe, path) in
        [("startupProbe", "/health"), ("readinessProbe", "/v1/models"), ("livenessProbe", "/health")]
    {
        assert_eq!(container[probe]["httpGet"]["path"], path, "{probe}");
    }
    let startup = &container["startupProbe"];
    let patience = startup["periodSeconds"].as_u64().unwrap() * startup["failureThreshold"].as_u64().unwrap();
    let activation = anteroom::domain::Readiness::default().activation_timeout.get().as_secs();
    assert!(patience >= activation, "the kubelet gives up before the route does");
}

#[test]
fn example_gateway_neither_waits_nor_retries() {
    let (_, object) = of_kind("ConfigMap").pop().unwrap();
    let envoy = object["data"]["envoy.yaml"].as_str().unwrap();
    let envoy = serde_saphyr::from_str::<Value>(envoy).unwrap();
    let manager =
        &envoy["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"];
    let routes = manager["route_config"]["virtual_hosts"][0]["routes"].as_array().unwrap();
    let route = &routes.last().unwrap()["route"];
    assert_eq!(route["timeout"], "0s");
    assert!(route["retry_policy"].is_null());
    let cluster = &envoy["static_resources"]["clusters"][0];
    assert_eq!((&cluster["name"], &cluster["type"]), (&route["cluster"], &"STRICT_DNS".into()));
    let address = &cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"];
    let services = of_kind("Service");
    let service = services.iter().map(|(_, service)| service).find(|service| {
        let (namespace, name) = name(service);
        address["address"] == format!("{name}.{namespace}.svc.cluster.local")
    });
    let service = service.expect("a Service of that name");
    assert_eq!(service["spec"]["clusterIP"], "None", "headless: each pod has an address");
    assert_eq!(service["spec"]["ports"][0]["port"], address["port_value"]);
}

#[test]
fn values_match_their_schema() {
    let schema = serde_json::from_str::<Value>(&read(&format!("{CHART}/values.schema.json"))).unwrap();
    let validator = jsonschema::draft7::new(&schema).unwrap();
    let mut texts = files(&format!("{CHART}/ci"), ".yaml");
    texts.extend(files("deploy/examples", "values.yaml"));
    texts.push(format!("{CHART}/values.yaml"));
    for path in texts {
        let values = yaml(&path);
        let errors = validator.iter_errors(&values).map(|error| format!("{} {error}", error.instance_path()));
        let errors = errors.collect::<Vec<_>>();
        assert!(errors.is_empty(), "{path}: {errors:?}");
    }
    for wrong in [
        "replica: 3",
        "profile: prod",
        "image: { tags: a }",
        "keda: { fallback: {} }",
        "monitoring: { serviceMonitor: { enabled: maybe } }",
        "models: [{ name: a, port: 8000 }]",
        "models: [{ name: a, inferencePool: { name: p }, service: { port: 8000 } }]",
        "models: [{ name: a, route: { target: {} } }]",
    ] {
        assert!(!validator.is_valid(&serde_saphyr::from_str(wrong).unwrap()), "{wrong}");
    }
}

#[test]
fn every_value_has_a_default_and_is_documented() {
    let schema = serde_json::from_str::<Value>(&read(&format!("{CHART}/values.schema.json"))).unwrap();
    let mut known = BTreeSet::new();
    paths(&schema, "", &mut known);
    // Helm's own value, common to all charts.
    known.remove("global");
    let (defaults, readme) = (yaml(&format!("{CHART}/values.yaml")), read(&format!("{CHART}/README.md")));
    for path in &known {
        let pointer = format!("/{}", path.replace('.', "/"));
        // Defaults of limits are Anteroom's; those of the HPA's behavior are Kubernetes'.
        let elsewhere = ["limits.", "keda.behavior.", "keda.prometheus.authenticationRef."];
        if elsewhere.iter().any(|prefix| path.starts_with(prefix)) {
            continue;
        }
        assert!(defaults.pointer(&pointer).is_some(), "{path} has no default in values.yaml");
        assert!(readme.contains(&format!("`{path}`")), "{path} is not in the chart's README");
    }
    let items = schema["properties"]["models"]["items"]["properties"].as_object().unwrap();
    for key in items.keys() {
        assert!(readme.contains(&format!("`models[].{key}`")), "models[].{key} is not in the chart's README");
    }
}

/// The values of `helm install` in the documents must work on a cluster without the Prometheus operator.
#[test]
fn documented_values_need_no_prometheus_operator() {
    let values = yaml("deploy/examples/anteroom-values.yaml");
    let monitoring = values["monitoring"].as_object().unwrap();
    assert!(monitoring.values().all(|monitor| monitor["enabled"] == "auto"), "{monitoring:?}");
    for path in files(&format!("{CHART}/templates"), ".yaml") {
        let template = read(&path);
        let kinds = template.matches("apiVersion: monitoring.coreos.com/v1").count();
        let guards = template.matches("{{- if include \"anteroom.monitored\" (list $ .enabled) }}").count();
        assert_eq!(kinds, guards, "{path}");
    }
}

#[test]
fn chart_configuration_has_file_keys() {
    let sections = config::sections();
    let keys_of = |title: &str| {
        let section = sections.iter().find(|section| section.path == title);
        let section = section.unwrap_or_else(|| panic!("no section `{title}`"));
        section.keys.iter().map(|key| key.name.to_string()).collect::<BTreeSet<_>>()
    };
    let helpers = read(&format!("{CHART}/templates/_helpers.tpl"));
    let fixed =
        helpers.split("\"anteroom.fixedConfig\" -}}").nth(1).unwrap().split("{{- end -}}").next().unwrap();
    let mut parent = String::new();
    for line in fixed.lines().filter(|line| !line.trim_start().starts_with("{{")) {
        let Some((key, _)) = line.split_once(':') else { continue };
        let section = if key.starts_with(' ') { parent.as_str() } else { "" };
        assert!(keys_of(section).contains(key.trim()), "`{}` in `{section}`", key.trim());
        if !key.starts_with(' ') {
            parent = key.into();
        }
    }
    let schema = serde_json::from_str::<Value>(&read(&format!("{CHART}/values.schema.json"))).unwrap();
    let limits = schema["properties"]["limits"]["properties"].as_object().unwrap();
    assert_eq!(limits.keys().cloned().collect::<BTreeSet<_>>(), keys_of("limits"));
}

#[test]
fn expressions_use_existing_metrics() {
    let exported = exported::exported();
    let mut texts = files(&format!("{CHART}/templates"), ".yaml");
    texts.extend(files("deploy/examples", ".yaml"));
    texts.push("deploy/prometheus/rules.yaml".into());
    texts.push("docs/keda.md".into());
    texts.push("docs/http-add-on.md".into());
    let mut seen = BTreeSet::new();
    for path in texts {
        for metric in metrics(&read(&path)) {
            assert!(exported.contains_key(&metric) || VLLM.contains(&metric.as_str()), "{path}: {metric}");
            seen.insert(metric);
        }
    }
    for metric in VLLM {
        assert!(seen.contains(metric), "{metric}: the triggers and the alerts need it");
    }
}

#[test]
fn versions_match_the_program() {
    let version = env!("CARGO_PKG_VERSION");
    let chart = yaml(&format!("{CHART}/Chart.yaml"));
    assert_eq!((&chart["version"], &chart["appVersion"]), (&version.into(), &version.into()));
    let dockerfile = read("deploy/Dockerfile");
    assert!(dockerfile.contains(&format!("ARG VERSION={version}\n")));
    let toolchain = read("rust-toolchain.toml");
    let channel =
        toolchain.lines().find_map(|line| line.strip_prefix("channel = ")).unwrap().trim_matches('"');
    assert!(
        dockerfile.contains(&format!("ARG RUST={channel}\n")),
        "the image is built with another compiler"
    );
}

#[test]
fn base_images_are_pinned_by_digest() {
    let dockerfile = read("deploy/Dockerfile");
    let images: Vec<_> = dockerfile.lines().filter_map(|line| line.strip_prefix("FROM ")).collect();
    assert_eq!(images.len(), 2);
    for image in images {
        let digest =
            image.split_whitespace().next().and_then(|name| name.split_once("@sha256:")).map(|parts| parts.1);
        assert!(
            digest.is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit())),
            "{image}"
        );
    }
}

/// The image is built from the files that `.dockerignore` allows: the manifest and the paths it names.
#[test]
fn image_contains_all_build_inputs() {
    let text = read(".dockerignore");
    let allowed = text.lines().filter_map(|line| line.strip_prefix('!')).collect::<BTreeSet<_>>();
    for needed in ["Cargo.toml", "Cargo.lock", "build.rs", "proto", "src", "benches", "loadtest"] {
        assert!(allowed.contains(needed) && in_tree(needed).exists(), "{needed}");
    }
    let manifest = read("Cargo.toml");
    let members = manifest.lines().find_map(|line| line.strip_prefix("members = ")).unwrap();
    let members = serde_json::from_str::<Vec<String>>(members).unwrap();
    assert!(members.iter().all(|member| allowed.contains(member.as_str())), "{members:?}");
}
