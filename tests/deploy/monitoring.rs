//! Checks that the dashboard and the alerts parse, and that every query reads exported metrics only.

use std::collections::{BTreeMap, BTreeSet};

use anteroom::{
    coldstart::{ColdStartKind, ColdStartOutcome, Phase},
    domain::ObstacleKind,
    error::{Outcome, Refusal},
    telemetry::HoldEnd,
};
use serde_json::Value;

use super::{
    CHART, VLLM,
    exported::{Exported, exported, metrics},
    promql::{CheckedQuery, check},
    read, yaml,
};

/// Metrics deliberately absent from all panels, with the reason.
const OMITTED: [(&str, &str); 3] = [
    ("anteroom_buffered_bytes", "anteroom_memory_bytes has the same by kind"),
    ("anteroom_dropped_log_lines", "it is 0 unless whatever reads the log is broken"),
    ("anteroom_limited_log_lines", "the log itself says so once a second"),
];

/// Returns the allowed values of a label that has a closed set of them.
fn values(metric: &str, label: &str) -> Option<BTreeSet<String>> {
    let outcomes = || Outcome::ALL.map(Outcome::name).to_vec();
    let of_cold_starts = metric.starts_with("anteroom_cold_start_");
    let values: Vec<&str> = match label {
        "cold_start" => vec!["true", "false"],
        "state" if metric == "anteroom_endpoints" => vec!["ready", "not_ready"],
        "reason" if metric.starts_with("anteroom_refused") => {
            Refusal::ALL.iter().map(|refusal| refusal.answer().code).collect()
        }
        "kind" if metric == "anteroom_obstacle" => ObstacleKind::ALL.map(ObstacleKind::name).to_vec(),
        "kind" if of_cold_starts => {
            [ColdStartKind::ColdStart, ColdStartKind::Wake].map(ColdStartKind::name).to_vec()
        }
        "phase" => Phase::ALL.map(Phase::name).to_vec(),
        "outcome" if of_cold_starts => {
            [ColdStartOutcome::Completed, ColdStartOutcome::Abandoned, ColdStartOutcome::Failed]
                .map(ColdStartOutcome::name)
                .to_vec()
        }
        "outcome" if metric.starts_with("anteroom_hold_duration") => {
            HoldEnd::all().map(HoldEnd::name).collect()
        }
        "outcome" if metric.starts_with("anteroom_requests") => outcomes(),
        _ => return None,
    };
    Some(values.into_iter().map(String::from).collect())
}

/// Returns our own metrics and the known ones of vLLM.
fn everything() -> Exported {
    let of_vllm = VLLM.map(|name| (name.to_owned(), ["engine", "model_name"].map(String::from).into()));
    exported().clone().into_iter().chain(of_vllm).collect()
}

fn dashboard() -> Value {
    serde_json::from_str(&read("deploy/grafana/anteroom.json")).unwrap()
}

fn panels(dashboard: &Value) -> &Vec<Value> {
    dashboard["panels"].as_array().unwrap()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} of {value}"))
}

/// Returns the labels that a template names: `{{route}}`, `{{ $labels.route }}`.
fn placeholders(template: &str) -> BTreeSet<String> {
    let inside = template.split("{{").skip(1).filter_map(|rest| rest.split("}}").next()).map(str::trim);
    inside
        .filter(|name| *name != "$value")
        .map(|name| name.trim_start_matches("$labels.").to_owned())
        .collect()
}

