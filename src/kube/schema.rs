//! Converts schemas of our types to structural schemas for CustomResourceDefinitions, without references.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

/// Returns the structural schema of a type.
///
/// The schema has no `default` values: the API server would persist them in every stored object, where later changes of
/// a default would not apply. Descriptions state the defaults instead.
pub(super) fn structural<T: JsonSchema>() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    settings.meta_schema = None;
    rewrite(settings.into_generator().into_root_schema_for::<T>().to_value())
}

fn rewrite(schema: Value) -> Value {
    let Value::Object(mut schema) = schema else { return schema };
    for key in ["$schema", "title", "examples", "default"] {
        schema.remove(key);
    }
    if let Some(Value::String(text)) = schema.get_mut("description") {
        // Line breaks of the source are not significant.
        *text = text.replace('\n', " ");
    }
    optional(&mut schema);
    quantity(&mut schema);
    enumeration(&mut schema);
    if schema.get("format").is_some_and(|format| format != "date-time" && format != "int64") {
        schema.remove("format");
    }
    match schema.remove("additionalProperties") {
        // The API server prunes unknown fields, and reports them under strict validation.
        None | Some(Value::Bool(_)) => {}
        Some(values) => {
            schema.insert("additionalProperties".into(), rewrite(values));
        }
    }
    if let Some(items) = schema.remove("items") {
        schema.insert("items".into(), rewrite(items));
    }
    if let Some(Value::Object(properties)) = schema.remove("properties") {
        let properties = properties.into_iter().map(|(name, property)| {
            let default = property.get("default").and_then(leaf);
            let mut property = rewrite(property);
            if let (Some(default), Some(Value::String(text))) = (default, property.get_mut("description")) {
                text.push_str(&format!(" Default: {default}."));
            }
            (name, property)
        });
        schema.insert("properties".into(), Value::Object(properties.collect()));
    }
    Value::Object(schema)
}

/// Removes `null` from optional types: manifests omit such fields instead.
fn optional(schema: &mut Map<String, Value>) {
    if let Some(Value::Array(kinds)) = schema.get_mut("type") {
        kinds.retain(|kind| kind != "null");
        if let [kind] = kinds.as_slice() {
            let kind = kind.clone();
            schema.insert("type".into(), kind);
        }
    }
    if let Some(Value::Array(choices)) = schema.get_mut("anyOf") {
        choices.retain(|choice| choice["type"] != "null");
        if let [Value::Object(choice)] = choices.as_slice() {
            let choice = choice.clone();
            schema.remove("anyOf");
            for (key, value) in choice {
                schema.entry(key).or_insert(value);
            }
            optional(schema);
        }
    }
}

/// Converts durations and byte quantities, which the configuration file accepts as strings and as numbers.
fn quantity(schema: &mut Map<String, Value>) {
    if schema.get("type") != Some(&json!(["string", "integer"])) {
        return;
    }
    let (rule, message) = if schema.contains_key("maximum") {
        // A duration. The only number without a unit is 0, which can be quoted.
        schema.insert("type".into(), json!("string"));
        for key in ["minimum", "maximum"] {
            schema.remove(key);
        }
        let pattern = schema.remove("pattern").unwrap_or_default();
        let pattern = pattern.as_str().unwrap_or_default().replace(r"\d", "[0-9]");
        (format!("self.matches('{pattern}')"), "write a number and a unit, such as 100ms, 20s or 15m")
    } else {
        schema.remove("type");
        schema.remove("minimum");
        schema.insert("anyOf".into(), json!([{"type": "integer"}, {"type": "string"}]));
        schema.insert("x-kubernetes-int-or-string".into(), json!(true));
        let pattern = "^[0-9]+([.][0-9]+)? ?([kKMGTP]i?)?[bB]?$";
        let rule = format!("type(self) == int ? self >= 0 : self.matches('{pattern}')");
        (rule, "write a number of bytes and a unit, such as 512KiB, 64MiB or 1GiB")
    };
    schema.insert("maxLength".into(), json!(64));
    schema.insert("x-kubernetes-validations".into(), json!([{"rule": rule, "message": message}]));
}

/// Converts enumerations of constants. The descriptions of the values are appended to that of the field.
fn enumeration(schema: &mut Map<String, Value>) {
    let Some(Value::Array(choices)) = schema.get("oneOf") else { return };
    let value =
        |choice: &Value| Some((choice["const"].clone(), choice["description"].as_str()?.replace('\n', " ")));
    let Some(choices) = choices.iter().map(value).collect::<Option<Vec<_>>>() else { return };
    let mut text = schema.get("description").and_then(Value::as_str).unwrap_or_default().to_owned();
    for (value, meaning) in &choices {
        text.push_str(&format!(" {}: {meaning}", value.as_str().unwrap_or_default()));
    }
    schema.remove("oneOf");
    schema.insert("type".into(), json!("string"));
    schema.insert("enum".into(), choices.into_iter().map(|(value, _)| value).collect());
    schema.insert("description".into(), text.into());
}

/// Formats a default that fits on one line.
fn leaf(default: &Value) -> Option<String> {
    match default {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(default.to_string()),
        Value::Array(items) if !items.is_empty() => {
            Some(items.iter().map(leaf).collect::<Option<Vec<_>>>()?.join(", "))
        }
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}
