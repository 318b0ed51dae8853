//! `model` and `stream` in a JSON body, against serde_json as the oracle.

use std::fmt;

use anteroom::openai::{Scan, scan_json};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

/// The input is the body.
pub fn holds(body: &[u8]) {
    let scan = scan_json(body).ok();
    match serde_json::from_slice::<Entries>(body) {
        Ok(entries) => assert_eq!(scan, entries.expected()),
        // What the scan skips, it does not read: numbers and characters that exist nowhere, and depth without end. A
        // model server may be fine with them.
        Err(error) if scan.is_some() => assert!(is_of_a_value(&error), "{error}"),
        Err(_) => {}
    }
    assert_eq!(scan_json(&[b" \n", body, b"\t\r "].concat()).ok(), scan, "white space around says nothing");

    let Some(scan) = scan else { return };
    let open = body.iter().position(|byte| *byte == b'{').expect("an object") + 1;
    let close = body.iter().rposition(|byte| *byte == b'}').expect("an object");
    let comma = if body[open..close].trim_ascii().is_empty() { "" } else { "," };
    let with = |at: usize, entry: String| [&body[..at], entry.as_bytes(), &body[at..]].concat();
    let skipped =
        with(open, format!(r#""x":[{{"model":"inner"}},{}{}]{comma}"#, "[".repeat(500), "]".repeat(500)));
    assert_eq!(scan_json(&skipped).as_ref(), Ok(&scan), "what is below the top level says nothing");
    let again = scan_json(&with(close, format!(r#"{comma}"\u006dodel":"an\u006fther""#)));
    let expected = scan.model.is_none().then(|| Scan { model: Some("another".into()), ..scan });
    assert_eq!(again.ok(), expected, "twice the key is an error however it is written");
}

/// The top level of an object, each key as often as it stands there.
struct Entries(Vec<(String, Value)>);

// === impl Entries ===

impl Entries {
    fn expected(&self) -> Option<Scan> {
        let mut found = [const { None }; 2];
        for (key, value) in &self.0 {
            let Some(place) = ["model", "stream"].iter().position(|known| known == key) else { continue };
            if found[place].replace(value).is_some() {
                return None;
            }
        }
        let model = match found[0] {
            None => None,
            Some(Value::String(model)) => Some(model.as_str().into()),
            Some(_) => return None,
        };
        let stream = match found[1] {
            None | Some(Value::Null) => false,
            Some(Value::Bool(stream)) => *stream,
            Some(_) => return None,
        };
        Some(Scan { model, stream })
    }
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;

        impl<'de> Visitor<'de> for All {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(All)
    }
}

fn is_of_a_value(error: &serde_json::Error) -> bool {
    let error = error.to_string();
    [
        "number out of range",
        "recursion limit exceeded",
        "invalid unicode code point",
        "lone leading surrogate in hex escape",
        "unexpected end of hex escape",
    ]
    .iter()
    .any(|known| error.starts_with(known))
}
