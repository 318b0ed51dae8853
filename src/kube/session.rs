//! Sessions: a paused ScaledObject scales for some time, and is paused again at the end of it.
//!
//! The end is written down on the object itself, so that it comes also when whoever began the session is gone: every
//! running replica of this proxy sees to it ([`enforce`]).

mod clock;
mod enforce;

use std::time::Duration;

use jiff::Timestamp;
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Map, Value, json};
use thiserror::Error;

pub use clock::Clock;
pub use enforce::enforce;

use super::scaled_objects::{PAUSED, PAUSED_REPLICAS, PAUSED_SCALE_OUT, Pause, ScaledObject};
use crate::domain::Period;

/// When the session ends, RFC 3339.
pub const UNTIL: &str = "anteroom.dev/session-until";
/// What its end does: `pause` or `zero`.
pub const THEN: &str = "anteroom.dev/session-then";
/// The number of replicas that it was paused with before.
pub const BEFORE: &str = "anteroom.dev/session-paused-replicas";
/// `disabled` says that no replica ends sessions of this object. The chart sets it with `sessions.enabled: false`.
pub const SESSIONS: &str = "anteroom.dev/sessions";

/// Why there are no sessions, and the way out.
const SWITCHED_OFF: &str = "sessions are switched off; set `sessions.enabled: true` in the chart's values (without the \
                            chart: `kubernetes.sessions: true`, and the right to patch scaledobjects.keda.sh)";

/// The longest session.
pub const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);

/// What the end of a session does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Then {
    /// Pauses as it was before. What runs goes on running.
    #[default]
    Pause,
    /// Scales to zero, and pauses there.
    Zero,
}

/// A session, as its object says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// When it ends.
    pub until: Timestamp,
    /// What happens then.
    pub then: Then,
    /// The number of replicas that it was paused with before.
    pub before: Option<String>,
}

/// The sessions of a namespace, for who starts and ends them.
pub struct Sessions {
    client: Client,
    namespace: String,
}

/// Why something could not be done with a session.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum SessionError {
    #[error("--for {0}: a session takes at least a second and at most {longest}", longest = Period::from(LONGEST))]
    Duration(Period),
    #[error("there is no ScaledObject `{name}` in namespace `{namespace}`{}", there_are(.known))]
    Unknown { name: String, namespace: String, known: Vec<String> },
    #[error("this cluster has no ScaledObjects (keda.sh/v1alpha1): KEDA is not installed")]
    NoKeda,
    #[error(
        "you may not {verb} ScaledObjects in namespace `{namespace}`: {message}. Ask for the verb `{verb}` on \
         scaledobjects.keda.sh; `kubectl auth can-i {verb} scaledobjects.keda.sh -n {namespace}` says whether you have it"
    )]
    Forbidden { verb: &'static str, namespace: String, message: String },
    #[error("ScaledObject `{0}` would not be paused again: {SWITCHED_OFF}")]
    SwitchedOff(String),
    #[error("ScaledObject `{0}` is changed by somebody else all the time; try again")]
    Busy(String),
    #[error("the API server did not do it: {0}")]
    Api(#[from] kube::Error),
}

fn there_are(names: &[String]) -> String {
    const SHOWN: usize = 20;
    match names {
        [] => "; there are none".into(),
        names if names.len() > SHOWN => {
            format!("; there are {}, … ({})", names[..SHOWN].join(", "), names.len())
        }
        names => format!("; there are {}", names.join(", ")),
    }
}

/// Whether a session may take so long.
///
/// # Errors
/// [`SessionError::Duration`].
pub fn check_period(period: Period) -> Result<(), SessionError> {
    if (Duration::from_secs(1)..=LONGEST).contains(&period.get()) {
        return Ok(());
    }
    Err(SessionError::Duration(period))
}

// === impl Then ===

impl Then {
    const fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Zero => "zero",
        }
    }
}

// === impl Session ===

