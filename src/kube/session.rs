//! Sessions: temporary scaling of a paused ScaledObject, which is paused again at the end.
//!
//! The end is stored in annotations of the object, so that it is enforced even if the client that began the session is
//! gone: every running replica of the proxy does so ([`enforce`]).

mod annotations;
mod clock;
mod enforce;

use std::time::Duration;

use jiff::Timestamp;
use kube::{Api, Client, api::ListParams};
use serde_json::Value;
use thiserror::Error;

pub use annotations::{EndAction, PREVIOUS_REPLICAS_ANNOTATION, Session, THEN_ANNOTATION, UNTIL_ANNOTATION};
pub use clock::ApiServerClock;
pub use enforce::enforce;

use annotations::{SESSIONS_DISABLED_MESSAGE, annotate};

use super::scaled_objects::{
    PAUSED_ANNOTATION, PAUSED_REPLICAS_ANNOTATION, PAUSED_SCALE_OUT_ANNOTATION, Pause, ScaledObject,
};
use crate::domain::Period;

/// Annotation: `disabled` if no replica ends sessions of this object. The chart sets it with `sessions.enabled: false`.
pub const SESSIONS_ANNOTATION: &str = "anteroom.dev/sessions";

/// Upper bound of a session.
pub const MAX_SESSION_PERIOD: Duration = Duration::from_secs(30 * 24 * 3600);

/// Client for the sessions of a namespace.
pub struct Sessions {
    client: Client,
    namespace: String,
}

