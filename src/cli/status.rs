//! `anteroom status`: the routes of a cluster as a table.

use std::{fmt::Write, process::ExitCode};

use kube::{
    Api, Client, Resource, ResourceExt,
    api::ListParams,
    core::{DeserializeGuard, NamespaceResourceScope},
};
use serde::de::DeserializeOwned;

use super::connect::connect;
use crate::{
    kube::{Condition, InterceptorRoute, ModelRoute, ModelRouteStatus, ScaledObject},
    terminal::{fit, print},
    text_table::{Align, TextTable},
};

/// Arguments of `anteroom status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Namespace. Default: that of the kubeconfig's context.
    #[arg(short, long, conflicts_with = "all_namespaces")]
    namespace: Option<String>,
    /// Show all namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Context of the kubeconfig. Default: the current one.
    #[arg(long)]
    context: Option<String>,
}

/// A row of the table.
#[derive(Clone, Debug, Default, PartialEq)]
struct RouteRow {
    namespace: String,
    name: String,
    kind: &'static str,
    matches: String,
    target: String,
    state: String,
    endpoints: String,
    held: String,
    scaled_by: String,
    cold_start: String,
    /// Problem of the route, printed below the table.
    reason: String,
}

/// Namespaces and names of paused ScaledObjects.
type Paused = Vec<(String, String)>;

/// Runs `anteroom status`.
pub(super) async fn run(args: StatusArgs) -> ExitCode {
    match table(&args).await {
        Ok(table) => {
            print(&table);
            ExitCode::SUCCESS
        }
        Err(error) => super::fail::fail(format!("error: {error}")),
    }
}

async fn table(args: &StatusArgs) -> Result<String, String> {
    let client = connect(args.context.as_deref()).await?;
    let namespace = match (&args.namespace, args.all_namespaces) {
        (_, true) => None,
        (Some(namespace), false) => Some(namespace.clone()),
        (None, false) => Some(client.default_namespace().to_owned()),
    };
    let in_namespace = namespace.as_deref();
    let model_routes = list::<DeserializeGuard<ModelRoute>>(&client, in_namespace).await?;
    let interceptor_routes = list::<DeserializeGuard<InterceptorRoute>>(&client, in_namespace).await?;
    if model_routes.is_none() && interceptor_routes.is_none() {
        return Err(
            "the cluster has neither ModelRoutes nor InterceptorRoutes; install the definition with \
                    `anteroom crds | kubectl apply -f -`, or the chart"
                .into(),
        );
    }
    let paused = paused(&client, in_namespace).await;
    let mut lines: Vec<_> =
        model_routes.iter().flatten().map(|object| model_route_row(object, &paused)).collect();
    lines.extend(interceptor_routes.iter().flatten().map(interceptor_route_row));
    lines.sort_by(|one, other| (&one.namespace, &one.name).cmp(&(&other.namespace, &other.name)));
    if lines.is_empty() {
        let place = namespace.map_or("the cluster".to_owned(), |namespace| {
            format!("namespace {namespace}; use -A for all namespaces")
        });
        return Ok(format!("No routes in {place}.\n"));
    }
    Ok(draw(&lines, args.all_namespaces))
}

/// Lists the objects of a kind. Returns `None` if the cluster does not have the kind.
async fn list<K>(client: &Client, namespace: Option<&str>) -> Result<Option<Vec<K>>, String>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let api: Api<K> = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    match api.list(&ListParams::default()).await {
        Ok(list) => Ok(Some(list.items)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(kube::Error::Api(status)) if status.code == 403 => Err(format!(
            "{}; request the permission to `list` {}.{}{}",
            status.message,
            K::plural(&()),
            K::group(&()),
            if namespace.is_none() { ", or choose a namespace with -n" } else { "" }
        )),
        Err(kube::Error::Api(status)) if status.code == 401 => {
            Err(format!("not authenticated: {}; log in again", status.message))
        }
        Err(error) => Err(format!(
            "cannot reach the cluster: {error}; check that it is up and that the kubeconfig points to it"
        )),
    }
}