#[test]
fn every_dashboard_query_reads_exported_metrics() {
    let dashboard = dashboard();
    let mut wrong = Vec::new();
    let mut shown = BTreeSet::new();
    for panel in panels(&dashboard) {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let CheckedQuery { labels, names, wrong: found } =
                check(text(target, "expr"), exported(), &values);
            wrong.extend(found);
            shown.extend(names);
            let legend = text(target, "legendFormat");
            let missing: Vec<_> = placeholders(legend).difference(&labels).cloned().collect();
            if !missing.is_empty() {
                wrong.push(format!("{}: `{legend}` names {missing:?}", text(panel, "title")));
            }
        }
        // Colour overrides that match by name must name an existing series.
        let of_label = |label: &str| {
            let target = &panel["targets"][0];
            placeholders(text(target, "legendFormat")).contains(label)
        };
        for item in panel["fieldConfig"]["overrides"].as_array().into_iter().flatten() {
            let name = text(&item["matcher"], "options");
            let closed = [
                ("phase", "anteroom_cold_start_phase"),
                ("outcome", "anteroom_cold_start_duration"),
                ("outcome", "anteroom_requests"),
                ("state", "anteroom_endpoints"),
            ];
            let legends =
                panel["targets"].as_array().unwrap().iter().map(|target| text(target, "legendFormat"));
            let is_value = closed.iter().any(|(label, metric)| {
                of_label(label)
                    && text(&panel["targets"][0], "expr").contains(metric)
                    && values(metric, label).is_some_and(|values| values.contains(name))
            });
            let is_open = ["connected", "silent", "unreachable"].contains(&name);
            if !is_value && !is_open && !legends.clone().any(|legend| legend == name) {
                wrong.push(format!("{}: a colour for `{name}`", text(panel, "title")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        let Some(query) = variable["query"]["query"].as_str() else { continue };
        let inside = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')')).unwrap();
        let (selector, label) = inside.rsplit_once(", ").unwrap();
        let CheckedQuery { labels, wrong, .. } = check(selector, exported(), &values);
        assert!(wrong.is_empty() && labels.contains(label), "{query}: {wrong:?}");
    }
    let is_shown = |metric: &str| {
        let names = ["", "_total", "_bucket", "_count", "_sum"].map(|ending| format!("{metric}{ending}"));
        names.iter().any(|name| shown.contains(name))
    };
    for (metric, why) in OMITTED {
        assert!(
            metrics().contains(metric) && !is_shown(metric),
            "{metric} is exported, and left out since {why}"
        );
    }
    let forgotten = metrics()
        .into_iter()
        .filter(|metric| !is_shown(metric) && !OMITTED.iter().any(|(omitted, _)| omitted == metric));
    let forgotten: Vec<_> = forgotten.collect();
    assert!(forgotten.is_empty(), "exported, and neither on a panel nor in OMITTED: {forgotten:?}");
}

#[test]
fn dashboard_is_valid_for_grafana() {
    let dashboard = dashboard();
    assert!(dashboard["id"].is_null() && dashboard["schemaVersion"].as_u64().unwrap() >= 42);
    let variables: Vec<_> =
        dashboard["templating"]["list"].as_array().unwrap().iter().map(|one| text(one, "name")).collect();
    assert_eq!(variables, ["datasource", "namespace", "route"]);
    let (mut ids, mut taken) = (BTreeSet::new(), BTreeMap::new());
    for panel in panels(&dashboard) {
        let title = text(panel, "title");
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: its id is there twice");
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
        assert!(w > 0 && h > 0 && x + w <= 24, "{title} is outside");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            let other = taken.insert(cell, title);
            assert_eq!(other, None, "{title} is on top of another one at {cell:?}");
        }
        if panel["type"] == "row" {
            continue;
        }
        assert!(text(panel, "description").ends_with('.'), "{title}: a description, in sentences");
        assert!(!text(&panel["fieldConfig"]["defaults"], "unit").is_empty(), "{title}: a unit");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        let targets = panel["targets"].as_array().unwrap();
        let letters: BTreeSet<_> = targets.iter().map(|target| text(target, "refId")).collect();
        assert!(!targets.is_empty() && letters.len() == targets.len(), "{title}: queries of the same name");
        assert!(targets.iter().all(|target| target["datasource"]["uid"] == "${datasource}"), "{title}");
    }
    // Every row starts with a panel, so Grafana has no gap to close.
    let last = taken.keys().map(|(_, y)| *y).max().unwrap();
    assert!((0..=last).all(|y| taken.contains_key(&(0, y))), "a line without a panel");
    let actuation = panels(&dashboard).iter().find(|panel| panel["title"] == "T_actuation").unwrap();
    assert!(actuation["targets"].as_array().unwrap().iter().all(|target| target["exemplar"] == true));
}

#[test]
fn every_alert_reads_exported_metrics() {
    let rules = yaml("deploy/prometheus/rules.yaml");
    let everything = everything();
    let (mut alerts, mut wrong) = (Vec::new(), Vec::new());
    for rule in
        rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap())
    {
        let name = text(rule, "alert");
        alerts.push(name);
        let checked = check(text(rule, "expr"), &everything, &values);
        wrong.extend(checked.wrong.into_iter().map(|wrong| format!("{name}: {wrong}")));
        for template in rule["annotations"].as_object().unwrap().values() {
            for label in placeholders(template.as_str().unwrap()).difference(&checked.labels) {
                wrong.push(format!("{name}: the annotation names `{label}`"));
            }
        }
        assert!(["info", "warning", "critical"].contains(&text(&rule["labels"], "severity")), "{name}");
        assert!(rule["annotations"]["summary"].as_str().unwrap().ends_with('.'), "{name}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let page = read("docs/keda.md");
    let section = page.split("\n## Dashboard and alerts\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = section.lines().skip_while(|line| !line.starts_with("| alert |"));
    let rows = rows.filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    assert_eq!(rows.collect::<Vec<_>>(), alerts, "docs/keda.md, Dashboard and alerts");
}

/// The chart ships the same rules and dashboard, and every string that its template replaces occurs in the rules.
#[test]
fn the_chart_installs_the_same_files() {
    for (inside, outside) in
        [("dashboard.json", "deploy/grafana/anteroom.json"), ("rules.yaml", "deploy/prometheus/rules.yaml")]
    {
        assert_eq!(read(&format!("{CHART}/files/{inside}")), read(outside));
    }
    let template = read(&format!("{CHART}/templates/prometheusrule.yaml"));
    let rules = yaml("deploy/prometheus/rules.yaml");
    let rule = |name: &str| {
        let mut all =
            rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap());
        all.find(|rule| rule["alert"] == name).unwrap_or_else(|| panic!("{name}"))
    };
    let changed: Vec<_> =
        template.split("eq .alert \"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert_eq!(changed, ["AnteroomDown", "AnteroomColdStartSlow", "VllmPreempts"]);
    let values = yaml(&format!("{CHART}/values.yaml"));
    let values = &values["monitoring"]["prometheusRule"];
    assert!(text(rule("AnteroomDown"), "expr").contains("anteroom_buffered_bytes"));
    assert_eq!(rule("AnteroomColdStartSlow")["for"], values["coldStartSlowAfter"]);
    let preemptions = format!("> {}", values["preemptionsPerSecond"]);
    assert!(text(rule("VllmPreempts"), "expr").ends_with(&preemptions), "{preemptions}");
    assert!(template.contains(&format!("replace \"{preemptions}\"")));
}