impl Session {
    /// The session of an object, if it has one. The text is what stands there instead of a time.
    pub fn of(object: &ScaledObject) -> Option<Result<Self, String>> {
        let until = object.annotation(UNTIL)?;
        let Ok(until) = until.parse() else { return Some(Err(until.to_owned())) };
        // Who does not know what is wanted pauses: that is what every session ends with.
        let then = if object.annotation(THEN) == Some(Then::Zero.name()) { Then::Zero } else { Then::Pause };
        Some(Ok(Self { until, then, before: object.annotation(BEFORE).map(str::to_owned) }))
    }

    /// The session that begins, or goes on, with an object as it is now.
    pub fn start(object: &ScaledObject, until: Timestamp, to_zero: bool) -> Self {
        let running = Self::of(object).and_then(Result::ok);
        let then = match &running {
            _ if to_zero => Then::Zero,
            Some(running) => running.then,
            None => Then::Pause,
        };
        let paused_with = object.annotation(PAUSED_REPLICAS).map(str::to_owned);
        let before = paused_with.or_else(|| object.annotation(BEFORE).map(str::to_owned));
        Self { until, then, before }
    }

    /// The annotations that have it run; null removes one.
    pub fn running(&self) -> Value {
        json!({
            UNTIL: self.until.to_string(),
            THEN: self.then.name(),
            BEFORE: self.before,
            PAUSED: null,
            PAUSED_REPLICAS: null,
            PAUSED_SCALE_OUT: null,
        })
    }

    /// The annotations that end it.
    pub fn ended(&self) -> Value {
        let mut annotations = Map::new();
        for key in [UNTIL, THEN, BEFORE] {
            annotations.insert(key.into(), Value::Null);
        }
        annotations.insert(PAUSED.into(), "true".into());
        let replicas = match self.then {
            Then::Zero => Some("0"),
            Then::Pause => self.before.as_deref(),
        };
        if let Some(replicas) = replicas {
            annotations.insert(PAUSED_REPLICAS.into(), replicas.into());
        }
        annotations.into()
    }
}

// === impl Sessions ===

impl Sessions {
    /// How often a change is tried that somebody else was faster than.
    const TRIES: usize = 5;

    /// Those of `namespace`.
    pub const fn new(client: Client, namespace: String) -> Self {
        Self { client, namespace }
    }

