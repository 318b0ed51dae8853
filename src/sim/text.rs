//! Prompts and generated text. A token is a word.

use serde_json::Value;

/// Words of a sentence by position. An answer repeats this pattern.
const SENTENCE: [&[&str]; 8] = [
    &[" the", " a", " one", " each"],
    &[" quiet", " patient", " early", " distant", " small", " bright", " warm", " old"],
    &[" lamp", " traveller", " clock", " letter", " river", " garden", " engine", " bell"],
    &[" waits", " wakes", " listens", " sings", " turns", " rests", " glows", " answers"],
    &[" by", " near", " under", " beyond", " behind", " above"],
    &[" the", " this", " that", " its"],
    &[" door", " window", " station", " harbour", " mountain", " bridge", " orchard", " stair"],
    &[" and", " while", " until", " as", " so", " because"],
];

/// Generator of the words of an answer.
pub(super) struct WordGenerator {
    rng: fastrand::Rng,
    position: usize,
}

/// Token count of a prompt, and a hash that determines its answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prompt {
    pub(super) tokens: u64,
    hash: u64,
}

/// Returns the token id of a word.
pub(super) fn token_id(word: &str) -> u64 {
    hash(FNV_OFFSET, word.as_bytes()) % 32_000
}

/// Returns a word for a token id. Deterministic, but not the inverse of [`token_id`].
pub(super) fn token_word(id: u64) -> &'static str {
    let words = SENTENCE[id as usize % SENTENCE.len()];
    words[(id as usize / SENTENCE.len()) % words.len()]
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a. Unlike the standard hasher, stable across Rust releases.
fn hash(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

// === impl WordGenerator ===

impl WordGenerator {
    /// Equal prompts get equal words, like with a temperature of 0.
    pub(super) fn new(seed: u64, prompt: Prompt) -> Self {
        Self { rng: fastrand::Rng::with_seed(seed ^ prompt.hash), position: 0 }
    }

    pub(super) fn next(&mut self) -> &'static str {
        let words = SENTENCE[self.position % SENTENCE.len()];
        self.position += 1;
        words[self.rng.usize(..words.len())]
    }
}

// === impl Prompt ===

impl Prompt {
    pub(super) fn new() -> Self {
        Self { tokens: 0, hash: FNV_OFFSET }
    }

    pub(super) fn of<'a>(parts: impl IntoIterator<Item = &'a Value>) -> Self {
        let mut prompt = Self::new();
        parts.into_iter().for_each(|part| prompt.read(part));
        prompt
    }

    /// Adds the text of a string, of token ids, of a message or content part, or of a list of any of them.
    fn read(&mut self, part: &Value) {
        match part {
            Value::String(text) => self.read_text(text),
            Value::Number(_) => {
                self.tokens += 1;
                self.hash = hash(self.hash, part.to_string().as_bytes());
            }
            Value::Array(parts) => parts.iter().for_each(|part| self.read(part)),
            Value::Object(fields) => {
                ["content", "text"]
                    .iter()
                    .filter_map(|key| fields.get(*key))
                    .for_each(|part| self.read(part));
            }
            Value::Null | Value::Bool(_) => {}
        }
    }

    fn read_text(&mut self, text: &str) {
        self.tokens += text.split_whitespace().count() as u64;
        self.hash = hash(self.hash, text.as_bytes());
    }

    /// Adds binary data, which has no tokens.
    pub(super) fn read_bytes(&mut self, bytes: &[u8]) {
        self.hash = hash(self.hash, bytes);
    }

    /// Returns a unit vector derived from the hash.
    pub(super) fn embedding(&self, seed: u64, dimensions: usize) -> Vec<f64> {
        let mut rng = fastrand::Rng::with_seed(seed ^ self.hash);
        let vector: Vec<f64> = (0..dimensions).map(|_| rng.f64() - 0.5).collect();
        let length = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
        vector.into_iter().map(|x| x / length).collect()
    }
}
