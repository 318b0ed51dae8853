//! Routes as cluster objects.

use serde_json::{Value, json};

use crate::{model, scenario::Scenario, wait};

/// API version of Anteroom's resources.
pub(crate) const ANTEROOM_API_VERSION: &str = "anteroom.dev/v1alpha1";
/// API version of the KEDA HTTP add-on's resources.
pub(crate) const ADD_ON_API_VERSION: &str = "http.keda.sh/v1beta1";

/// Builds a ModelRoute to the Service and for the model of the same name; `more` is merged into its spec, and null
/// removes a field.
pub(crate) fn model_route(name: &str, more: Value) -> Value {
    let mut spec = json!({
        "match": { "models": [name] },
        "target": { "service": { "name": name, "port": 80 } },
    });
    model::merge(&mut spec, &more);
    let spec = without_nulls(spec);
    json!({ "apiVersion": ANTEROOM_API_VERSION, "kind": "ModelRoute", "metadata": { "name": name }, "spec": spec })
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

/// Builds an InterceptorRoute with this spec.
pub(crate) fn interceptor_route(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": ADD_ON_API_VERSION, "kind": "InterceptorRoute", "metadata": { "name": name }, "spec": spec })
}

// === impl Scenario ===

impl Scenario {
    /// Waits until a ModelRoute has this condition with this reason, and returns the condition.
    pub(crate) async fn await_route_condition(&self, route: &str, condition: &str, reason: &str) -> Value {
        self.await_object_condition((ANTEROOM_API_VERSION, "ModelRoute"), route, condition, reason).await
    }

    /// Same as [`Self::await_route_condition`], for the only condition of an InterceptorRoute, `Ready`.
    pub(crate) async fn await_interceptor_route_ready(&self, route: &str, reason: &str) -> Value {
        self.await_object_condition((ADD_ON_API_VERSION, "InterceptorRoute"), route, "Ready", reason).await
    }

    async fn await_object_condition(
        &self,
        kind: (&str, &str),
        name: &str,
        condition: &str,
        reason: &str,
    ) -> Value {
        let api = self.dynamic(kind.0, kind.1);
        let what = format!("{condition} for the reason {reason}");
        wait::object(&api, name, &what, wait::WAIT_LIMIT, |object| {
            let object = object?;
            let conditions = object.data.pointer("/status/conditions")?.as_array()?;
            let found = conditions.iter().find(|one| one["type"] == condition && one["reason"] == reason)?;
            // Conditions of an older generation do not count.
            let now = object.metadata.generation;
            let of = found.get("observedGeneration").and_then(Value::as_i64);
            (of == now).then(|| found.clone())
        })
        .await
    }
}