    /// Which namespace they are of.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    fn api(&self) -> Api<ScaledObject> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// All ScaledObjects, by name.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn list(&self) -> Result<Vec<ScaledObject>, SessionError> {
        self.listed(&self.api()).await
    }

    /// The ScaledObjects of all namespaces.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn list_everywhere(&self) -> Result<Vec<ScaledObject>, SessionError> {
        self.listed(&Api::all(self.client.clone())).await
    }

    async fn listed(&self, api: &Api<ScaledObject>) -> Result<Vec<ScaledObject>, SessionError> {
        let list = api.list(&ListParams::default()).await;
        let mut objects = list.map_err(|error| self.explain("list", error))?.items;
        objects.sort_by(|a, b| (a.namespace(), a.name()).cmp(&(b.namespace(), b.name())));
        Ok(objects)
    }

    /// One of them.
    ///
    /// # Errors
    /// When there is none of this name, or it may not be read.
    pub async fn get(&self, name: &str) -> Result<ScaledObject, SessionError> {
        match self.api().get_opt(name).await {
            Ok(Some(object)) => Ok(object),
            Ok(None) => {
                let known = self.list().await?;
                let known = known.iter().map(|object| object.name().to_owned()).collect();
                Err(SessionError::Unknown { name: name.into(), namespace: self.namespace.clone(), known })
            }
            Err(error) => Err(self.explain("get", error)),
        }
    }

    /// Has a ScaledObject scale for `period` from now on, whether a session runs or not. Gives back what it was before,
    /// and the session.
    ///
    /// # Errors
    /// When the time is none, no replica would end the session, or the object cannot be changed.
    pub async fn start(
        &self,
        name: &str,
        period: Period,
        to_zero: bool,
        clock: &Clock,
    ) -> Result<(ScaledObject, Session), SessionError> {
        check_period(period)?;
        let until = clock.now().saturating_add(period.get()).unwrap_or(Timestamp::MAX);
        // Nobody reads fractions, and they would make two of one session.
        let until = Timestamp::from_second(until.as_second()).unwrap_or(until);
        self.change(name, |object| {
            if object.annotation(SESSIONS) == Some("disabled") {
                return Err(SessionError::SwitchedOff(format!("{}/{name}", self.namespace)));
            }
            let session = Session::start(object, until, to_zero);
            Ok(Some((session.running(), session)))
        })
        .await
        .map(|(before, session)| {
            (before, session.unwrap_or(Session { until, then: Then::Pause, before: None }))
        })
    }

    /// Ends the session of a ScaledObject now. Gives back what it was before, and the session if there was one.
    ///
    /// # Errors
    /// When the object cannot be changed.
    pub async fn stop(
        &self,
        name: &str,
        to_zero: bool,
    ) -> Result<(ScaledObject, Option<Session>), SessionError> {
        self.change(name, |object| {
            // One that cannot be read is ended all the same.
            let unreadable = |_| Session { until: Timestamp::UNIX_EPOCH, then: Then::Pause, before: None };
            let Some(session) = Session::of(object) else { return Ok(None) };
            let mut session = session.unwrap_or_else(unreadable);
            if to_zero {
                session.then = Then::Zero;
            }
            Ok(Some((session.ended(), session)))
        })
        .await
    }

    /// Changes the annotations of an object as `how` says, if at all, unless somebody else was faster; then again.
    async fn change<T>(
        &self,
        name: &str,
        how: impl Fn(&ScaledObject) -> Result<Option<(Value, T)>, SessionError>,
    ) -> Result<(ScaledObject, Option<T>), SessionError> {
        for _ in 0..Self::TRIES {
            let object = self.get(name).await?;
            let Some((annotations, result)) = how(&object)? else { return Ok((object, None)) };
            match annotate(&self.api(), &object, annotations).await {
                Ok(()) => return Ok((object, Some(result))),
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(self.explain("patch", error)),
            }
        }
        Err(SessionError::Busy(format!("{}/{name}", self.namespace)))
    }

    fn explain(&self, verb: &'static str, error: kube::Error) -> SessionError {
        match error {
            kube::Error::Api(status) if status.code == 403 => SessionError::Forbidden {
                verb,
                namespace: self.namespace.clone(),
                message: status.message.trim_end_matches('.').to_owned(),
            },
            // Of a list it means that there is no such kind.
            kube::Error::Api(status) if status.code == 404 => SessionError::NoKeda,
            error => SessionError::Api(error),
        }
    }
}

/// Changes annotations of an object, if it is still as it was read.
async fn annotate(
    api: &Api<ScaledObject>,
    object: &ScaledObject,
    annotations: Value,
) -> Result<(), kube::Error> {
    let patch = json!({
        "metadata": { "resourceVersion": object.metadata.resource_version, "annotations": annotations },
    });
    let params = PatchParams { field_manager: Some("anteroom-session".into()), ..PatchParams::default() };
    api.patch(object.name(), &params, &Patch::Merge(patch)).await.map(drop)
}

/// How an object is paused, in KEDA's own words.
pub fn pause_of(object: &ScaledObject) -> Option<String> {
    let value = |key: &str| format!("{key}: {:?}", object.annotation(key).unwrap_or_default());
    Some(match object.pause()? {
        Pause::Frozen if object.annotation(PAUSED_REPLICAS).is_none() => value(PAUSED),
        Pause::Frozen | Pause::At(_) => value(PAUSED_REPLICAS),
        Pause::ScaleOut => value(PAUSED_SCALE_OUT),
    })
}

#[cfg(test)]
mod tests;
