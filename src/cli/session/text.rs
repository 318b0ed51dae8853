//! What `anteroom session` prints.

use std::{fmt::Write, time::Duration};

use jiff::{Timestamp, tz::TimeZone};

use crate::{
    domain::Period,
    kube::{
        ScaledObject,
        session::{Session, Then, pause_of},
    },
};

/// How long the end of a session may be overdue before that is strange.
const LATE: Duration = Duration::from_secs(120);

/// What a start has done.
pub fn started(before: &ScaledObject, session: &Session, now: Timestamp) -> String {
    let mut text = format!("{} scales until {}.\n", title(before), until(session.until, now));
    if let Some(Ok(running)) = Session::of(before) {
        let _ = writeln!(
            text,
            "  A session was running until {}; this is its new end.",
            until(running.until, now)
        );
    }
    match pause_of(before) {
        Some(pause) => {
            let _ = writeln!(text, "  It was paused ({pause}); that is removed.");
        }
        None if Session::of(before).is_none() => {
            text += "  It was not paused before, and will be at the end.\n";
        }
        None => {}
    }
    let _ = writeln!(text, "  {}", end(session));
    text += "  Any running Anteroom that serves the namespace sees to that; this terminal may be closed.\n";
    if let Some(keeper) = keeper(before) {
        let _ = writeln!(
            text,
            "  Warning: {keeper} keeps this object and will put its annotations back, which ends the session early, \
             unless it is told to ignore them."
        );
    }
    let _ =
        writeln!(text, "To end it now: anteroom session stop {} -n {}", before.name(), before.namespace());
    text
}

/// What a stop has done.
pub fn stopped(before: &ScaledObject, session: Option<&Session>) -> String {
    let title = title(before);
    let Some(session) = session else {
        return match pause_of(before) {
            Some(pause) => format!("{title} has no session and is paused ({pause}). Nothing was changed.\n"),
            None => format!(
                "{title} has no session and is not paused. Nothing was changed; to pause it: kubectl annotate \
                 scaledobject {} -n {} autoscaling.keda.sh/paused=true\n",
                before.name(),
                before.namespace()
            ),
        };
    };
    match session.then {
        Then::Zero => format!("{title} is scaled to zero and paused there.\n"),
        Then::Pause => match &session.before {
            Some(replicas) => format!("{title} is paused again, with {replicas} replicas as before.\n"),
            None => format!("{title} is paused again. What runs goes on running; --to-zero ends it, too.\n"),
        },
    }
}

/// How a ScaledObject stands.
pub fn status(object: &ScaledObject, now: Timestamp) -> String {
    let title = title(object);
    let pause = pause_of(object);
    match (Session::of(object), pause) {
        (None, None) => format!("{title} has no session and is not paused: it scales as ever.\n"),
        (None, Some(pause)) => format!(
            "{title} has no session and is paused ({pause}).\nTo let it scale for some time: anteroom session start {} -n {} \
             --for 2h\n",
            object.name(),
            object.namespace()
        ),
        (Some(Err(until)), _) => format!(
            "{title} has a session whose end, \"{until}\", is no time: nobody will end it. Start it again, or stop it.\n"
        ),
        (Some(Ok(session)), pause) => {
            let mut text = match pause {
                None => format!("{title} scales until {}.\n", until(session.until, now)),
                Some(pause) => format!(
                    "{title} has a session until {}, but somebody has paused it meanwhile ({pause}).\n",
                    until(session.until, now)
                ),
            };
            let _ = writeln!(text, "  {}", end(&session));
            if is_late(&session, now) {
                text += "  It should be over, and nobody has ended it: is Anteroom running with `kubernetes` in its \
                         configuration, does it serve this namespace, and may it patch scaledobjects.keda.sh?\n";
            }
            text
        }
    }
}

/// The sessions among these ScaledObjects; `namespace`: all are of this one.
pub fn table(objects: &[ScaledObject], now: Timestamp, namespace: Option<&str>) -> String {
    let rows: Vec<[String; 5]> = objects
        .iter()
        .filter_map(|object| {
            let (state, time, then) = match Session::of(object)? {
                Err(until) => ("unreadable", until, "-"),
                Ok(session) => {
                    let state = match pause_of(object) {
                        Some(_) => "paused",
                        None if is_late(&session, now) => "overdue",
                        None => "running",
                    };
                    let then = if session.then == Then::Zero { "zero" } else { "pause" };
                    (state, until(session.until, now), then)
                }
            };
            let [namespace, name] = [object.namespace(), object.name()].map(str::to_owned);
            Some([namespace, name, state.into(), time, then.into()])
        })
        .collect();
    if rows.is_empty() {
        let place =
            namespace.map_or_else(|| "in any namespace".into(), |name| format!("in namespace {name}"));
        let paused = objects.iter().filter(|object| object.pause().is_some()).count();
        return format!("No session {place} ({} ScaledObjects, {paused} of them paused).\n", objects.len());
    }
    let head = ["NAMESPACE", "SCALEDOBJECT", "STATE", "UNTIL", "THEN"].map(str::to_owned);
    let width =
        |column: usize| rows.iter().chain([&head]).map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    let mut text = String::new();
    for row in [&head].into_iter().chain(&rows) {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

fn title(object: &ScaledObject) -> String {
    format!("ScaledObject {}/{}", object.namespace(), object.name())
}

fn end(session: &Session) -> String {
    match (session.then, &session.before) {
        (Then::Zero, _) => "Then it is scaled to zero and paused there.".into(),
        (Then::Pause, Some(replicas)) => {
            format!("Then it is paused again, with {replicas} replicas as before.")
        }
        (Then::Pause, None) => {
            "Then it is paused again. What runs then goes on running, and costs; --to-zero ends it, too."
                .into()
        }
    }
}

fn is_late(session: &Session, now: Timestamp) -> bool {
    Duration::try_from(now.duration_since(session.until)).is_ok_and(|late| late > LATE)
}

/// A moment in local time, and how far away it is.
fn until(then: Timestamp, now: Timestamp) -> String {
    let local = then.to_zoned(TimeZone::system());
    let local = local.strftime("%Y-%m-%d %H:%M:%S %Z");
    // To the second: fractions are of the clocks.
    let left = jiff::SignedDuration::from_secs((then.duration_since(now).as_secs_f64()).round() as i64);
    let whole = |seconds: i64| Period::from(Duration::from_secs(seconds.unsigned_abs()));
    match left.as_secs() {
        0 => format!("{local} (now)"),
        left if left > 0 => format!("{local} (in {})", whole(left)),
        late => format!("{local} ({} ago)", whole(late)),
    }
}

/// What keeps the object as a repository says.
fn keeper(object: &ScaledObject) -> Option<&'static str> {
    let marks = object.metadata.annotations.iter().chain(&object.metadata.labels);
    let mut keys = marks.flat_map(|marks| marks.keys());
    keys.find_map(|key| match key.split_once('/')?.0 {
        "argocd.argoproj.io" => Some("Argo CD"),
        "kustomize.toolkit.fluxcd.io" | "helm.toolkit.fluxcd.io" => Some("Flux"),
        _ => None,
    })
}
