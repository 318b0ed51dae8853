//! `anteroom status`: the routes of a cluster as a table.

use std::{fmt::Write, process::ExitCode};

use kube::{
    Api, Client, Resource, ResourceExt,
    api::ListParams,
    core::{DeserializeGuard, NamespaceResourceScope},
};
use serde::de::DeserializeOwned;

use super::connect::connect;
use crate::kube::{Condition, InterceptorRoute, ModelRoute, ModelRouteStatus, ScaledObject};

/// Whose routes.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// The namespace. Default: that of the kubeconfig's context.
    #[arg(short, long, conflicts_with = "all_namespaces")]
    namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// The context of the kubeconfig. Default: the current one.
    #[arg(long)]
    context: Option<String>,
}

/// A line of the table.
#[derive(Clone, Debug, Default, PartialEq)]
struct Line {
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
    /// Why it is not as it should be; below the line.
    reason: String,
}

/// What is paused, by namespace and name of the ScaledObject.
type Paused = Vec<(String, String)>;

/// Prints the routes.
pub(super) async fn run(args: StatusArgs) -> ExitCode {
    match table(&args).await {
        Ok(table) => {
            print!("{table}");
            ExitCode::SUCCESS
        }
        Err(error) => super::fail(format!("error: {error}")),
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
    let ours = list::<DeserializeGuard<ModelRoute>>(&client, in_namespace).await?;
    let theirs = list::<DeserializeGuard<InterceptorRoute>>(&client, in_namespace).await?;
    if ours.is_none() && theirs.is_none() {
        return Err(
            "the cluster knows neither ModelRoutes nor InterceptorRoutes; install the definition with \
                    `anteroom crds | kubectl apply -f -`, or the chart"
                .into(),
        );
    }
    let paused = paused(&client, in_namespace).await;
    let mut lines: Vec<_> = ours.iter().flatten().map(|object| of_ours(object, &paused)).collect();
    lines.extend(theirs.iter().flatten().map(of_theirs));
    lines.sort_by(|one, other| (&one.namespace, &one.name).cmp(&(&other.namespace, &other.name)));
    if lines.is_empty() {
        let place = namespace.map_or("the cluster".to_owned(), |namespace| {
            format!("the namespace {namespace}; -A shows all namespaces")
        });
        return Ok(format!("There is no route in {place}.\n"));
    }
    Ok(draw(&lines, args.all_namespaces))
}

/// The objects of a kind; `None` if the cluster has no such kind.
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
            "{}; ask for the right to `list` {}.{}{}",
            status.message,
            K::plural(&()),
            K::group(&()),
            if namespace.is_none() { ", or name one namespace with -n" } else { "" }
        )),
        Err(kube::Error::Api(status)) if status.code == 401 => {
            Err(format!("the cluster does not know you: {}; log in again", status.message))
        }
        Err(error) => Err(format!(
            "the cluster cannot be asked: {error}; is it up, and does the kubeconfig name the right one?"
        )),
    }
}

/// The ScaledObjects that are paused. It is no error not to know.
async fn paused(client: &Client, namespace: Option<&str>) -> Paused {
    let api: Api<ScaledObject> = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let objects = api.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
    let paused = objects.iter().filter(|object| object.pause().is_some());
    paused.map(|object| (object.namespace().to_owned(), object.name().to_owned())).collect()
}

