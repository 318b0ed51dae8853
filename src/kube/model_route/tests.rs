use std::{env, fs, path::Path};

use serde_json::json;

use super::*;

fn spec(value: Value) -> ModelRouteSpec {
    serde_json::from_value(value).unwrap()
}

#[test]
fn chart_definition_matches_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/chart/anteroom/crds/modelroutes.yaml");
    let now = definition_yaml();
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &now).unwrap();
    }
    let then = fs::read_to_string(&path).unwrap_or_default();
    assert!(then == now, "{}: UPDATE_DOCS=1 cargo test --lib kube::model_route", path.display());
    let read: CustomResourceDefinition = serde_saphyr::from_str(&then).unwrap();
    assert_eq!(read, definition(), "what is printed is what is meant");
}

/// The rules of an API server for structural schemas, as far as they matter here.
#[test]
fn schema_is_structural_without_defaults() {
    fn look(schema: &Value, path: &str, is_value: bool) {
        let schema = schema.as_object().unwrap_or_else(|| panic!("{path}: {schema}"));
        for (key, value) in schema {
            assert!(!value.is_null(), "{path}: {key}");
            match key.as_str() {
                "$ref" | "default" | "definitions" | "$defs" | "oneOf" | "const" | "title" | "nullable" => {
                    panic!("{path} has {key}")
                }
                "properties" => {
                    for (name, property) in value.as_object().unwrap() {
                        look(property, &format!("{path}.{name}"), true);
                    }
                }
                "items" | "additionalProperties" => look(value, &format!("{path}[]"), false),
                "type" => assert!(value.is_string(), "{path}: {value}"),
                _ => {}
            }
        }
        let typed = schema.contains_key("type") || schema.contains_key("x-kubernetes-int-or-string");
        assert!(typed, "{path} has no type: {schema:?}");
        assert!(!is_value || schema.contains_key("description"), "{path} has no description");
    }
    look(&schema_with_rules(), "", false);
    assert!(
        serde_json::from_value::<
            k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::JSONSchemaProps,
        >(schema_with_rules())
        .is_ok()
    );
}

#[test]
fn keys_equal_those_of_file_routes() {
    let file: serde_json::Value = serde_json::from_str(&crate::config::schema()).unwrap();
    let of_file = file["$defs"]["Route"]["properties"].as_object().unwrap().keys();
    let mut of_file = of_file.filter(|key| *key != "name").cloned().collect::<Vec<_>>();
    let mut ours = schema_with_rules()["properties"]["spec"]["properties"]
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect::<Vec<_>>();
    of_file.sort();
    ours.sort();
    assert_eq!(ours, of_file);
}

#[test]
fn object_converts_like_file_route() {
    let route = spec(json!({
        "match": {"models": ["tiny"], "hosts": ["a.example.com"], "headers": {"x-team": "red"}},
        "target": {"service": {"name": "vllm", "port": 8000}},
        "hold": {"maxRequests": 7, "maxBytes": "1MiB", "timeout": "20m"},
        "concurrency": {"max": 2},
        "scaling": {"target": 3, "requestRate": {"target": 2}},
        "scaleBy": "kubernetes",
        "workload": {"name": "vllm"},
    }))
    .to_route("models", "tiny")
    .unwrap();
    let file = crate::config::Config::parse(
        "routes: [{name: a, match: {models: [tiny], hosts: [a.example.com], headers: {x-team: red}}, target: {url: \
         'http://127.0.0.1:1'}, hold: {maxRequests: 7, maxBytes: 1MiB, timeout: 20m}, concurrency: {max: 2}, scaling: \
         {target: 3, requestRate: {target: 2}}, workload: {name: vllm}}]",
        "a.yaml",
    )
    .unwrap();
    assert_eq!(route.name.as_str(), "models/tiny");
    assert_eq!(route.matcher, file.routes[0].matcher);
    assert_eq!(crate::domain::Policy { scale_by: ScaleBy::Keda, ..route.policy() }, file.routes[0].policy());
    assert_eq!(route.concurrency, Concurrency { max: 2, ramp_start: 2 });
    let Target::Cluster(target) = route.target else { panic!("{:?}", route.target) };
    assert_eq!((target.to_string().as_str(), target.namespace.as_str()), ("service vllm:8000", "models"));
}

