//! A session as annotations of its ScaledObject.

use jiff::Timestamp;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Map, Value, json};

use crate::kube::scaled_objects::{PAUSED, PAUSED_REPLICAS, PAUSED_SCALE_OUT, ScaledObject};

/// Annotation: end of the session, RFC 3339.
pub const UNTIL: &str = "anteroom.dev/session-until";
/// Annotation: action at the end, `pause` or `zero`.
pub const THEN: &str = "anteroom.dev/session-then";
/// Annotation: number of replicas at which the object was paused before.
pub const BEFORE: &str = "anteroom.dev/session-paused-replicas";

/// Reason why sessions are disabled, and the remedy.
pub(super) const SWITCHED_OFF: &str = "sessions are switched off; set `sessions.enabled: true` in the chart's values (without the \
     chart: `kubernetes.sessions: true`, and the right to patch scaledobjects.keda.sh)";

/// Action at the end of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EndAction {
    /// Restores the previous pause. Running replicas keep running.
    #[default]
    Pause,
    /// Scales to zero and pauses there.
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
        let until = object.annotation(UNTIL)?;
        let Ok(until) = until.parse() else { return Some(Err(until.to_owned())) };
        // An unknown action means pause, the end of every session.
        let then = if object.annotation(THEN) == Some(EndAction::Zero.name()) {
            EndAction::Zero
        } else {
            EndAction::Pause
        };
        Some(Ok(Self { until, then, before: object.annotation(BEFORE).map(str::to_owned) }))
    }

    /// Builds a new or extended session for the current object.
    pub fn start(object: &ScaledObject, until: Timestamp, to_zero: bool) -> Self {
        let running = Self::of(object).and_then(Result::ok);
        let then = match &running {
            _ if to_zero => EndAction::Zero,
            Some(running) => running.then,
            None => EndAction::Pause,
        };
        let paused_with = object.annotation(PAUSED_REPLICAS).map(str::to_owned);
        let before = paused_with.or_else(|| object.annotation(BEFORE).map(str::to_owned));
        Self { until, then, before }
    }

    /// Returns the annotations of a running session; null removes one.
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

    /// Returns the annotations that end the session.
    pub fn ended(&self) -> Value {
        let mut annotations = Map::new();
        for key in [UNTIL, THEN, BEFORE] {
            annotations.insert(key.into(), Value::Null);
        }
        annotations.insert(PAUSED.into(), "true".into());
        let replicas = match self.then {
            EndAction::Zero => Some("0"),
            EndAction::Pause => self.before.as_deref(),
        };
        if let Some(replicas) = replicas {
            annotations.insert(PAUSED_REPLICAS.into(), replicas.into());
        }
        annotations.into()
    }
}
