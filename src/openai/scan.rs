//! Finds `model` and `stream` in a request body without building a tree.
//!
//! Fields that decide the route must have a single interpretation for every parser. For the rest, whatever model
//! servers accept, mostly through Python's `json`, is accepted here; `tests/readings` compares the two.

mod lenient;

use std::{convert::Infallible, fmt};

use bytes::Bytes;
use futures_util::stream;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use thiserror::Error;

/// Fields of a request body that decide its route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutingFields {
    /// Model named by the body.
    pub model: Option<Box<str>>,
    /// True if the response shall be streamed.
    pub stream: bool,
}

/// Maximum length of a model name, which is kept and repeated in logs and heartbeats while its request is held.
pub const MAX_MODEL_BYTES: usize = 1024;

/// Reason why a body cannot be routed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum ScanError {
    #[error("The body is not a JSON object: {0}")]
    Malformed(String),
    /// Some JSON parsers accept these nevertheless.
    #[error("The body is encoded in {0}. Send it in UTF-8.")]
    Charset(&'static str),
    #[error("`model` occurs more than once in the body, which is ambiguous.")]
    ModelTwice,
    #[error("`model` in the body is not a string.")]
    ModelNotText,
    #[error("`model` in the body is not valid Unicode: a lone surrogate, or not UTF-8.")]
    ModelNotUnicode,
    #[error("`model` in the body has {0} bytes; the maximum is {MAX_MODEL_BYTES}.")]
    ModelTooLong(usize),
    #[error("The body is not a multipart form: {0}")]
    MalformedForm(String),
    #[error("This path requires a multipart/form-data body.")]
    NoForm,
}

/// Parses the top level of a JSON body. Escapes are decoded; values other than `model` and `stream` are only checked
/// for syntax. As in Python, `NaN` and infinities are numbers, lone surrogates may be escaped, and a byte order mark is
/// skipped. The last `stream` counts, and is true if pydantic takes it for true.
///
/// # Errors
///
/// If the body is not a JSON object in UTF-8, or `model` occurs twice or is neither a string nor null.
pub fn scan_json(body: &[u8]) -> Result<RoutingFields, ScanError> {
    let error = match read(body) {
        Err(error @ ScanError::Malformed(_)) => error,
        read => return read,
    };
    match (lenient::charset(body), lenient::as_strict(body)) {
        (Some(charset), _) => Err(ScanError::Charset(charset)),
        (None, Some(strict)) => read(&strict),
        (None, None) => Err(error),
    }
}

fn read(body: &[u8]) -> Result<RoutingFields, ScanError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let mut problem = None;
    let scan = json.deserialize_map(TopLevel(&mut problem)).and_then(|scan| json.end().map(|()| scan));
    scan.map_err(|error| match problem {
        Some(problem) if error.is_data() => problem,
        _ => ScanError::Malformed(error.to_string()),
    })
}

/// Reads the fields `model` and `stream` of a multipart form (`/v1/audio/*`) with the `boundary` of its `Content-Type`.
///
/// # Errors
///
/// If the body is not a form with that boundary, or `model` occurs twice or is not UTF-8.
pub async fn scan_multipart(body: Bytes, boundary: &str) -> Result<RoutingFields, ScanError> {
    let malformed = |error: multer::Error| ScanError::MalformedForm(error.to_string());
    let mut form = multer::Multipart::new(stream::iter([Ok::<_, Infallible>(body)]), boundary);
    let mut scan = RoutingFields::default();
    while let Some(field) = form.next_field().await.map_err(malformed)? {
        let name = field.name().unwrap_or_default().to_owned();
        if !matches!(name.as_str(), "model" | "stream") {
            continue;
        }
        // Ignores the part's own charset, as other parsers may do.
        let bytes = field.bytes().await.map_err(malformed)?;
        if name == "stream" {
            scan.stream = is_true(&bytes);
            continue;
        }
        let text = str::from_utf8(&bytes).map_err(|_| ScanError::ModelNotUnicode)?;
        if scan.model.replace(text.into()).is_some() {
            return Err(ScanError::ModelTwice);
        }
    }
    Ok(scan)
}

/// Returns the boundary of a `multipart/form-data` content type.
pub fn boundary(content_type: &str) -> Option<String> {
    multer::parse_boundary(content_type).ok()
}