#[test]
fn target_and_port_need_exactly_one_choice() {
    let target = |value: Value| {
        let target: RouteTarget = serde_json::from_value(value).map_err(|error| error.to_string())?;
        target.to_target("models").map(|target| match target {
            Target::Cluster(target) => target.to_string(),
            other => format!("{other:?}"),
        })
    };
    let gateway = "http://envoy.gateway.svc";
    for (value, expected) in [
        (json!({"service": {"name": "vllm", "portName": "http"}}), "service vllm:http"),
        (json!({"inferencePool": {"name": "pool"}}), "inferencePool pool"),
        (
            json!({"inferencePool": {"name": "pool"}, "gateway": gateway}),
            "inferencePool pool behind http://envoy.gateway.svc",
        ),
        (json!({"url": "http://a:1"}), "Url(\"http://a:1\")"),
    ] {
        assert_eq!(target(value).unwrap(), expected);
    }
    for (value, expected) in [
        (json!({}), "exactly one of service"),
        (json!({"gateway": gateway}), "exactly one of service"),
        (json!({"url": "http://a:1", "inferencePool": {"name": "pool"}}), "exactly one of service"),
        (json!({"url": "http://a:1", "gateway": gateway}), "leave one of the two out"),
        (json!({"service": {"name": "vllm"}}), "spec.target.service: give exactly one of port"),
        (json!({"service": {"name": "vllm", "port": 0}}), "0 is not a port"),
        (json!({"service": {"name": "vllm", "port": 1, "portName": "http"}}), "exactly one of port"),
        (json!({"process": {"command": ["rm"]}}), "unknown field `process`"),
        (json!({"url": "http://a:1", "serve": {"role": "decode"}}), "serve and ready go with service or"),
        (json!({"url": "http://a:1", "ready": {"all": {}}}), "serve and ready go with service or"),
        (
            json!({"inferencePool": {"name": "pool"}, "ready": {"all": {"prefill": {}}}}),
            "spec.target.ready.all.prefill: name at least one label",
        ),
    ] {
        let error = target(value.clone()).expect_err(&value.to_string());
        assert!(error.contains(expected), "{value}: {error}");
    }
}

/// The part of the page between the marks is generated from the schema.
#[test]
fn docs_page_lists_every_key() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/model-route.md");
    let page = fs::read_to_string(&path).unwrap();
    let spec = &schema_with_rules()["properties"]["spec"];
    let sections = crate::config::sections();
    let meaning = |key: &str, property: &Value| {
        let text = property["description"].as_str().unwrap();
        match sections.iter().any(|section| section.path == format!("routes[].{key}")) {
            true if key != "target" => {
                format!("{text} [Its keys](configuration.md#routes{})", key.to_lowercase())
            }
            _ if key == "target" => format!("{text} [Its keys](#target)"),
            _ => text.to_owned(),
        }
    };
    let target = &spec["properties"]["target"];
    let table = |schema: &Value, prefix: &str| -> String {
        let required =
            |key: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|name| name == key));
        let rows = schema["properties"].as_object().unwrap().iter().map(|(key, property)| {
            let must = if required(key) { " **Required.**" } else { "" };
            // For a target, the page lists the keys themselves.
            let is_target = std::ptr::eq(schema, target) || !prefix.is_empty();
            let text = property["description"].as_str().unwrap().to_owned();
            let text = if is_target { text } else { meaning(key, property) };
            format!("| `{prefix}{key}` | {text}{must} |\n")
        });
        rows.collect()
    };
    let targets = [
        table(target, ""),
        table(&target["properties"]["service"], "service."),
        table(&target["properties"]["inferencePool"], "inferencePool."),
        table(&target["properties"]["ready"], "ready."),
    ];
    let mut now = page.clone();
    for (mark, rows) in [("keys", table(spec, "")), ("target", targets.concat())] {
        let begin = format!("<!-- begin: {mark} (UPDATE_DOCS=1 cargo test --lib model_route) -->\n");
        let end = format!("<!-- end: {mark} -->");
        let (before, rest) = now.split_once(&begin).unwrap();
        let (_, after) = rest.split_once(&end).unwrap();
        now = format!("{before}{begin}\n| key | meaning |\n| --- | --- |\n{rows}\n{end}{after}");
    }
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &now).unwrap();
        return;
    }
    assert!(page == now, "{}: UPDATE_DOCS=1 cargo test --lib model_route", path.display());
}
