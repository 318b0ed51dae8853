//! Request bodies of a given size.

/// What a user pastes into a chat: lines, quotation marks, some letters beyond ASCII.
const LINE: &str = r#"The day of Jupiter is the shortest: 9 hours and 56 minutes, “give or take” (said \"Io\" – or Europa?).\n"#;

/// A chat completion of about so many bytes, its model behind the messages as SDKs have it.
pub(super) fn body(bytes: usize, first: char, model: &str) -> String {
    let mut body = format!(r#"{first}"messages":[{{"role":"user","content":""#);
    let end = format!(r#""}}],"model":"{model}","max_tokens":64,"stream":false}}"#);
    while body.len() + LINE.len() + end.len() <= bytes {
        body.push_str(LINE);
    }
    let rest = bytes.saturating_sub(body.len() + end.len());
    body.extend(std::iter::repeat_n('.', rest));
    body.push_str(&end);
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_has_its_size_and_names_its_model_at_the_end() {
        for bytes in [2048, 200 << 10] {
            let body = body(bytes, '{', "tiny");
            assert_eq!(body.len(), bytes);
            let value: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert_eq!(value["model"], "tiny");
            assert!(body.find("\"model\"").unwrap() > bytes - 100);
        }
    }
}
