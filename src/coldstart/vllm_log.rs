//! Parser of vLLM's log: derives the parts of a load from the lines of a start; pure.
//!
//! The phrases are those of vLLM 0.8 to 0.32. They match anywhere in a line, as prefixes differ: ranks, process ids,
//! times, JSON.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
    time::Duration,
};

use tokio::time::Instant;

use crate::{domain::Part, state::PartObservation};

/// The log of one start.
///
/// For any input, parts are in order and never overlap. A part that several ranks report lasts from the first start
/// to the last end.
#[derive(Debug, Default)]
pub struct VllmLog {
    known: BTreeMap<Part, PartObservation>,
    /// Start of the work on the model.
    model: Option<Instant>,
    /// Starts of compilations without an end yet.
    compiling: VecDeque<Instant>,
}

/// An event in the log, with the duration that the line gives.
#[derive(Clone, Copy, Debug, PartialEq)]
enum VllmLogEvent {
    /// `Starting to load model …`: imports are done and processes started. Absent in the newest model runner.
    ModelBegins,
    /// `Time spent downloading weights for …: 14.584169 seconds`; absent if short.
    Downloaded(Duration),
    /// `Loading weights took 24.84 seconds`: the weights were read.
    Read(Duration),
    /// `Model loading took 12.66 GiB memory and 31.657031 seconds`, in older versions without `memory`: the model was
    /// built, its weights downloaded, read and converted for the kernels.
    Loaded(Duration),
    /// `Dynamo bytecode transform time: 8.52 s`: a compilation started that long ago. Its total follows, in older versions
    /// only after the first pass, so this line gives its start.
    Transformed(Duration),
    /// `torch.compile took 40.55 s in total`, in older versions `takes`; `run together took` if it includes the first
    /// pass.
    Compiled(Duration),
    /// `Warming up model for the compilation...`: a compilation on a CPU started.
    CpuCompiles,
    /// `Warming up done.`: a compilation on a CPU ended.
    CpuCompiled,
    /// `init engine (profile, create kv cache, warmup model) took 90.84 seconds`, in newer versions ` s` and then
    /// `(compilation: 45.81 s)`: compiling, profiling, the KV cache, graphs.
    EngineUp(Duration),
    /// `Application startup complete.`: the server accepts requests.
    ServerUp,
}

// === impl VllmLog ===

impl VllmLog {
    /// Maximum number of concurrent compilations tracked: one per rank, of a model and its drafts.
    const MAX_COMPILING: usize = 1024;

    /// Parses a line read at `at`. Returns the new and changed parts; each replaces an earlier one of the same kind.
    pub fn line(&mut self, line: &str, at: Instant) -> Vec<PartObservation> {
        let Some(event) = VllmLogEvent::parse(line) else { return Vec::new() };
        let ago = |took: Duration| at.checked_sub(took).unwrap_or(at);
        let parts = match event {
            VllmLogEvent::ModelBegins => [self.model_begins(at), None],
            VllmLogEvent::Downloaded(took) => [self.part(Part::WeightsDownload, ago(took), at), None],
            VllmLogEvent::Read(took) => [self.part(Part::Weights, self.model.unwrap_or(ago(took)), at), None],
            VllmLogEvent::Loaded(took) => {
                let begun = self.model_begins(ago(took));
                [begun, self.part(Part::Weights, self.model.unwrap_or(at), at)]
            }
            VllmLogEvent::Transformed(took) => {
                if self.compiling.len() < Self::MAX_COMPILING {
                    self.compiling.push_back(ago(took));
                }
                [None, None]
            }
            VllmLogEvent::Compiled(took) => {
                let start = self.compiling.pop_front().unwrap_or(ago(took));
                [self.part(Part::Compile, start, at.min(start + took)), None]
            }
            VllmLogEvent::CpuCompiles => {
                self.compiling.push_back(at);
                [None, None]
            }
            VllmLogEvent::CpuCompiled => {
                let start = self.compiling.pop_front();
                [start.and_then(|start| self.part(Part::Compile, start, at)), None]
            }
            VllmLogEvent::EngineUp(took) => {
                // Random weights are not logged; the start of the engine follows them directly.
                let silent = !self.known.contains_key(&Part::Weights);
                let weights = self
                    .model
                    .filter(|_| silent)
                    .and_then(|model| self.part(Part::Weights, model, ago(took)));
                [weights, self.part(Part::Warmup, ago(took), at)]
            }
            VllmLogEvent::ServerUp => {
                let engine = self.known.get(&Part::Warmup).map(|warmup| warmup.end);
                [engine.and_then(|engine| self.part(Part::ServerStart, engine, at)), None]
            }
        };
        parts.into_iter().flatten().collect()
    }

    /// Ends `engine_start` at the start of the work on the model.
    fn model_begins(&mut self, at: Instant) -> Option<PartObservation> {
        if self.model.is_some() {
            return None;
        }
        // A download logged before this line belongs to the model.
        let first = self.known.values().filter_map(|part| part.start).min();
        let at = first.map_or(at, |first| first.min(at));
        self.model = Some(at);
        let part = PartObservation { part: Part::EngineStart, start: None, end: at };
        self.known.insert(Part::EngineStart, part.clone());
        Some(part)
    }

    /// Adds a part, and moves its start to the end of the preceding part if they overlap. Does nothing once a later
    /// part is known.
    fn part(&mut self, part: Part, start: Instant, end: Instant) -> Option<PartObservation> {
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
            // Another rank reports the same part: the part spans both.
            Some((from, until)) if start <= until && from <= end => (start.min(from), end.max(until)),
            // Another model, such as a draft, was processed separately: the longer part counts.
            Some((from, until)) if end - start <= until - from => return None,
            _ => (start, end),
        };
        if known == Some((start, end)) {
            return None;
        }
        let seen = PartObservation { part, start: Some(start), end };
        self.known.insert(part, seen.clone());
        Some(seen)
    }
}

// === impl VllmLogEvent ===

impl VllmLogEvent {
    fn parse(line: &str) -> Option<Self> {
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
        .find_map(|(phrase, event)| line.contains(phrase).then_some(event))
    }
}

/// Parses leading seconds: `24.84 seconds` or `40.55 s`.
fn seconds(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_once(' ')?;
    if !unit.starts_with('s') || !number.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    // Values above a month are rejected, so that the conversion cannot panic.
    let seconds = number.parse().ok().filter(|seconds| (0.0..2_592_000.0).contains(seconds))?;
    Some(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests;
