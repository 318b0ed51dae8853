//! A session as annotations of its ScaledObject.

use jiff::Timestamp;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Map, Value, json};

use crate::kube::scaled_objects::{
    PAUSED_ANNOTATION, PAUSED_REPLICAS_ANNOTATION, PAUSED_SCALE_OUT_ANNOTATION, ScaledObject,
};

/// Annotation: end of the session, RFC 3339.
pub const UNTIL_ANNOTATION: &str = "anteroom.dev/session-until";
/// Annotation: action at the end, `pause` or `zero`.
pub const THEN_ANNOTATION: &str = "anteroom.dev/session-then";
/// Annotation: number of replicas at which the object was paused before.
pub const PREVIOUS_REPLICAS_ANNOTATION: &str = "anteroom.dev/session-paused-replicas";

/// Reason why sessions are disabled, and the remedy.
pub(super) const SESSIONS_DISABLED_MESSAGE: &str = "sessions are switched off; set `sessions.enabled: true` in the chart's values (without the \
     chart: `kubernetes.sessions: true`, and the right to patch scaledobjects.keda.sh)";

/// Action at the end of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EndAction {
    /// Restores the previous pause. Running replicas keep running.
    #[default]
    Pause,
    /// Scales to zero and pauses at zero.
    Zero,
}

/// A session as stored on its object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// End of the session.
    pub until: Timestamp,
    /// Action at the end.
    pub then: EndAction,
    /// Number of replicas at which the object was paused before.
    pub before: Option<String>,
}

/// Patches annotations, conditional on the resource version that was read.
pub(super) async fn annotate(
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

// === impl EndAction ===

impl EndAction {
    const fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Zero => "zero",
        }
    }
}

// === impl Session ===

impl Session {
    /// Parses the session of an object. The error is the text that is not a valid time.
    pub fn of(object: &ScaledObject) -> Option<Result<Self, String>> {
        let until = object.annotation(UNTIL_ANNOTATION)?;
        let Ok(until) = until.parse() else { return Some(Err(until.to_owned())) };
        // An unknown action means pause, the end of every session.
        let then = if object.annotation(THEN_ANNOTATION) == Some(EndAction::Zero.name()) {
            EndAction::Zero
        } else {
            EndAction::Pause
        };
        Some(Ok(Self {
            until,
            then,
            before: object.annotation(PREVIOUS_REPLICAS_ANNOTATION).map(str::to_owned),
        }))
    }

    /// Builds a new or extended session for the current object.
    pub fn start(object: &ScaledObject, until: Timestamp, to_zero: bool) -> Self {
        let running = Self::of(object).and_then(Result::ok);
        let then = match &running {
            _ if to_zero => EndAction::Zero,
            Some(running) => running.then,
            None => EndAction::Pause,
        };
        let paused_with = object.annotation(PAUSED_REPLICAS_ANNOTATION).map(str::to_owned);
        let before =
            paused_with.or_else(|| object.annotation(PREVIOUS_REPLICAS_ANNOTATION).map(str::to_owned));
        Self { until, then, before }
    }

    /// Returns the annotations of a running session; null removes one.
    pub fn running(&self) -> Value {
        json!({
            UNTIL_ANNOTATION: self.until.to_string(),
            THEN_ANNOTATION: self.then.name(),
            PREVIOUS_REPLICAS_ANNOTATION: self.before,
            PAUSED_ANNOTATION: null,
            PAUSED_REPLICAS_ANNOTATION: null,
            PAUSED_SCALE_OUT_ANNOTATION: null,
        })
    }

    /// Returns the annotations that end the session.
    pub fn ended(&self) -> Value {
        let mut annotations = Map::new();
        for key in [UNTIL_ANNOTATION, THEN_ANNOTATION, PREVIOUS_REPLICAS_ANNOTATION] {
            annotations.insert(key.into(), Value::Null);
        }
        annotations.insert(PAUSED_ANNOTATION.into(), "true".into());
        let replicas = match self.then {
            EndAction::Zero => Some("0"),
            EndAction::Pause => self.before.as_deref(),
        };
        if let Some(replicas) = replicas {
            annotations.insert(PAUSED_REPLICAS_ANNOTATION.into(), replicas.into());
        }
        annotations.into()
    }
}