/// Failure of a session operation.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum SessionError {
    #[error("--for {0}: a session takes at least a second and at most {longest}", longest = Period::from(MAX_SESSION_PERIOD))]
    Duration(Period),
    #[error("there is no ScaledObject `{name}` in namespace `{namespace}`{}", list_existing_names(.known))]
    Unknown { name: String, namespace: String, known: Vec<String> },
    #[error("this cluster has no ScaledObjects (keda.sh/v1alpha1): KEDA is not installed")]
    NoKeda,
    #[error(
        "you may not {verb} ScaledObjects in namespace `{namespace}`: {message}. Ask for the verb `{verb}` on \
         scaledobjects.keda.sh; `kubectl auth can-i {verb} scaledobjects.keda.sh -n {namespace}` shows whether you have it"
    )]
    Forbidden { verb: &'static str, namespace: String, message: String },
    #[error("ScaledObject `{0}` would not be paused again: {SESSIONS_DISABLED_MESSAGE}")]
    SwitchedOff(String),
    #[error("ScaledObject `{0}` keeps being changed by another client; try again")]
    Busy(String),
    #[error("the API server failed the request: {0}")]
    Api(#[from] kube::Error),
}

fn list_existing_names(names: &[String]) -> String {
    const SHOWN: usize = 20;
    match names {
        [] => "; there are none".into(),
        names if names.len() > SHOWN => {
            format!("; there are {}, … ({})", names[..SHOWN].join(", "), names.len())
        }
        names => format!("; there are {}", names.join(", ")),
    }
}

/// Validates the length of a session.
///
/// # Errors
/// [`SessionError::Duration`].
pub fn check_period(period: Period) -> Result<(), SessionError> {
    if (Duration::from_secs(1)..=MAX_SESSION_PERIOD).contains(&period.get()) {
        return Ok(());
    }
    Err(SessionError::Duration(period))
}

// === impl Sessions ===

impl Sessions {
    /// Maximum number of attempts per change, in case of conflicts.
    const MAX_ATTEMPTS: usize = 5;

    /// Creates a client for `namespace`.
    pub const fn new(client: Client, namespace: String) -> Self {
        Self { client, namespace }
    }

    /// Returns the namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    fn api(&self) -> Api<ScaledObject> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Lists the ScaledObjects of the namespace, sorted by name.
    ///
    /// # Errors
    /// Returns an error if the list fails.
    pub async fn list(&self) -> Result<Vec<ScaledObject>, SessionError> {
        self.listed(&self.api()).await
    }

    /// Lists the ScaledObjects of all namespaces.
    ///
    /// # Errors
    /// Returns an error if the list fails.
    pub async fn list_everywhere(&self) -> Result<Vec<ScaledObject>, SessionError> {
        self.listed(&Api::all(self.client.clone())).await
    }

    async fn listed(&self, api: &Api<ScaledObject>) -> Result<Vec<ScaledObject>, SessionError> {
        let list = api.list(&ListParams::default()).await;
        let mut objects = list.map_err(|error| self.explain("list", error))?.items;
        objects.sort_by(|a, b| (a.namespace(), a.name()).cmp(&(b.namespace(), b.name())));
        Ok(objects)
    }

    /// Returns a ScaledObject.
    ///
    /// # Errors
    /// Returns an error if it does not exist or cannot be read.
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

    /// Starts a session of length `period`, or moves the end of the running one. Returns the object before the change,
    /// and the session.
    ///
    /// # Errors
    /// Returns an error if the period is invalid, sessions are disabled, or the object cannot be changed.
    pub async fn start(
        &self,
        name: &str,
        period: Period,
        to_zero: bool,
        clock: &ApiServerClock,
    ) -> Result<(ScaledObject, Session), SessionError> {
        check_period(period)?;
        let until = clock.now().saturating_add(period.get()).unwrap_or(Timestamp::MAX);
        // Whole seconds: fractions are noise, and would give one session two representations.
        let until = Timestamp::from_second(until.as_second()).unwrap_or(until);
        self.change(name, |object| {
            if object.annotation(SESSIONS_ANNOTATION) == Some("disabled") {
                return Err(SessionError::SwitchedOff(format!("{}/{name}", self.namespace)));
            }
            let session = Session::start(object, until, to_zero);
            Ok(Some((session.running(), session)))
        })
        .await
        .map(|(before, session)| {
            (before, session.unwrap_or(Session { until, then: EndAction::Pause, before: None }))
        })
    }

    /// Ends the session of a ScaledObject. Returns the object before the change, and the session if there was one.
    ///
    /// # Errors
    /// Returns an error if the object cannot be changed.
    pub async fn stop(
        &self,
        name: &str,
        to_zero: bool,
    ) -> Result<(ScaledObject, Option<Session>), SessionError> {
        self.change(name, |object| {
            // A malformed session is ended as well.
            let unreadable =
                |_| Session { until: Timestamp::UNIX_EPOCH, then: EndAction::Pause, before: None };
            let Some(session) = Session::of(object) else { return Ok(None) };
            let mut session = session.unwrap_or_else(unreadable);
            if to_zero {
                session.then = EndAction::Zero;
            }
            Ok(Some((session.ended(), session)))
        })
        .await
    }

    /// Applies the annotations returned by `how`, if any; retries on conflict.
    async fn change<T>(
        &self,
        name: &str,
        how: impl Fn(&ScaledObject) -> Result<Option<(Value, T)>, SessionError>,
    ) -> Result<(ScaledObject, Option<T>), SessionError> {
        for _ in 0..Self::MAX_ATTEMPTS {
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
            // For a list, 404 means that the kind is not installed.
            kube::Error::Api(status) if status.code == 404 => SessionError::NoKeda,
            error => SessionError::Api(error),
        }
    }
}

/// Returns the annotation that pauses an object, as `key: "value"`.
pub fn pause_annotation_of(object: &ScaledObject) -> Option<String> {
    let value = |key: &str| format!("{key}: {:?}", object.annotation(key).unwrap_or_default());
    Some(match object.pause()? {
        Pause::Frozen if object.annotation(PAUSED_REPLICAS_ANNOTATION).is_none() => value(PAUSED_ANNOTATION),
        Pause::Frozen | Pause::At(_) => value(PAUSED_REPLICAS_ANNOTATION),
        Pause::ScaleOut => value(PAUSED_SCALE_OUT_ANNOTATION),
    })
}

#[cfg(test)]
mod tests;
