//! Routes as objects of the cluster.

use serde_json::{Value, json};

use crate::{model, scenario::Scenario, wait};

/// `anteroom.dev/v1alpha1`.
pub(crate) const OURS: &str = "anteroom.dev/v1alpha1";
/// `http.keda.sh/v1beta1`.
pub(crate) const THEIRS: &str = "http.keda.sh/v1beta1";

/// A ModelRoute to the Service of its name, for the model of its name; `more` of its spec wins, and null takes away.
pub(crate) fn model_route(name: &str, more: Value) -> Value {
    let mut spec = json!({
        "match": { "models": [name] },
        "target": { "service": { "name": name, "port": 80 } },
    });
    model::merge(&mut spec, &more);
    let spec = without_nulls(spec);
    json!({ "apiVersion": OURS, "kind": "ModelRoute", "metadata": { "name": name }, "spec": spec })
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(kept.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        other => other,
    }
}

/// An InterceptorRoute with this spec.
pub(crate) fn interceptor_route(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": THEIRS, "kind": "InterceptorRoute", "metadata": { "name": name }, "spec": spec })
}

// === impl Scenario ===

impl Scenario {
    /// Waits until a ModelRoute says so of itself, and returns the condition.
    pub(crate) async fn says(&self, route: &str, condition: &str, reason: &str) -> Value {
        self.object_says((OURS, "ModelRoute"), route, condition, reason).await
    }

    /// The same of an InterceptorRoute, of which there is but `Ready`.
    pub(crate) async fn their_route_says(&self, route: &str, reason: &str) -> Value {
        self.object_says((THEIRS, "InterceptorRoute"), route, "Ready", reason).await
    }

    async fn object_says(&self, kind: (&str, &str), name: &str, condition: &str, reason: &str) -> Value {
        let api = self.dynamic(kind.0, kind.1);
        let what = format!("{condition} for the reason {reason}");
        wait::object(&api, name, &what, wait::SOON, |object| {
            let object = object?;
            let conditions = object.data.pointer("/status/conditions")?.as_array()?;
            let found = conditions.iter().find(|one| one["type"] == condition && one["reason"] == reason)?;
            // Not what was so of an older generation.
            let now = object.metadata.generation;
            let of = found.get("observedGeneration").and_then(Value::as_i64);
            (of == now).then(|| found.clone())
        })
        .await
    }
}