fn of_ours(guarded: &DeserializeGuard<ModelRoute>, paused: &Paused) -> Line {
    let mut line = Line { kind: "ModelRoute", ..of_meta(guarded) };
    let Ok(object) = &guarded.0 else {
        return Line { state: "refused".into(), reason: "the object cannot be read".into(), ..line };
    };
    let matcher = &object.spec.matcher;
    line.matches = words(&[&matcher.models, &matcher.hosts, &matcher.paths]);
    let Some(status) = object.status.as_ref().filter(|status| !status.conditions.is_empty()) else {
        return Line { state: "unknown".into(), reason: NOBODY.into(), ..line };
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

fn of_theirs(guarded: &DeserializeGuard<InterceptorRoute>) -> Line {
    let line = Line { kind: "InterceptorRoute", ..of_meta(guarded) };
    let Ok(object) = &guarded.0 else {
        return Line { state: "refused".into(), reason: "the object cannot be read".into(), ..line };
    };
    let status = object.status.clone().unwrap_or_default();
    let ready = status.conditions.iter().find(|condition| condition.kind == "Ready");
    Line {
        matches: words(&[&object.spec.hosts()]),
        target: format!("service {}", object.spec.target),
        state: ready
            .map_or("unknown", |ready| if ready.status == "True" { "served" } else { "refused" })
            .into(),
        reason: match ready {
            None => NOBODY.into(),
            Some(ready) if ready.status == "True" && ready.reason == "Accepted" => String::new(),
            Some(ready) => ready.message.clone(),
        },
        ..line
    }
}

const NOBODY: &str = "no proxy has said anything about it yet; is one running that watches this namespace?";

fn of_meta<K: Resource>(object: &K) -> Line {
    Line { namespace: object.namespace().unwrap_or_default(), name: object.name_any(), ..Line::default() }
}

/// What is not as it should be, the first of: not accepted, not scalable, failed.
fn reason(status: &ModelRouteStatus, generation: Option<i64>) -> String {
    if status.observed_generation != generation {
        return "changed just now, and not looked at by a proxy yet".into();
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

/// The first of each kind, and how many more.
fn words(kinds: &[&Vec<String>]) -> String {
    let all: Vec<_> = kinds.iter().flat_map(|kind| kind.iter()).collect();
    match all.as_slice() {
        [] => "*".into(),
        [one] => (*one).clone(),
        [one, other] => format!("{one},{other}"),
        [one, other, rest @ ..] => format!("{one},{other}+{}", rest.len()),
    }
}

fn draw(lines: &[Line], namespaces: bool) -> String {
    let titles =
        ["NAMESPACE", "NAME", "MATCH", "TARGET", "STATE", "READY", "HELD", "SCALED BY", "LAST COLD START"];
    let cells = |line: &Line| {
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
    let rows: Vec<_> = lines.iter().map(cells).collect();
    let first = usize::from(!namespaces);
    let widths: [usize; 9] = std::array::from_fn(|column| {
        let widest = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        widest.max(titles[column].len()).min(40)
    });
    let mut text = String::new();
    let mut row = |cells: &[String; 9]| {
        let cells = cells.iter().zip(widths).skip(first).map(|(cell, width)| {
            let cell = if cell.is_empty() { "-" } else { cell };
            format!("{:<width$}", shortened(cell, width))
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    };
    row(&titles.map(str::to_owned));
    rows.iter().for_each(&mut row);
    let reasons = lines.iter().filter(|line| !line.reason.is_empty());
    for (number, line) in reasons.enumerate() {
        let gap = if number == 0 { "\n" } else { "" };
        // Writing to a String does not fail.
        let _ = writeln!(text, "{gap}{} {}/{}: {}", line.kind, line.namespace, line.name, line.reason);
    }
    text
}

fn shortened(cell: &str, width: usize) -> String {
    if cell.chars().count() <= width {
        return cell.to_owned();
    }
    cell.chars().take(width - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ours(value: serde_json::Value) -> Line {
        of_ours(&serde_json::from_value(value).unwrap(), &vec![("models".into(), "vllm".into())])
    }

    fn theirs(value: serde_json::Value) -> Line {
        of_theirs(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn a_table_says_how_routes_are_and_why_not() {
        let condition = |kind: &str, status: &str, reason: &str, message: &str| json!({"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let meta = |name: &str| json!({"name": name, "namespace": "models", "generation": 2});
        let lines = [
            ours(json!({
                "metadata": meta("tiny"),
                "spec": {"match": {"models": ["tiny", "lora", "more"]}, "target": {"url": "http://a:1"}},
                "status": {
                    "observedGeneration": 2, "state": "ready", "target": "service vllm:8000",
                    "endpoints": {"ready": 1, "total": 2}, "held": 3, "scaledObject": "vllm",
                    "lastColdStart": {"startedAt": "x", "duration": "83.5s", "outcome": "completed"},
                    "conditions": [condition("Accepted", "True", "Accepted", "")],
                },
            })),
            ours(json!({
                "metadata": meta("twin"),
                "spec": {"target": {"url": "http://a:1"}},
                "status": {"observedGeneration": 2, "state": "refused", "conditions": [
                    condition("Accepted", "False", "Conflict", "models/tiny goes first")
                ]},
            })),
            ours(json!({"metadata": meta("odd"), "spec": {"target": 7}})),
            ours(json!({"metadata": meta("new"), "spec": {"target": {"url": "http://a:1"}}})),
            theirs(json!({
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
ModelRoute models/odd: the object cannot be read
ModelRoute models/new: no proxy has said anything about it yet; is one running that watches this namespace?
";
        assert_eq!(text, expected);
        assert!(draw(&lines, true).starts_with("NAMESPACE  NAME"));
    }
}
