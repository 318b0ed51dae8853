//! Finds `model` and `stream` in a request body without building a tree.

use std::{convert::Infallible, fmt};

use bytes::Bytes;
use futures_util::stream;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use thiserror::Error;

/// What a request body says about where it belongs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// The model that it names.
    pub model: Option<Box<str>>,
    /// It wants its answer as a stream of events.
    pub stream: bool,
}

/// Why a body cannot be routed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum ScanError {
    #[error("The body is not a JSON object: {0}")]
    Malformed(String),
    #[error("The body is not a multipart form: {0}")]
    MalformedForm(String),
}

/// Reads the top level of a JSON body. Escapes are decoded; a key that stands there twice is an error, since two
/// readers could take two different ones; everything else is checked for being JSON and skipped.
///
/// # Errors
/// When the body is not one JSON object, or `model` is not a string, or `stream` neither true, false nor null.
pub fn scan_json(body: &[u8]) -> Result<Scan, ScanError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let scan = json.deserialize_map(TopLevel).and_then(|scan| json.end().map(|()| scan));
    scan.map_err(|error| ScanError::Malformed(error.to_string()))
}

/// Reads the fields `model` and `stream` of a multipart form (`/v1/audio/*`). `boundary` is the one of its
/// `Content-Type`.
///
/// # Errors
/// When the body is not a form with that boundary, or names a field twice or not in UTF-8.
pub async fn scan_multipart(body: Bytes, boundary: &str) -> Result<Scan, ScanError> {
    let malformed = |error: multer::Error| ScanError::MalformedForm(error.to_string());
    let mut form = multer::Multipart::new(stream::iter([Ok::<_, Infallible>(body)]), boundary);
    let mut scan = Scan::default();
    let mut stream = None;
    while let Some(field) = form.next_field().await.map_err(malformed)? {
        let name = field.name().unwrap_or_default().to_owned();
        if !matches!(name.as_str(), "model" | "stream") {
            continue;
        }
        // Not as the part's own charset has it: another reader may not look at that.
        let bytes = field.bytes().await.map_err(malformed)?;
        let wrong = |what: &str| ScanError::MalformedForm(format!("field `{name}` {what}"));
        let text = str::from_utf8(&bytes).map_err(|_| wrong("is not UTF-8"))?;
        let twice = if name == "model" {
            scan.model.replace(text.into()).is_some()
        } else {
            stream.replace(text.eq_ignore_ascii_case("true") || text == "1").is_some()
        };
        if twice {
            return Err(wrong("twice"));
        }
    }
    scan.stream = stream.unwrap_or(false);
    Ok(scan)
}

/// The boundary of a `multipart/form-data` content type.
pub fn boundary(content_type: &str) -> Option<String> {
    multer::parse_boundary(content_type).ok()
}

struct TopLevel;

enum Key {
    Model,
    Stream,
    Other,
}

impl<'de> Visitor<'de> for TopLevel {
    type Value = Scan;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scan, A::Error> {
        use serde::de::Error;
        let (mut model, mut stream) = (None, None);
        while let Some(key) = map.next_key()? {
            match key {
                Key::Model if model.is_some() => return Err(A::Error::duplicate_field("model")),
                Key::Stream if stream.is_some() => return Err(A::Error::duplicate_field("stream")),
                Key::Model => model = Some(map.next_value::<Box<str>>()?),
                Key::Stream => stream = Some(map.next_value::<Option<bool>>()?.unwrap_or(false)),
                Key::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(Scan { model, stream: stream.unwrap_or(false) })
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;

        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E>(self, key: &str) -> Result<Key, E> {
                Ok(match key {
                    "model" => Key::Model,
                    "stream" => Key::Stream,
                    _ => Key::Other,
                })
            }
        }

        deserializer.deserialize_identifier(KeyVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(body: &str) -> Result<Option<Box<str>>, ScanError> {
        scan_json(body.as_bytes()).map(|scan| scan.model)
    }

    #[test]
    fn the_model_is_the_top_level_one_with_its_escapes_decoded() {
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
    fn what_two_readers_could_read_differently_is_refused() {
        for body in [
            "",
            "[]",
            "null",
            "\"model\"",
            "{",
            r#"{"model":"a"} {}"#,
            r#"{"model":"a","model":"b"}"#,
            r#"{"model":"a","\u006dodel":"b"}"#,
            r#"{"model":1}"#,
            r#"{"model":null}"#,
            r#"{"stream":"yes"}"#,
            r#"{"stream":true,"stream":false}"#,
            r#"{"a":tru}"#,
            r#"{"a":1,}"#,
            "{\"a\":\"\u{1}\"}",
        ] {
            assert!(model(body).is_err(), "{body}");
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
    async fn a_form_names_its_model_in_a_field() {
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
