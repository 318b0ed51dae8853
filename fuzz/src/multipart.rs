//! `model` and `stream` in a multipart form, compared with a parser limited to plain forms.

use anteroom::openai::{RoutingFields, boundary, scan_multipart};
use bytes::Bytes;
use futures_util::FutureExt;

/// Checks an input whose first line is the `Content-Type` and whose rest is the body.
pub fn holds(input: &[u8]) {
    let split = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let (kind, body) = (&input[..split], input.get(split + 1..).unwrap_or_default());
    let Some(boundary) = str::from_utf8(kind).ok().and_then(|kind| boundary(kind.trim())) else { return };
    let scan = |body: &[u8]| {
        let scanning = scan_multipart(Bytes::copy_from_slice(body), &boundary);
        scanning.now_or_never().expect("the whole body is there, so there is nothing to wait for").ok()
    };
    let found = scan(body);
    if let Some(fields) = plain_fields(body, &boundary) {
        assert_eq!(found, expected(&fields));
    }
    let Some(found) = found else { return };
    if let Some(model) = &found.model {
        let mut parts = body.windows(model.len().max(1));
        assert!(
            model.is_empty() || parts.any(|part| part == model.as_bytes()),
            "{model:?} is not in the body"
        );
    }
    if !body.starts_with(format!("--{boundary}").as_bytes()) {
        // The body has a preamble, which would become content if a part were put in front of it.
        return;
    }
    let one_more = format!("--{boundary}\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\nmodel\r\n");
    assert_eq!(scan(&[one_more.as_bytes(), body].concat()), Some(found), "other fields say nothing");
}

/// Returns the names and contents of a form in the style of browsers and SDKs, or `None` for any other form.
fn plain_fields<'a>(body: &'a [u8], boundary: &str) -> Option<Vec<(&'a str, &'a [u8])>> {
    let delimiter = [b"\r\n--", boundary.as_bytes()].concat();
    let mut fields = Vec::new();
    let mut rest = body.strip_prefix(&delimiter[2..])?;
    loop {
        if rest.starts_with(b"--") {
            return Some(fields);
        }
        let part = rest.strip_prefix(b"\r\n")?;
        let end = find(part, &delimiter)?;
        rest = &part[end + delimiter.len()..];
        let part = &part[..end];
        let blank = find(part, b"\r\n\r\n")?;
        let head = str::from_utf8(&part[..blank]).ok()?;
        let mut name = None;
        let plain = |value: &str| !value.contains(['"', '\\', '%', ';']) && is_printable(value);
        for line in head.split("\r\n") {
            let (key, value) = line.split_once(": ")?;
            if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
                return None;
            }
            if !is_printable(value) {
                return None;
            }
            if key.eq_ignore_ascii_case("content-disposition") {
                let value = value.strip_prefix("form-data; name=\"")?.strip_suffix('"')?;
                let (value, file) = value.split_once("\"; filename=\"").unwrap_or((value, ""));
                if !plain(value) || !plain(file) || name.replace(value).is_some() {
                    return None;
                }
            }
        }
        // multer limits the number of lines.
        if head.split("\r\n").count() > 20 {
            return None;
        }
        fields.push((name?, &part[blank + 4..]));
    }
}

fn expected(fields: &[(&str, &[u8])]) -> Option<RoutingFields> {
    let contents =
        |known: &'static str| fields.iter().filter(move |(name, _)| *name == known).map(|(_, text)| *text);
    let model = match contents("model").collect::<Vec<_>>()[..] {
        [] => None,
        [model] => Some(str::from_utf8(model).ok()?.into()),
        _ => return None,
    };
    let words = [&b"1"[..], b"on", b"t", b"true", b"y", b"yes"];
    let stream =
        contents("stream").next_back().is_some_and(|text| words.contains(&&*text.to_ascii_lowercase()));
    Some(RoutingFields { model, stream })
}

fn is_printable(text: &str) -> bool {
    text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}
