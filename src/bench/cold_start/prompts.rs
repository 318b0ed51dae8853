//! What the requests ask.

use bytes::Bytes;
use serde_json::{Map, Value, json};

/// The API that requests are made to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    #[default]
    Chat,
    /// `/v1/completions`, for models without a chat template
    Completions,
}

/// The bodies of all requests, in turn.
#[derive(Clone, Debug)]
pub(super) struct Prompts {
    bodies: Vec<Map<String, Value>>,
}

/// How every body is completed.
#[derive(Clone, Debug)]
pub(super) struct Asking {
    pub(super) endpoint: Endpoint,
    pub(super) model: Option<String>,
    pub(super) max_tokens: u32,
    pub(super) stream: bool,
}

/// What is asked where nothing was said.
const QUESTIONS: [&str; 4] = [
    "What is a waiting room for?",
    "Why do good things take time?",
    "Describe a quiet morning.",
    "What is at the end of the queue?",
];

// === impl Endpoint ===

impl Endpoint {
    pub(super) const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
        }
    }
}

// === impl Prompts ===

impl Prompts {
    /// From the texts of the command line and a file; without either, questions of our own. A line of the file is a
    /// prompt; one that is a JSON object is a whole body.
    ///
    /// # Errors
    /// A sentence that names the line.
    pub(super) fn new(asking: &Asking, texts: &[String], file: Option<&str>) -> Result<Self, String> {
        let mut bodies: Vec<_> = texts.iter().map(|text| asking.body(text)).collect();
        let lines =
            file.unwrap_or_default().lines().enumerate().map(|(number, line)| (number + 1, line.trim()));
        for (number, line) in lines.filter(|(_, line)| !line.is_empty()) {
            bodies.push(match serde_json::from_str(line) {
                Ok(Value::Object(body)) => asking.complete(body),
                Ok(Value::String(text)) => asking.body(&text),
                Err(error) if line.starts_with('{') => {
                    return Err(format!("line {number} is no JSON object: {error}"));
                }
                Ok(_) | Err(_) => asking.body(line),
            });
        }
        if bodies.is_empty() {
            if file.is_some() {
                return Err("there is no prompt in it; write one a line".to_owned());
            }
            bodies = QUESTIONS.map(|text| asking.body(text)).into();
        }
        Ok(Self { bodies })
    }

    pub(super) const fn count(&self) -> usize {
        self.bodies.len()
    }

    /// The body of the request with this number, counted over all cycles.
    pub(super) fn body(&self, number: usize) -> Bytes {
        let body = &self.bodies[number % self.bodies.len()];
        serde_json::to_vec(body).unwrap_or_default().into()
    }
}

// === impl Asking ===

impl Asking {
    fn body(&self, text: &str) -> Map<String, Value> {
        let mut body = Map::new();
        match self.endpoint {
            Endpoint::Chat => body.insert("messages".into(), json!([{"role": "user", "content": text}])),
            Endpoint::Completions => body.insert("prompt".into(), text.into()),
        };
        self.complete(body)
    }

    /// Whether the answer is streamed is ours to say, and the model, if we know one; the rest is only filled in.
    fn complete(&self, mut body: Map<String, Value>) -> Map<String, Value> {
        if let Some(model) = &self.model {
            body.insert("model".into(), model.as_str().into());
        }
        body.insert("stream".into(), self.stream.into());
        if !body.contains_key("max_completion_tokens") {
            body.entry("max_tokens").or_insert(self.max_tokens.into());
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(endpoint: Endpoint, texts: &[&str], file: Option<&str>) -> Result<Vec<Value>, String> {
        let asking = Asking { endpoint, model: Some("tiny".into()), max_tokens: 4, stream: true };
        let texts: Vec<_> = texts.iter().map(|text| (*text).to_owned()).collect();
        let prompts = Prompts::new(&asking, &texts, file)?;
        Ok((0..prompts.count())
            .map(|number| serde_json::from_slice(&prompts.body(number)).unwrap())
            .collect())
    }

    #[test]
    fn a_prompt_is_a_text_a_line_or_a_whole_body() {
        let file = "two\n\n\"three \\n\"\n{\"prompt\": [1], \"max_tokens\": 9}\n42";
        let body = |prompt: Value, max_tokens| json!({"model": "tiny", "stream": true, "prompt": prompt, "max_tokens": max_tokens});
        assert_eq!(
            prompts(Endpoint::Completions, &["one"], Some(file)).unwrap(),
            [
                body("one".into(), 4),
                body("two".into(), 4),
                body("three \n".into(), 4),
                body(json!([1]), 9),
                body("42".into(), 4),
            ]
        );
        let messages = json!([{"role": "user", "content": "one"}]);
        assert_eq!(
            prompts(Endpoint::Chat, &["one"], None).unwrap(),
            [json!({"model": "tiny", "stream": true, "messages": messages, "max_tokens": 4})]
        );
        assert_eq!(prompts(Endpoint::Chat, &[], None).unwrap().len(), QUESTIONS.len());
    }

    #[test]
    fn a_file_that_cannot_be_read_as_prompts_says_why() {
        let error = prompts(Endpoint::Chat, &[], Some("{\"messages\": \n")).unwrap_err();
        assert!(error.starts_with("line 1 is no JSON object"), "{error}");
        assert!(prompts(Endpoint::Chat, &[], Some("\n")).unwrap_err().contains("no prompt"));
    }
}
