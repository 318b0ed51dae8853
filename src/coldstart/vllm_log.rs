//! From the lines that vLLM logs while it starts to the parts of a load; pure.
//!
//! The wordings are those of vLLM 0.8 to 0.32, each beside what it tells. They are looked for anywhere in a line, since
//! what stands before them differs: ranks, process ids, a time, JSON. A log that says none of this has no parts.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
    time::Duration,
};

use tokio::time::Instant;

use crate::{domain::Part, state::PartSeen};

/// What the log of one start has told so far.
///
/// Its parts do not overlap and are in their order, whatever the lines say. Several ranks tell of the same part; it
/// lasts from the first one's beginning to the last one's end.
#[derive(Debug, Default)]
pub struct VllmLog {
    known: BTreeMap<Part, PartSeen>,
    /// When it began with the model.
    model: Option<Instant>,
    /// When compilations began whose end has not been told.
    compiling: VecDeque<Instant>,
}

/// What a line tells, and how long that took.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Told {
    /// `Starting to load model …`: imports and the processes are done. The newest model runner does not say so.
    ModelBegins,
    /// `Time spent downloading weights for …: 14.584169 seconds`, if it took long enough to be told.
    Downloaded(Duration),
    /// `Loading weights took 24.84 seconds`: they are read.
    Read(Duration),
    /// `Model loading took 12.66 GiB memory and 31.657031 seconds`, in older versions without `memory`: the model was
    /// built, weights downloaded, read, and put in the form that its kernels want.
    Loaded(Duration),
    /// `Dynamo bytecode transform time: 8.52 s`: a compilation began so long ago. Its total is told later, in older
    /// versions not until a first pass has run, so this says where it belongs.
    Transformed(Duration),
    /// `torch.compile took 40.55 s in total`, in older versions `takes`. `run together took` when the first pass cannot be
    /// told from it.
    Compiled(Duration),
    /// `Warming up model for the compilation...`: of a CPU, which tells its compilation so.
    CpuCompiles,
    /// `Warming up done.`
    CpuCompiled,
    /// `init engine (profile, create kv cache, warmup model) took 90.84 seconds`, in newer versions ` s` and then
    /// `(compilation: 45.81 s)`: compiling, profiling, the KV cache, graphs.
    EngineUp(Duration),
    /// `Application startup complete.`: requests are taken.
    ServerUp,
}

// === impl VllmLog ===

impl VllmLog {
    /// How many compilations may run at once: as many as ranks, of one model and its drafts.
    const COMPILING: usize = 1024;

    /// A line that was read at `at`. Gives the parts of which it tells something new; each takes the place of what was
    /// known of that part.
    pub fn line(&mut self, line: &str, at: Instant) -> Vec<PartSeen> {
        let Some(told) = Told::by(line) else { return Vec::new() };
        let ago = |took: Duration| at.checked_sub(took).unwrap_or(at);
        let told = match told {
            Told::ModelBegins => [self.model_begins(at), None],
            Told::Downloaded(took) => [self.part(Part::WeightsDownload, ago(took), at), None],
            Told::Read(took) => [self.part(Part::Weights, self.model.unwrap_or(ago(took)), at), None],
            Told::Loaded(took) => {
                let begun = self.model_begins(ago(took));
                [begun, self.part(Part::Weights, self.model.unwrap_or(at), at)]
            }
            Told::Transformed(took) => {
                if self.compiling.len() < Self::COMPILING {
                    self.compiling.push_back(ago(took));
                }
                [None, None]
            }
            Told::Compiled(took) => {
                let start = self.compiling.pop_front().unwrap_or(ago(took));
                [self.part(Part::Compile, start, at.min(start + took)), None]
            }
            Told::CpuCompiles => {
                self.compiling.push_back(at);
                [None, None]
            }
            Told::CpuCompiled => {
                let start = self.compiling.pop_front();
                [start.and_then(|start| self.part(Part::Compile, start, at)), None]
            }
            Told::EngineUp(took) => {
                // With random weights nothing tells that they are there, but this comes right after them.
                let silent = !self.known.contains_key(&Part::Weights);
                let weights = self
                    .model
                    .filter(|_| silent)
                    .and_then(|model| self.part(Part::Weights, model, ago(took)));
                [weights, self.part(Part::Warmup, ago(took), at)]
            }
            Told::ServerUp => {
                let engine = self.known.get(&Part::Warmup).map(|warmup| warmup.end);
                [engine.and_then(|engine| self.part(Part::ServerStart, engine, at)), None]
            }
        };
        told.into_iter().flatten().collect()
    }

