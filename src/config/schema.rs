//! JSON Schema of the file, and its keys by section: one source for editors, documentation and error messages.

use std::fmt;

use schemars::{
    Schema,
    transform::{Transform, transform_subschemas},
};
use serde_json::{Map, Value};

use super::Config;

/// Returns the JSON Schema (draft 2020-12) of the file, pretty-printed, for completion and validation in editors.
pub fn schema() -> String {
    format!("{:#}\n", root().to_value())
}

/// A mapping of the file with fixed keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Path, such as `routes[].hold`; empty for the top level.
    pub path: String,
    /// Purpose of the section.
    pub description: String,
    /// True if exactly one of the keys must be given.
    pub requires_one_key: bool,
    /// Keys in the order of the types.
    pub keys: Vec<ConfigKey>,
}

/// A key of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigKey {
    /// Name of the key.
    pub name: String,
    /// Kind of its value.
    pub kind: ValueKind,
    /// Default as JSON; `None` if the key is required or has no default value.
    pub default: Option<Value>,
    /// True if the key must be given.
    pub required: bool,
    /// Meaning of the key.
    pub description: String,
}

/// Kind of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// A duration.
    Duration,
    /// A number of bytes.
    Bytes,
    /// A whole number, with its minimum.
    Number(u64),
    /// A number from 0 to 1.
    Ratio,
    /// `true` or `false`.
    Boolean,
    /// `ip:port`.
    Address,
    /// Any text.
    Text,
    /// One of these words, each with its meaning.
    Choice(Vec<(String, String)>),
    /// A list.
    List(Box<ValueKind>),
    /// A mapping of arbitrary names to texts.
    Map,
    /// A mapping with fixed keys; if not empty, exactly one of these must be given.
    Section(Vec<String>),
}

/// Returns all sections of the file, parents before children.
pub fn sections() -> Vec<Section> {
    let root = root().to_value();
    let mut sections = Vec::new();
    SchemaWalker { root: &root, sections: &mut sections }.section(String::new(), &root);
    sections
}

fn root() -> Schema {
    let mut schema = schemars::schema_for!(Config);
    LineJoiner.transform(&mut schema);
    schema
}

/// Joins the lines of descriptions, which the source wraps.
struct LineJoiner;

impl Transform for LineJoiner {
    fn transform(&mut self, schema: &mut Schema) {
        if let Some(Value::String(text)) = schema.get_mut("description") {
            *text = text.replace('\n', " ");
        }
        transform_subschemas(self, schema);
    }
}

/// Walks a schema, in the subset that our types generate.
struct SchemaWalker<'a> {
    root: &'a Value,
    sections: &'a mut Vec<Section>,
}

impl<'a> SchemaWalker<'a> {
    fn section(&mut self, path: String, schema: &'a Value) {
        let description = text(schema, "description");
        let required = schema["required"].as_array();
        let variants = schema["oneOf"].as_array().into_iter().flatten();
        // An enum with values has an object per variant with a single key, described by the variant.
        let described = variants.flat_map(|variant| {
            properties(variant).map(|(name, schema)| (name, schema, text(variant, "description")))
        });
        let plain = properties(schema).map(|(name, schema)| (name, schema, text(schema, "description")));
        let properties = plain.chain(described).collect::<Vec<_>>();

        let keys = properties.iter().map(|(name, property, description)| ConfigKey {
            name: (*name).clone(),
            kind: self.kind(property),
            default: property.get("default").cloned(),
            required: required.is_some_and(|names| names.iter().any(|key| *key == **name)),
            description: description.clone(),
        });
        self.sections.push(Section {
            path: path.clone(),
            description,
            requires_one_key: schema.get("oneOf").is_some(),
            keys: keys.collect(),
        });

        for (name, property, _) in properties {
            let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            match self.kind(property) {
                ValueKind::Section(_) => self.section(below, self.resolve(property)),
                ValueKind::List(item) if matches!(*item, ValueKind::Section(_)) => {
                    self.section(format!("{below}[]"), self.resolve(&property["items"]));
                }
                _ => {}
            }
        }
    }

    fn kind(&self, schema: &'a Value) -> ValueKind {
        let schema = schema_if_present(schema);
        match schema["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/")) {
            Some("Duration") => return ValueKind::Duration,
            Some("ByteCount") => return ValueKind::Bytes,
            Some("Ratio") => return ValueKind::Ratio,
            _ => {}
        }
        let schema = self.resolve(schema);
        if let Some(variants) = schema["oneOf"].as_array() {
            let words = variants.iter().filter_map(|variant| {
                Some((variant["const"].as_str()?.to_owned(), text(variant, "description")))
            });
            let words = words.collect::<Vec<_>>();
            return if words.is_empty() {
                let names = variants.iter().flat_map(properties).map(|(name, _)| name.clone());
                ValueKind::Section(names.collect())
            } else {
                ValueKind::Choice(words)
            };
        }
        // Optional values have the type `["string", "null"]`.
        let kind = schema["type"].as_str().or_else(|| schema["type"][0].as_str());
        match kind {
            Some("boolean") => ValueKind::Boolean,
            Some("integer") => ValueKind::Number(schema["minimum"].as_u64().unwrap_or(0)),
            Some("array") => ValueKind::List(Box::new(self.kind(&schema["items"]))),
            Some("object") if schema.get("properties").is_some() => ValueKind::Section(Vec::new()),
            Some("object") => ValueKind::Map,
            _ if schema["format"] == "ip:port" => ValueKind::Address,
            _ => ValueKind::Text,
        }
    }

    fn resolve(&self, schema: &'a Value) -> &'a Value {
        let schema = schema_if_present(schema);
        let target = schema["$ref"].as_str().and_then(|name| self.root.pointer(name.strip_prefix('#')?));
        target.unwrap_or(schema)
    }
}

/// Returns the schema of a present value: optional ones are `anyOf` with null, mappings with a short form `anyOf` with it.
fn schema_if_present(schema: &Value) -> &Value {
    match schema["anyOf"].as_array().map(Vec::as_slice) {
        Some([this, other]) if other["type"] == "null" || other["$ref"].is_string() => this,
        _ => schema,
    }
}

fn text(schema: &Value, key: &str) -> String {
    schema[key].as_str().unwrap_or_default().to_owned()
}

fn properties(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema["properties"].as_object().into_iter().flat_map(Map::iter)
}

// === impl ValueKind ===

impl fmt::Display for ValueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = |names: &mut dyn Iterator<Item = &String>| {
            names.map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ")
        };
        match self {
            Self::Duration => f.write_str("a number and a unit, such as 100ms, 20s or 15m"),
            Self::Bytes => f.write_str("a number of bytes, such as 512KiB, 64MiB or 1GiB"),
            Self::Number(0) => f.write_str("a whole number"),
            Self::Number(least) => write!(f, "a whole number, at least {least}"),
            Self::Ratio => f.write_str("a number from 0 to 1"),
            Self::Boolean => f.write_str("true or false"),
            Self::Address => f.write_str("an address and a port, such as 127.0.0.1:8080 or [::]:8080"),
            Self::Text => f.write_str("a text"),
            Self::Choice(choices) => write!(f, "one of {}", words(&mut choices.iter().map(|(word, _)| word))),
            Self::List(_) => f.write_str("a list"),
            Self::Map => f.write_str("names with values"),
            Self::Section(either) if either.is_empty() => f.write_str("keys with values"),
            Self::Section(either) => write!(f, "exactly one of the keys {}", words(&mut either.iter())),
        }
    }
}