/// Returns whether pydantic takes a JSON value for true. Values that it rejects are left to the server.
fn is_true_value(value: &str) -> bool {
    match value.as_bytes() {
        b"true" => true,
        [b'"', ..] => serde_json::from_str::<String>(value).is_ok_and(|text| is_true(text.as_bytes())),
        _ => value.parse::<f64>().is_ok_and(|number| number == 1.0),
    }
}

/// Returns whether pydantic takes a text for true.
fn is_true(text: &[u8]) -> bool {
    [&b"1"[..], b"on", b"t", b"true", b"y", b"yes"].iter().any(|word| text.eq_ignore_ascii_case(word))
}

/// Parses the top level. Stores errors other than syntax errors.
struct TopLevel<'a>(&'a mut Option<ScanError>);

enum ScannedKey {
    Model,
    Stream,
    Other,
}

/// A string as bytes: a lone surrogate has no UTF-8 encoding.
struct Text(Box<[u8]>);

impl<'de> Visitor<'de> for TopLevel<'_> {
    type Value = RoutingFields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RoutingFields, A::Error> {
        let Self(problem) = self;
        let mut scan = RoutingFields::default();
        let mut has_model = false;
        while let Some(key) = map.next_key()? {
            match key {
                ScannedKey::Model => {
                    if std::mem::replace(&mut has_model, true) {
                        *problem = Some(ScanError::ModelTwice);
                        return Err(A::Error::duplicate_field("model"));
                    }
                    *problem = Some(ScanError::ModelNotText);
                    if let Some(Text(name)) = map.next_value()? {
                        *problem = Some(ScanError::ModelNotUnicode);
                        let name = String::from_utf8(name.into_vec()).map_err(A::Error::custom)?;
                        scan.model = Some(name.into_boxed_str());
                    }
                    *problem = None;
                }
                ScannedKey::Stream => scan.stream = is_true_value(map.next_value::<&RawValue>()?.get()),
                ScannedKey::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(scan)
    }
}

impl<'de> Deserialize<'de> for ScannedKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;

        impl Visitor<'_> for KeyVisitor {
            type Value = ScannedKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_bytes<E>(self, key: &[u8]) -> Result<ScannedKey, E> {
                Ok(match key {
                    b"model" => ScannedKey::Model,
                    b"stream" => ScannedKey::Stream,
                    _ => ScannedKey::Other,
                })
            }
        }

        // As bytes: an invalid string simply matches no key.
        deserializer.deserialize_bytes(KeyVisitor)
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;

        impl Visitor<'_> for TextVisitor {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_bytes<E>(self, text: &[u8]) -> Result<Text, E> {
                Ok(Text(text.into()))
            }
        }

        deserializer.deserialize_bytes(TextVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(body: &str) -> Result<Option<Box<str>>, ScanError> {
        scan_json(body.as_bytes()).map(|scan| scan.model)
    }

    #[test]
    fn model_is_top_level_with_escapes_decoded() {
        assert_eq!(model(r#"{"model":"tiny"}"#).unwrap().as_deref(), Some("tiny"));
        assert_eq!(
            model(r#" {"a":{"model":"inner"},"b":["model","x"],"model" : "outer" } "#).unwrap().as_deref(),
            Some("outer")
        );
        assert_eq!(model(r#"{"\u006dodel":"t\u0069ny"}"#).unwrap().as_deref(), Some("tiny"));
        assert_eq!(model(r#"{"messages":[]}"#).unwrap(), None);
        assert!(scan_json(br#"{"stream":true}"#).unwrap().stream);
        assert!(!scan_json(br#"{"stream":null}"#).unwrap().stream);
    }

    #[test]
    fn ambiguous_bodies_are_rejected() {
        for body in [
            "",
            "[]",
            "null",
            "\"model\"",
            "{",
            r#"{"model":"a"} {}"#,
            r#"{"model":"a","model":"b"}"#,
            r#"{"model":"a","\u006dodel":"b"}"#,
            r#"{"model":null,"model":"b"}"#,
            r#"{"model":NaN,"model":"b"}"#,
            r#"{"model":1}"#,
            r#"{"a":tru}"#,
            r#"{"a":1,}"#,
            "{\"a\":\"\u{1}\"}",
        ] {
            assert!(model(body).is_err(), "{body}");
        }
    }

    #[test]
    fn errors_name_the_fault_of_the_model() {
        for (body, error) in [
            (r#"{"model":"a","\u006dodel":1}"#, ScanError::ModelTwice),
            (r#"{"a":NaN,"model":"a","model":"a"}"#, ScanError::ModelTwice),
            (r#"{"model":["a"]}"#, ScanError::ModelNotText),
            (r#"{"model":NaN}"#, ScanError::ModelNotText),
            (r#"{"model":"\ud800"}"#, ScanError::ModelNotUnicode),
        ] {
            assert_eq!(model(body), Err(error), "{body}");
        }
        let utf_16: Vec<_> = "{\"model\":\"a\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(scan_json(&utf_16), Err(ScanError::Charset("UTF-16")));
        assert!(matches!(model(r#"{"model":"a""#), Err(ScanError::Malformed(_))));
    }

    /// Whatever Python accepts is accepted with the same result, except for an ambiguous model.
    #[test]
    fn bodies_are_parsed_as_python_does() {
        let readings: Vec<(String, serde_json::Value)> =
            serde_json::from_str(include_str!("../../tests/readings/readings.json")).unwrap();
        assert!(readings.len() > 500);
        for (text, reading) in readings {
            let body: Vec<_> = text.chars().map(|char| u8::try_from(u32::from(char)).unwrap()).collect();
            let scan = scan_json(&body);
            let Some(expected) = reading.as_object() else {
                assert!(scan.is_err() || reading == "no", "{text:?}: {scan:?}, where Python has {reading}");
                continue;
            };
            // The server rejects an invalid flag.
            let Some(stream) = expected["stream"].as_bool() else { continue };
            let model = expected["model"].as_str().map(Into::into);
            assert_eq!(scan, Ok(RoutingFields { model, stream }), "{text:?}");
        }
    }

    #[test]
    fn stream_accepts_values_pydantic_takes_as_true() {
        for (value, is_true) in [
            ("true", true),
            ("1", true),
            ("1.0", true),
            (r#""true""#, true),
            (r#""Yes""#, true),
            (r#""false""#, false),
            ("0", false),
            ("-1", false),
            ("null", false),
            (r#"{"model":"inner"}"#, false),
            ("[1,[2]]", false),
            ("1e400", false),
            (r#""\ud800""#, false),
            (r#""tr\u0075e""#, true),
            ("false,\"stream\":true", true),
        ] {
            let body = format!(r#"{{"model":"tiny","stream":{value}}}"#);
            assert_eq!(scan_json(body.as_bytes()).unwrap().stream, is_true, "{value}");
        }
    }

    #[test]
    fn nesting_takes_no_stack() {
        let deep = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        assert!(model(&deep(1_000_000)).is_err());
        let body = format!(r#"{{"a":{},"model":"tiny"}}"#, deep(1_000_000));
        assert_eq!(model(&body).unwrap().as_deref(), Some("tiny"), "the server may have a bound of its own");
    }

    #[tokio::test]
    async fn form_names_its_model_in_a_field() {
        let form = "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nRIFF\r\n\
                    --b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--b--\r\n";
        let scan = scan_multipart(Bytes::from(form), "b").await.unwrap();
        assert_eq!(scan.model.as_deref(), Some("whisper"));
        assert!(scan_multipart(Bytes::from("nothing"), "b").await.is_err());
        let twice = form
            .replace("--b--", "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nother\r\n--b--");
        assert!(scan_multipart(Bytes::from(twice), "b").await.is_err());
        let other_charset =
            form.replace("\"model\"", "\"model\"\r\nContent-Type: text/plain; charset=utf-16");
        let scan = scan_multipart(Bytes::from(other_charset), "b").await.unwrap();
        assert_eq!(scan.model.as_deref(), Some("whisper"), "the bytes are what they are");
        let mut no_text = form.replace("whisper", "w?").into_bytes();
        let place = no_text.iter().rposition(|byte| *byte == b'?').unwrap();
        no_text[place] = 0xff;
        assert!(scan_multipart(Bytes::from(no_text), "b").await.is_err());
    }
}