    /// The engine has started when it begins with the model.
    fn model_begins(&mut self, at: Instant) -> Option<PartSeen> {
        if self.model.is_some() {
            return None;
        }
        // What was downloaded before this was told belongs to the model.
        let first = self.known.values().filter_map(|part| part.start).min();
        let at = first.map_or(at, |first| first.min(at));
        self.model = Some(at);
        let part = PartSeen { part: Part::EngineStart, start: None, end: at };
        self.known.insert(Part::EngineStart, part.clone());
        Some(part)
    }

    /// A part, as far as the ones around it leave room. Nothing of it is told once a later one is known.
    fn part(&mut self, part: Part, start: Instant, end: Instant) -> Option<PartSeen> {
        if self.known.range((Bound::Excluded(part), Bound::Unbounded)).next().is_some() {
            return None;
        }
        let before = self.known.range(..part).next_back().map(|(_, before)| before.end);
        let start = before.map_or(start, |before| before.max(start));
        if start >= end {
            return None;
        }
        let known = self.known.get(&part).and_then(|known| Some((known.start?, known.end)));
        let (start, end) = match known {
            // Another rank.
            Some((from, until)) if start <= until && from <= end => (start.min(from), end.max(until)),
            // Another model, such as a draft: the longer one is told of.
            Some((from, until)) if end - start <= until - from => return None,
            _ => (start, end),
        };
        if known == Some((start, end)) {
            return None;
        }
        let seen = PartSeen { part, start: Some(start), end };
        self.known.insert(part, seen.clone());
        Some(seen)
    }
}

// === impl Told ===

impl Told {
    fn by(line: &str) -> Option<Self> {
        let after = |phrase: &str| line.find(phrase).map(|found| &line[found + phrase.len()..]);
        if let Some(rest) = after("Loading weights took ") {
            return seconds(rest).map(Self::Read);
        }
        if let Some(rest) = after("Model loading took ") {
            return rest.split_once(" and ").and_then(|(_, rest)| seconds(rest)).map(Self::Loaded);
        }
        if let Some(rest) = after("init engine (profile, create kv cache, warmup model) took ") {
            return seconds(rest).map(Self::EngineUp);
        }
        if let Some(rest) =
            ["torch.compile took ", "torch.compile takes ", " run together took "].into_iter().find_map(after)
        {
            return seconds(rest).filter(|_| rest.contains(" in total")).map(Self::Compiled);
        }
        if let Some(rest) = after("Dynamo bytecode transform time: ") {
            return seconds(rest).map(Self::Transformed);
        }
        if let Some(rest) = after("Time spent downloading weights for ") {
            return rest.rsplit_once(": ").and_then(|(_, rest)| seconds(rest)).map(Self::Downloaded);
        }
        [
            ("Starting to load model ", Self::ModelBegins),
            ("Warming up model for the compilation", Self::CpuCompiles),
            ("Warming up done.", Self::CpuCompiled),
            ("Application startup complete.", Self::ServerUp),
        ]
        .into_iter()
        .find_map(|(phrase, told)| line.contains(phrase).then_some(told))
    }
}

/// A number of seconds at the beginning: `24.84 seconds` or `40.55 s`.
fn seconds(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_once(' ')?;
    if !unit.starts_with('s') || !number.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    // A month is beyond any start, and what is beyond it is no duration.
    let seconds = number.parse().ok().filter(|seconds| (0.0..2_592_000.0).contains(seconds))?;
    Some(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests;
