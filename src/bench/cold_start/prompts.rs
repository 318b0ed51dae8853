//! Bodies of the requests.

use bytes::Bytes;
use serde_json::{Map, Value, json};

/// API called by the requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BenchEndpoint {
    /// `/v1/chat/completions`
    #[default]
    Chat,
    /// `/v1/completions`, for models without a chat template
    Completions,
}

/// Request bodies, used in rotation.
#[derive(Clone, Debug)]
pub(super) struct Prompts {
    bodies: Vec<Map<String, Value>>,
}

/// Fields added to every body.
#[derive(Clone, Debug)]
pub(super) struct BodyDefaults {
    pub(super) endpoint: BenchEndpoint,
    pub(super) model: Option<String>,
    pub(super) max_tokens: u32,
    pub(super) stream: bool,
}

/// Prompts used without `--prompt` and `--prompts`.
const DEFAULT_PROMPTS: [&str; 4] = [
    "What is a waiting room for?",
    "Why do good things take time?",
    "Describe a quiet morning.",
    "What is at the end of the queue?",
];

// === impl BenchEndpoint ===

impl BenchEndpoint {
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
    /// Builds the bodies from the prompts of the command line and the lines of a file, or from [`DEFAULT_PROMPTS`] without
    /// either. A line of the file is a prompt or, as a JSON object, a whole body.
    ///
    /// # Errors
    /// Names the line.
    pub(super) fn new(defaults: &BodyDefaults, texts: &[String], file: Option<&str>) -> Result<Self, String> {
        let mut bodies: Vec<_> = texts.iter().map(|text| defaults.body(text)).collect();
        let lines =
            file.unwrap_or_default().lines().enumerate().map(|(number, line)| (number + 1, line.trim()));
        for (number, line) in lines.filter(|(_, line)| !line.is_empty()) {
            bodies.push(match serde_json::from_str(line) {
                Ok(Value::Object(body)) => defaults.complete(body),
                Ok(Value::String(text)) => defaults.body(&text),
                Err(error) if line.starts_with('{') => {
                    return Err(format!("line {number} is not a JSON object: {error}"));
                }
                Ok(_) | Err(_) => defaults.body(line),
            });
        }
        if bodies.is_empty() {
            if file.is_some() {
                return Err("the file contains no prompts; write one per line".to_owned());
            }
            bodies = DEFAULT_PROMPTS.map(|text| defaults.body(text)).into();
        }
        Ok(Self { bodies })
    }

    pub(super) const fn count(&self) -> usize {
        self.bodies.len()
    }

    /// Returns the body of request `number`, counted over all cycles.
    pub(super) fn body(&self, number: usize) -> Bytes {
        let body = &self.bodies[number % self.bodies.len()];
        serde_json::to_vec(body).unwrap_or_default().into()
    }
}

// === impl BodyDefaults ===

impl BodyDefaults {
    fn body(&self, text: &str) -> Map<String, Value> {
        let mut body = Map::new();
        match self.endpoint {
            BenchEndpoint::Chat => body.insert("messages".into(), json!([{"role": "user", "content": text}])),
            BenchEndpoint::Completions => body.insert("prompt".into(), text.into()),
        };
        self.complete(body)
    }

    /// Sets `model` and `stream`, and `max_tokens` unless the body has a limit.
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

    fn prompts(endpoint: BenchEndpoint, texts: &[&str], file: Option<&str>) -> Result<Vec<Value>, String> {
        let defaults = BodyDefaults { endpoint, model: Some("tiny".into()), max_tokens: 4, stream: true };
        let texts: Vec<_> = texts.iter().map(|text| (*text).to_owned()).collect();
        let prompts = Prompts::new(&defaults, &texts, file)?;
        Ok((0..prompts.count())
            .map(|number| serde_json::from_slice(&prompts.body(number)).unwrap())
            .collect())
    }

    #[test]
    fn prompts_come_from_texts_lines_and_bodies() {
        let file = "two\n\n\"three \\n\"\n{\"prompt\": [1], \"max_tokens\": 9}\n42";
        let body = |prompt: Value, max_tokens| json!({"model": "tiny", "stream": true, "prompt": prompt, "max_tokens": max_tokens});
        assert_eq!(
            prompts(BenchEndpoint::Completions, &["one"], Some(file)).unwrap(),
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
            prompts(BenchEndpoint::Chat, &["one"], None).unwrap(),
            [json!({"model": "tiny", "stream": true, "messages": messages, "max_tokens": 4})]
        );
        assert_eq!(prompts(BenchEndpoint::Chat, &[], None).unwrap().len(), DEFAULT_PROMPTS.len());
    }

    #[test]
    fn invalid_prompt_file_error_names_the_line() {
        let error = prompts(BenchEndpoint::Chat, &[], Some("{\"messages\": \n")).unwrap_err();
        assert!(error.starts_with("line 1 is not a JSON object"), "{error}");
        assert!(prompts(BenchEndpoint::Chat, &[], Some("\n")).unwrap_err().contains("no prompts"));
    }
}
