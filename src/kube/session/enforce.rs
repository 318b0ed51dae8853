//! Enforces the end of sessions, regardless of the client that began them.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures_util::FutureExt;
use kube::{Api, core::DeserializeGuard};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    annotations::{EndAction, SESSIONS_DISABLED_MESSAGE, Session, UNTIL_ANNOTATION, annotate},
    clock::ApiServerClock,
};
use crate::kube::{
    Cluster, ScaledObject, ScaledObjects,
    events::{EventNotice, EventSubject, Events},
};

/// Maximum interval between checks; also the retry interval after a failed end.
const MAX_CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Validity of a time read from the API server; clocks drift by less than a second meanwhile.
const CLOCK_VALIDITY: Duration = Duration::from_secs(600);

const SESSION_WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Delay before the next check after a conflict; the watch delivers the change within moments.
const CONFLICT_DELAY: Duration = Duration::from_secs(1);

/// Pauses each ScaledObject again at the end of its session. Runs on every replica: writes are conditional on the
/// resource version, so only one replica's write succeeds. If sessions are disabled, reports each new session
/// instead, since nothing will end it. Never returns.
pub async fn enforce(cluster: Cluster, mut scaled_objects: watch::Receiver<ScaledObjects>, events: Events) {
    let mut objects = scaled_objects.borrow_and_update().clone();
    let mut clock = ApiServerClock::of_machine();
    // The local clock is used until the API server has reported its time.
    let mut fresh = false;
    // Keys of the problems already logged.
    let mut logged = HashSet::new();
    loop {
        let mut sessions = sessions(&objects, &mut logged);
        if !cluster.ends_sessions() {
            for (object, session) in sessions.drain(..) {
                object.0.iter().for_each(|object| report(object, &session, &mut logged, &events));
            }
        }
        if !sessions.is_empty() && (!fresh || clock.age() > CLOCK_VALIDITY) {
            match ApiServerClock::of_server(cluster.client()).await {
                Some(server) => (clock, fresh) = (server, true),
                None => fresh = false,
            }
        }
        let now = clock.now();
        let mut wait = MAX_CHECK_INTERVAL;
        for (object, session) in sessions {
            let left = session.until.duration_since(now);
            if left.is_positive() {
                // The server reports whole seconds, so the remainder may round to zero.
                wait = wait
                    .min(Duration::try_from(left).unwrap_or(MAX_CHECK_INTERVAL))
                    .max(Duration::from_millis(1));
                continue;
            }
            if let Some(object) = object.0.as_ref().ok()
                && end_overdue_session(&cluster, object, &session, &mut logged, &events).await
            {
                wait = wait.min(CONFLICT_DELAY);
            }
        }
        tokio::select! {
            biased; // changes before the periodic check
            Ok(()) = scaled_objects.changed() => objects = scaled_objects.borrow_and_update().clone(),
            () = objects.changed() => {}
            () = sleep(wait) => {}
        }
        // Coalesces changes: each check costs a scan.
        while objects.changed().now_or_never().is_some() {}
    }
}

type FoundSession = (Arc<DeserializeGuard<ScaledObject>>, Session);

fn sessions(objects: &ScaledObjects, logged: &mut HashSet<String>) -> Vec<FoundSession> {
    let sessions = objects.all().into_iter().filter_map(|guard| {
        let object = guard.0.as_ref().ok()?;
        match Session::of(object)? {
            Ok(session) => Some((guard, session)),
            Err(text) => {
                let (namespace, name) = (object.namespace(), object.name());
                if logged.insert(format!("{namespace}/{name} {text}")) {
                    let key = UNTIL_ANNOTATION;
                    tracing::warn!(
                        scaled_object = format!("{namespace}/{name}"),
                        "{key}: \"{text}\" is not a time (RFC 3339), so this session is never ended"
                    );
                }
                None
            }
        }
    });
    sessions.collect()
}

/// Reports a session that no replica ends, once per end time.
fn report(object: &ScaledObject, session: &Session, logged: &mut HashSet<String>, events: &Events) {
    let (namespace, name, until) = (object.namespace(), object.name(), session.until);
    if !logged.insert(format!("{namespace}/{name} {until}")) {
        return;
    }
    let note = format!("No replica ends the session until {until}: {SESSIONS_DISABLED_MESSAGE}");
    tracing::warn!(scaled_object = format!("{namespace}/{name}"), "{note}");
    events.publish(EventNotice {
        about: EventSubject::ScaledObject { namespace: namespace.into(), name: name.into() },
        is_warning: true,
        reason: "SessionsDisabled",
        note,
    });
}

/// Ends an overdue session. Returns whether to check again soon.
async fn end_overdue_session(
    cluster: &Cluster,
    object: &ScaledObject,
    session: &Session,
    logged: &mut HashSet<String>,
    events: &Events,
) -> bool {
    let (namespace, name) = (object.namespace(), object.name());
    let full_name = format!("{namespace}/{name}");
    let api: Api<ScaledObject> = cluster.api(namespace);
    // Bounded, so that an unresponsive API server does not delay the other sessions.
    let Ok(annotated) = timeout(SESSION_WRITE_TIMEOUT, annotate(&api, object, session.ended())).await else {
        return true;
    };
    match annotated {
        Ok(()) => {
            logged.remove(&full_name);
            let what = match session.then {
                EndAction::Pause => "autoscaling is paused again",
                EndAction::Zero => "scaled to zero, and autoscaling is paused there",
            };
            tracing::info!(scaled_object = full_name, until = %session.until, "session over: {what}");
            events.publish(EventNotice {
                about: EventSubject::ScaledObject { namespace: namespace.into(), name: name.into() },
                is_warning: false,
                reason: "SessionEnded",
                note: format!("The session until {} is over: {what}", session.until),
            });
            false
        }
        // The session was ended by another replica, or the object was changed or deleted: the watch will deliver
        // that.
        Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => true,
        Err(error) => {
            if logged.insert(full_name.clone()) {
                tracing::error!(
                    scaled_object = full_name, %error,
                    "cannot end an overdue session: the role needs `patch` on scaledobjects.keda.sh (chart: sessions.enabled)"
                );
            }
            false
        }
    }
}

#[cfg(test)]
mod tests;
