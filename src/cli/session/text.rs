//! Output of `anteroom session`.

use std::{fmt::Write, time::Duration};

use jiff::{Timestamp, tz::TimeZone};

use crate::{
    domain::Period,
    kube::{
        ScaledObject,
        session::{EndAction, Session, pause_annotation_of},
    },
    text_table::{Align, TextTable},
};

/// Time after the end of a session before it is reported as overdue.
const OVERDUE_TOLERANCE: Duration = Duration::from_secs(120);

/// Describes a started session.
pub fn started(before: &ScaledObject, session: &Session, now: Timestamp) -> String {
    let mut text = format!("{} scales until {}.\n", title(before), until(session.until, now));
    if let Some(Ok(running)) = Session::of(before) {
        let _ = writeln!(text, "  Replaces the previous end of the session, {}.", until(running.until, now));
    }
    match pause_annotation_of(before) {
        Some(pause) => {
            let _ = writeln!(text, "  Removed the pause ({pause}).");
        }
        None if Session::of(before).is_none() => {
            text += "  It was not paused before, but will be at the end.\n";
        }
        None => {}
    }
    let _ = writeln!(text, "  {}", end(session));
    text +=
        "  Every running Anteroom that serves the namespace enforces this; you can close this terminal.\n";
    if let Some(owner) = gitops_owner(before) {
        let _ = writeln!(
            text,
            "  Warning: {owner} manages this object. Configure it to ignore annotations, or it will restore them and end \
             the session early."
        );
    }
    let _ =
        writeln!(text, "To end it now: anteroom session stop {} -n {}", before.name(), before.namespace());
    text
}

/// Describes a stopped session.
pub fn stopped(before: &ScaledObject, session: Option<&Session>) -> String {
    let title = title(before);
    let Some(session) = session else {
        return match pause_annotation_of(before) {
            Some(pause) => format!("{title} has no session and is paused ({pause}). Nothing was changed.\n"),
            None => format!(
                "{title} has no session and is not paused. Nothing was changed. To pause it: kubectl annotate \
                 scaledobject {} -n {} autoscaling.keda.sh/paused=true\n",
                before.name(),
                before.namespace()
            ),
        };
    };
    match session.then {
        EndAction::Zero => format!("{title} is scaled to zero and paused.\n"),
        EndAction::Pause => match &session.before {
            Some(replicas) => format!("{title} is paused again, with {replicas} replicas as before.\n"),
            None => {
                format!("{title} is paused again. Its replicas keep running; use --to-zero to stop them.\n")
            }
        },
    }
}

/// Describes the session of a ScaledObject.
pub fn status(object: &ScaledObject, now: Timestamp) -> String {
    let title = title(object);
    let pause = pause_annotation_of(object);
    match (Session::of(object), pause) {
        (None, None) => format!("{title} has no session and is not paused.\n"),
        (None, Some(pause)) => format!(
            "{title} has no session and is paused ({pause}).\nTo resume it temporarily: anteroom session start {} -n {} \
             --for 2h\n",
            object.name(),
            object.namespace()
        ),
        (Some(Err(until)), _) => format!(
            "{title} has a session with an invalid end, \"{until}\", which will not be enforced. Start or stop the session again.\n"
        ),
        (Some(Ok(session)), pause) => {
            let mut text = match pause {
                None => format!("{title} scales until {}.\n", until(session.until, now)),
                Some(pause) => format!(
                    "{title} has a session until {}, but has been paused since ({pause}).\n",
                    until(session.until, now)
                ),
            };
            let _ = writeln!(text, "  {}", end(&session));
            if is_overdue(&session, now) {
                text += "  The session is overdue. Check that Anteroom runs with `kubernetes` in its configuration, serves \
                         this namespace, and may patch scaledobjects.keda.sh.\n";
            }
            text
        }
    }
}

/// Renders a table of the sessions. `namespace` is the common namespace of all objects.
pub fn table(objects: &[ScaledObject], now: Timestamp, namespace: Option<&str>) -> String {
    let rows: Vec<Vec<String>> = objects
        .iter()
        .filter_map(|object| {
            let (state, time, then) = match Session::of(object)? {
                Err(until) => ("invalid", until, "-"),
                Ok(session) => {
                    let state = match pause_annotation_of(object) {
                        Some(_) => "paused",
                        None if is_overdue(&session, now) => "overdue",
                        None => "running",
                    };
                    let then = if session.then == EndAction::Zero { "zero" } else { "pause" };
                    (state, until(session.until, now), then)
                }
            };
            let [namespace, name] = [object.namespace(), object.name()].map(str::to_owned);
            Some(vec![namespace, name, state.into(), time, then.into()])
        })
        .collect();
    if rows.is_empty() {
        let place =
            namespace.map_or_else(|| "in any namespace".into(), |name| format!("in namespace {name}"));
        let paused = objects.iter().filter(|object| object.pause().is_some()).count();
        return format!("No session {place} ({} ScaledObjects, {paused} of them paused).\n", objects.len());
    }
    let mut table = TextTable::new([Align::Left; 5]);
    table.row(["NAMESPACE", "SCALEDOBJECT", "STATE", "UNTIL", "THEN"]);
    rows.into_iter().for_each(|row| table.row(row));
    table.to_string()
}

fn title(object: &ScaledObject) -> String {
    format!("ScaledObject {}/{}", object.namespace(), object.name())
}

fn end(session: &Session) -> String {
    match (session.then, &session.before) {
        (EndAction::Zero, _) => "Then it is scaled to zero and paused.".into(),
        (EndAction::Pause, Some(replicas)) => {
            format!("Then it is paused again, with {replicas} replicas as before.")
        }
        (EndAction::Pause, None) => {
            "Then it is paused again. Its replicas keep running and cost money; use --to-zero to stop them."
                .into()
        }
    }
}

fn is_overdue(session: &Session, now: Timestamp) -> bool {
    Duration::try_from(now.duration_since(session.until)).is_ok_and(|late| late > OVERDUE_TOLERANCE)
}

/// Formats a time in the local time zone, with its distance from now.
fn until(then: Timestamp, now: Timestamp) -> String {
    let local = then.to_zoned(TimeZone::system());
    let local = local.strftime("%Y-%m-%d %H:%M:%S %Z");
    // Rounded to seconds: clocks differ by fractions.
    let left = jiff::SignedDuration::from_secs((then.duration_since(now).as_secs_f64()).round() as i64);
    let whole = |seconds: i64| Period::from(Duration::from_secs(seconds.unsigned_abs()));
    match left.as_secs() {
        0 => format!("{local} (now)"),
        left if left > 0 => format!("{local} (in {})", whole(left)),
        late => format!("{local} ({} ago)", whole(late)),
    }
}

/// Returns the GitOps tool that manages the object.
fn gitops_owner(object: &ScaledObject) -> Option<&'static str> {
    let marks = object.metadata.annotations.iter().chain(&object.metadata.labels);
    let mut keys = marks.flat_map(|marks| marks.keys());
    keys.find_map(|key| match key.split_once('/')?.0 {
        "argocd.argoproj.io" => Some("Argo CD"),
        "kustomize.toolkit.fluxcd.io" | "helm.toolkit.fluxcd.io" => Some("Flux"),
        _ => None,
    })
}