/// Returns the paused ScaledObjects. Ignores errors: the pause is only an annotation of the output.
async fn paused(client: &Client, namespace: Option<&str>) -> Paused {
    let api: Api<ScaledObject> = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let objects = api.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
    let paused = objects.iter().filter(|object| object.pause().is_some());
    paused.map(|object| (object.namespace().to_owned(), object.name().to_owned())).collect()
}

fn model_route_row(guarded: &DeserializeGuard<ModelRoute>, paused: &Paused) -> RouteRow {
    let mut line = RouteRow { kind: "ModelRoute", ..metadata_row(guarded) };
    let Ok(object) = &guarded.0 else {
        return RouteRow { state: "refused".into(), reason: "invalid object".into(), ..line };
    };
    let matcher = &object.spec.matcher;
    line.matches = summarize(&[&matcher.models, &matcher.hosts, &matcher.paths]);
    let Some(status) = object.status.as_ref().filter(|status| !status.conditions.is_empty()) else {
        return RouteRow { state: "unknown".into(), reason: NO_STATUS.into(), ..line };
    };
    line.target = status.target.clone().unwrap_or_default();
    line.state = status.state.map_or("unknown", |state| state.name()).into();
    line.endpoints =
        status.endpoints.map(|count| format!("{}/{}", count.ready, count.total)).unwrap_or_default();
    line.held = status.held.map(|held| held.to_string()).unwrap_or_default();
    line.scaled_by = status.scaled_object.clone().unwrap_or_default();
    if paused.contains(&(line.namespace.clone(), line.scaled_by.clone())) {
        line.scaled_by.push_str(" (paused)");
    }
    if let Some(cold_start) = &status.last_cold_start {
        line.cold_start = format!("{} {}", cold_start.duration, cold_start.outcome);
    }
    line.reason = reason(status, object.metadata.generation);
    line
}

fn interceptor_route_row(guarded: &DeserializeGuard<InterceptorRoute>) -> RouteRow {
    let line = RouteRow { kind: "InterceptorRoute", ..metadata_row(guarded) };
    let Ok(object) = &guarded.0 else {
        return RouteRow { state: "refused".into(), reason: "invalid object".into(), ..line };
    };
    let status = object.status.clone().unwrap_or_default();
    let ready = status.conditions.iter().find(|condition| condition.kind == "Ready");
    RouteRow {
        matches: summarize(&[&object.spec.hosts()]),
        target: format!("service {}", object.spec.target),
        state: ready
            .map_or("unknown", |ready| if ready.status == "True" { "served" } else { "refused" })
            .into(),
        reason: match ready {
            None => NO_STATUS.into(),
            Some(ready) if ready.status == "True" && ready.reason == "Accepted" => String::new(),
            Some(ready) => ready.message.clone(),
        },
        ..line
    }
}

/// Width to which a column is truncated.
const MAX_COLUMN_CHARS: usize = 40;

const NO_STATUS: &str = "not reported by a proxy yet; check that one is running and watches this namespace";

fn metadata_row<K: Resource>(object: &K) -> RouteRow {
    RouteRow {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        ..RouteRow::default()
    }
}

/// Returns the first problem: not accepted, not scalable, failed.
fn reason(status: &ModelRouteStatus, generation: Option<i64>) -> String {
    if status.observed_generation != generation {
        return "changed, not yet observed by a proxy".into();
    }
    let of = |kind: &str| status.conditions.iter().find(|condition| condition.kind == kind);
    let plainly = |condition: &&Condition| condition.status == "True" && condition.reason == "Accepted";
    if let Some(accepted) = of("Accepted").filter(|accepted| !plainly(accepted)) {
        return accepted.message.clone();
    }
    let wrong = of("Scalable").filter(|scalable| scalable.status == "False");
    let wrong = wrong.or_else(|| of("Ready").filter(|ready| ready.reason == "Failed"));
    wrong.map(|condition| condition.message.clone()).unwrap_or_default()
}

/// Formats the first two values and the number of further ones.
fn summarize(kinds: &[&Vec<String>]) -> String {
    let all: Vec<_> = kinds.iter().flat_map(|kind| kind.iter()).collect();
    match all.as_slice() {
        [] => "*".into(),
        [one] => (*one).clone(),
        [one, other] => format!("{one},{other}"),
        [one, other, rest @ ..] => format!("{one},{other}+{}", rest.len()),
    }
}

