//! `model` and `stream` in a JSON body, with serde_json as the oracle. `tests/readings` compares with Python, which
//! accepts more.

use std::fmt;

use anteroom::openai::{RoutingFields, ScanError, scan_json};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

/// Checks an input that is the body.
pub fn holds(body: &[u8]) {
    let scan = scan_json(body).ok();
    match serde_json::from_slice::<ObjectEntries>(body) {
        Ok(entries) => assert_eq!(scan, entries.expected()),
        // The scan does not validate skipped values: numbers out of range, invalid characters, unlimited depth. A
        // model server may accept these, as well as extensions of Python.
        Err(error) if scan.is_some() => {
            assert!(is_of_a_value(&error) || has_python_extensions(body), "{error}")
        }
        Err(_) => {}
    }
    let text = body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body);
    assert_eq!(scan_json(&[b" \n", text, b"\t\r "].concat()).ok(), scan, "white space around says nothing");

    let Some(scan) = scan else { return };
    let open = body.iter().position(|byte| *byte == b'{').expect("an object") + 1;
    let close = body.iter().rposition(|byte| *byte == b'}').expect("an object");
    let comma = if body[open..close].trim_ascii().is_empty() { "" } else { "," };
    let with = |at: usize, entry: String| [&body[..at], entry.as_bytes(), &body[at..]].concat();
    let skipped =
        with(open, format!(r#""x":[{{"model":"inner"}},{}{}]{comma}"#, "[".repeat(500), "]".repeat(500)));
    assert_eq!(scan_json(&skipped).as_ref(), Ok(&scan), "what is below the top level says nothing");
    let another = RoutingFields { model: Some("another".into()), ..scan };
    let entry = r#""\u006dodel":"an\u006fther""#;
    let again = scan_json(&with(close, format!("{comma}{entry}")));
    assert!(
        again == Ok(another.clone()) && scan.model.is_none() || again == Err(ScanError::ModelTwice),
        "{again:?}: twice the key is an error however it is written"
    );
    if again.is_err() && scan.model.is_none() {
        // `model` occurred with the value null; a second occurrence is an error.
        let twice = scan_json(&with(close, format!(r#"{comma}"model":null"#)));
        assert_eq!(twice, Err(ScanError::ModelTwice));
    }
}

/// Top level of an object with all occurrences of each key.
struct ObjectEntries(Vec<(String, Value)>);

// === impl ObjectEntries ===

impl ObjectEntries {
    fn expected(&self) -> Option<RoutingFields> {
        let values =
            |name: &'static str| self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value);
        let model = match values("model").collect::<Vec<_>>()[..] {
            [] | [Value::Null] => None,
            [Value::String(model)] => Some(model.as_str().into()),
            _ => return None,
        };
        let words = ["1", "on", "t", "true", "y", "yes"];
        let stream = match values("stream").next_back() {
            Some(Value::Bool(stream)) => *stream,
            Some(Value::Number(number)) => number.as_f64() == Some(1.0),
            Some(Value::String(text)) => words.contains(&&*text.to_ascii_lowercase()),
            _ => false,
        };
        Some(RoutingFields { model, stream })
    }
}

impl<'de> Deserialize<'de> for ObjectEntries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectEntriesVisitor;

        impl<'de> Visitor<'de> for ObjectEntriesVisitor {
            type Value = ObjectEntries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ObjectEntries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(ObjectEntries(entries))
            }
        }

        deserializer.deserialize_map(ObjectEntriesVisitor)
    }
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Returns `true` if a body may contain Python's extensions to JSON.
fn has_python_extensions(body: &[u8]) -> bool {
    let has = |part: &[u8]| body.windows(part.len()).any(|window| window == part);
    body.starts_with(BYTE_ORDER_MARK) || has(b"NaN") || has(b"Infinity")
}

fn is_of_a_value(error: &serde_json::Error) -> bool {
    let error = error.to_string();
    [
        "number out of range",
        "recursion limit exceeded",
        "invalid unicode code point",
        "lone leading surrogate in hex escape",
        "unexpected end of hex escape",
        // The scan reads keys as bytes, for which serde_json skips this check.
        "control character (\\u0000-\\u001F) found",
    ]
    .iter()
    .any(|known| error.starts_with(known))
}
