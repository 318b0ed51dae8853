//! Syntax accepted by Python's `json` beyond JSON.

use std::borrow::Cow;

/// Python's numbers that JSON lacks.
const NUMBERS: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Replaces each number that JSON lacks by a zero, keeping all positions, and removes a byte order mark. `None` if
/// there is nothing to change.
pub(super) fn as_strict(body: &[u8]) -> Option<Cow<'_, [u8]>> {
    let text = body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body);
    let mut strict = Cow::Borrowed(text);
    let (mut at, mut in_string) = (0, false);
    while at < text.len() {
        let is_start = !in_string && matches!(text[at], b'-' | b'I' | b'N');
        let number = NUMBERS.iter().filter(|_| is_start).find(|number| text[at..].starts_with(number));
        at += match (text[at], number) {
            (_, Some(number)) => {
                // Surrounded by white space, so that the zero does not merge with its neighbours.
                let place = &mut strict.to_mut()[at..at + number.len()];
                place.fill(b' ');
                place[1] = b'0';
                number.len()
            }
            (b'\\', _) if in_string => 2,
            (b'"', _) => {
                in_string = !in_string;
                1
            }
            _ => 1,
        };
    }
    let has_changed = text.len() < body.len() || matches!(strict, Cow::Owned(_));
    has_changed.then_some(strict)
}

/// Returns the charset that Python's `json` would detect, unless it is UTF-8 (RFC 4627, section 3: from the zeros among
/// the first characters, which are ASCII).
pub(super) fn charset(body: &[u8]) -> Option<&'static str> {
    match body {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] | [0, 0, ..] | [_, 0, 0, 0, ..] => Some("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, _, ..] | [_, 0, ..] => Some("UTF-16"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_strings_become_zeros_in_place() {
        for (body, strict) in [
            (r#"{"a":NaN}"#, Some(r#"{"a": 0 }"#)),
            (r#"{"a":[-Infinity,Infinity]}"#, Some(r#"{"a":[ 0       , 0      ]}"#)),
            (r#"{"a":-NaN}"#, Some(r#"{"a":- 0 }"#)),
            (r#"{"a":1NaN}"#, Some(r#"{"a":1 0 }"#)),
            (r#"{"NaN":"\"NaN","b":"\\"}"#, None),
            (r#"{"a":"\\",NaN"#, Some(r#"{"a":"\\", 0 "#)),
            ("\u{feff}{}", Some("{}")),
            ("{}", None),
            ("Na", None),
            ("\"\\", None),
            ("", None),
        ] {
            assert_eq!(as_strict(body.as_bytes()).as_deref(), strict.map(str::as_bytes), "{body}");
        }
    }

    #[test]
    fn charset_is_found_by_its_zeros() {
        for (body, found) in [
            (&b"{}"[..], None),
            (b"", None),
            (b"{\0\"\0", Some("UTF-16")),
            (b"\0{\0\"", Some("UTF-16")),
            (b"\xff\xfe{\0", Some("UTF-16")),
            (b"\xfe\xff\0{", Some("UTF-16")),
            (b"{\0\0\0", Some("UTF-32")),
            (b"\0\0\0{", Some("UTF-32")),
            (b"\xef\xbb\xbf{}", None),
        ] {
            assert_eq!(charset(body), found, "{body:?}");
        }
    }
}