fn draw(lines: &[RouteRow], namespaces: bool) -> String {
    let titles =
        ["NAMESPACE", "NAME", "MATCH", "TARGET", "STATE", "READY", "HELD", "SCALED BY", "LAST COLD START"];
    let cells = |line: &RouteRow| {
        [
            line.namespace.clone(),
            line.name.clone(),
            line.matches.clone(),
            line.target.clone(),
            line.state.clone(),
            line.endpoints.clone(),
            line.held.clone(),
            line.scaled_by.clone(),
            line.cold_start.clone(),
        ]
    };
    let head = titles.map(str::to_owned);
    let skipped = usize::from(!namespaces);
    let mut table = TextTable::new(vec![Align::Left; titles.len() - skipped]);
    for row in std::iter::once(head).chain(lines.iter().map(cells)) {
        let cell = |cell: String| if cell.is_empty() { "-".into() } else { fit(&cell, MAX_COLUMN_CHARS) };
        table.row(row.into_iter().skip(skipped).map(cell));
    }
    let mut text = table.to_string();
    let reasons = lines.iter().filter(|line| !line.reason.is_empty());
    for (number, line) in reasons.enumerate() {
        let gap = if number == 0 { "\n" } else { "" };
        let _ = writeln!(text, "{gap}{} {}/{}: {}", line.kind, line.namespace, line.name, line.reason);
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn model_route_fixture(value: serde_json::Value) -> RouteRow {
        model_route_row(&serde_json::from_value(value).unwrap(), &vec![("models".into(), "vllm".into())])
    }

    fn interceptor_route_fixture(value: serde_json::Value) -> RouteRow {
        interceptor_route_row(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn table_lists_routes_and_problems() {
        let condition = |kind: &str, status: &str, reason: &str, message: &str| json!({"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let meta = |name: &str| json!({"name": name, "namespace": "models", "generation": 2});
        let lines = [
            model_route_fixture(json!({
                "metadata": meta("tiny"),
                "spec": {"match": {"models": ["tiny", "lora", "more"]}, "target": {"url": "http://a:1"}},
                "status": {
                    "observedGeneration": 2, "state": "ready", "target": "service vllm:8000",
                    "endpoints": {"ready": 1, "total": 2}, "held": 3, "scaledObject": "vllm",
                    "lastColdStart": {"startedAt": "x", "duration": "83.5s", "outcome": "completed"},
                    "conditions": [condition("Accepted", "True", "Accepted", "")],
                },
            })),
            model_route_fixture(json!({
                "metadata": meta("twin"),
                "spec": {"target": {"url": "http://a:1"}},
                "status": {"observedGeneration": 2, "state": "refused", "conditions": [
                    condition("Accepted", "False", "Conflict", "models/tiny goes first")
                ]},
            })),
            model_route_fixture(json!({"metadata": meta("odd"), "spec": {"target": 7}})),
            model_route_fixture(json!({"metadata": meta("new"), "spec": {"target": {"url": "http://a:1"}}})),
            interceptor_route_fixture(json!({
                "metadata": meta("app"),
                "spec": {"target": {"service": "app", "portName": "http"}, "rules": [{"hosts": ["a.example.com"]}]},
                "status": {"conditions": [condition("Ready", "True", "Accepted", "")]},
            })),
        ];
        let text = draw(&lines, false);
        let expected = "\
NAME  MATCH          TARGET             STATE    READY  HELD  SCALED BY      LAST COLD START
tiny  tiny,lora+1    service vllm:8000  ready    1/2    3     vllm (paused)  83.5s completed
twin  *              -                  refused  -      -     -              -
odd   -              -                  refused  -      -     -              -
new   *              -                  unknown  -      -     -              -
app   a.example.com  service app:http   served   -      -     -              -

ModelRoute models/twin: models/tiny goes first
ModelRoute models/odd: invalid object
ModelRoute models/new: not reported by a proxy yet; check that one is running and watches this namespace
";
        assert_eq!(text, expected);
        assert!(draw(&lines, true).starts_with("NAMESPACE  NAME"));
    }
}
