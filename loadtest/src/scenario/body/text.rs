//! Request bodies of a given size, with content typical of a chat of that size.

/// Text as pasted by a user: line breaks, quotation marks, some letters beyond ASCII.
const PASTED_TEXT: &str = r#"The day of Jupiter is the shortest: 9 hours and 56 minutes, “give or take” (said \"Io\" – or Europa?).\n"#;

/// Size in bytes above which the body contains a picture: more text than that exceeds the context of any model.
const MAX_TEXT_BYTES: usize = 1 << 20;

/// Returns a chat completion request of `bytes` bytes, with the model after the messages as SDKs send it.
pub(super) fn body(bytes: usize, first: char, model: &str) -> String {
    let (start, end) = if bytes > MAX_TEXT_BYTES {
        (
            r#""messages":[{"role":"user","content":[{"type":"text","text":"What is this?"},{"type":"image_url","image_url":{"url":"data:image/png;base64,"#,
            r#""}}]}]"#,
        )
    } else {
        (r#""messages":[{"role":"user","content":""#, r#""}]"#)
    };
    let end = format!(r#"{end},"model":"{model}","max_tokens":64,"stream":false}}"#);
    let mut body = format!("{first}{start}");
    while bytes <= MAX_TEXT_BYTES && body.len() + PASTED_TEXT.len() + end.len() <= bytes {
        body.push_str(PASTED_TEXT);
    }
    let rest = bytes.saturating_sub(body.len() + end.len());
    body.extend(base64(rest));
    body.push_str(&end);
    body
}

/// Returns `count` base64 letters without a pattern.
fn base64(count: usize) -> impl Iterator<Item = char> {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    std::iter::repeat_with(move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        LETTERS[(random >> 58) as usize].into()
    })
    .take(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn body_has_its_size_and_ends_with_the_model() {
        for (bytes, content) in [(2 << 10, ""), (200 << 10, ""), (8 << 20, "/1/image_url/url")] {
            let body = body(bytes, '{', "tiny");
            assert_eq!(body.len(), bytes);
            let value: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert_eq!(value["model"], "tiny");
            let content = value.pointer(&format!("/messages/0/content{content}"));
            assert!(content.is_some_and(serde_json::Value::is_string), "{bytes}");
            assert!(body.find("\"model\"").unwrap() > bytes - 100);
        }
    }
}
