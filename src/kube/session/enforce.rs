//! The end of sessions, whoever began them.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures_util::FutureExt;
use kube::{Api, core::DeserializeGuard};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{Clock, SWITCHED_OFF, Session, Then, annotate};
use crate::kube::{
    Cluster, ScaledObject, ScaledObjects,
    events::{About, Events, Notice},
};

/// How often sessions are looked at, whatever happens; also how often one that could not be ended is tried again.
const LOOK: Duration = Duration::from_secs(60);

/// How long a time that was read from the API server holds. Clocks drift by less than a second in that.
const FRESH: Duration = Duration::from_secs(600);

/// How long the API server has.
const PATIENCE: Duration = Duration::from_secs(10);

/// How soon it is looked again after somebody else was faster: the watch tells of that in a moment.
const AGAIN: Duration = Duration::from_secs(1);

/// Pauses each of the ScaledObjects again when its session has ended. Every replica does that: a change is made only to
/// the object as it was read, so that the first one wins. Where sessions are switched off, reports each instead, as soon as
/// it is seen. Never ends by itself.
pub async fn enforce(cluster: Cluster, mut scaled_objects: watch::Receiver<ScaledObjects>, events: Events) {
    let mut objects = scaled_objects.borrow_and_update().clone();
    let mut clock = Clock::of_machine();
    // Our own clock counts until the API server has told the time.
    let mut fresh = false;
    // Told once each.
    let mut complained = HashSet::new();
    loop {
        let mut sessions = sessions(&objects, &mut complained);
        if !cluster.ends_sessions() {
            for (object, session) in sessions.drain(..) {
                object.0.iter().for_each(|object| report(object, &session, &mut complained, &events));
            }
        }
        if !sessions.is_empty() && (!fresh || clock.age() > FRESH) {
            match Clock::of_server(cluster.client()).await {
                Some(server) => (clock, fresh) = (server, true),
                None => fresh = false,
            }
        }
        let now = clock.now();
        let mut wait = LOOK;
        for (object, session) in sessions {
            let left = session.until.duration_since(now);
            if left.is_positive() {
                // At least a second of the server's, which tells whole ones.
                wait = wait.min(Duration::try_from(left).unwrap_or(LOOK)).max(Duration::from_millis(1));
                continue;
            }
            if let Some(object) = object.0.as_ref().ok()
                && end(&cluster, object, &session, &mut complained, &events).await
            {
                wait = wait.min(AGAIN);
            }
        }
        tokio::select! {
            biased; // what is new is looked at before what is known
            Ok(()) = scaled_objects.changed() => objects = scaled_objects.borrow_and_update().clone(),
            () = objects.changed() => {}
            () = sleep(wait) => {}
        }
        // Many objects may change at once, and each look costs.
        while objects.changed().now_or_never().is_some() {}
    }
}

type Found = (Arc<DeserializeGuard<ScaledObject>>, Session);

fn sessions(objects: &ScaledObjects, complained: &mut HashSet<String>) -> Vec<Found> {
    let sessions = objects.all().into_iter().filter_map(|guard| {
        let object = guard.0.as_ref().ok()?;
        match Session::of(object)? {
            Ok(session) => Some((guard, session)),
            Err(text) => {
                let (namespace, name) = (object.namespace(), object.name());
                if complained.insert(format!("{namespace}/{name} {text}")) {
                    let key = super::UNTIL;
                    tracing::warn!(
                        scaled_object = format!("{namespace}/{name}"),
                        "{key}: \"{text}\" is no time (RFC 3339), so that nobody ends this session"
                    );
                }
                None
            }
        }
    });
    sessions.collect()
}

/// Reports a session that nobody ends, once for each end that it is given.
fn report(object: &ScaledObject, session: &Session, complained: &mut HashSet<String>, events: &Events) {
    let (namespace, name, until) = (object.namespace(), object.name(), session.until);
    if !complained.insert(format!("{namespace}/{name} {until}")) {
        return;
    }
    let note = format!("No replica ends the session until {until}: {SWITCHED_OFF}");
    tracing::warn!(scaled_object = format!("{namespace}/{name}"), "{note}");
    events.tell(Notice {
        about: About::ScaledObject { namespace: namespace.into(), name: name.into() },
        is_warning: true,
        reason: "SessionsDisabled",
        note,
    });
}

/// Ends a session that is over. Says whether to look again soon.
async fn end(
    cluster: &Cluster,
    object: &ScaledObject,
    session: &Session,
    complained: &mut HashSet<String>,
    events: &Events,
) -> bool {
    let (namespace, name) = (object.namespace(), object.name());
    let full_name = format!("{namespace}/{name}");
    let api: Api<ScaledObject> = cluster.api(namespace);
    // The other sessions do not wait for an API server that has vanished without a word.
    let Ok(annotated) = timeout(PATIENCE, annotate(&api, object, session.ended())).await else { return true };
    match annotated {
        Ok(()) => {
            complained.remove(&full_name);
            let what = match session.then {
                Then::Pause => "autoscaling is paused again",
                Then::Zero => "scaled to zero, and autoscaling is paused there",
            };
            tracing::info!(scaled_object = full_name, until = %session.until, "session over: {what}");
            events.tell(Notice {
                about: About::ScaledObject { namespace: namespace.into(), name: name.into() },
                is_warning: false,
                reason: "SessionEnded",
                note: format!("The session until {} is over: {what}", session.until),
            });
            false
        }
        // Another replica has ended it, or somebody has changed it: the watch will tell.
        Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => true,
        Err(error) => {
            if complained.insert(full_name.clone()) {
                tracing::error!(
                    scaled_object = full_name, %error,
                    "a session is over, and cannot be ended: our role needs `patch` of scaledobjects.keda.sh (chart: sessions.enabled)"
                );
            }
            false
        }
    }
}

#[cfg(test)]
mod tests;
