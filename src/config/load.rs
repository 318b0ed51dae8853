//! Loading: from a file to a validated configuration and its warnings.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use super::{
    Config, ConfigError, Limits, MemoryLimit, Overrides, Problem,
    budget::WorstCase,
    decode::{decode, decode_masked},
    describe,
    source::{KeyPath, SourceFile},
    validate::validate,
};

/// A valid configuration with its warnings.
#[derive(Clone, Debug)]
pub struct LoadedConfig {
    /// The configuration.
    pub config: Config,
    /// Settings that are valid but rarely intended, in the order of the file.
    pub warnings: Vec<Problem>,
    /// The configuration for summaries, if the file refers to environment variables: with their names in place of values.
    masked: Option<Box<Config>>,
    file: String,
    /// True if the file sets `limits.maxBufferedBytes`.
    has_buffered_bytes: bool,
    /// True if the file sets `limits.maxConnections`.
    has_connections: bool,
}

/// Loads a configuration for this much memory and summarizes it, for the `check` command on a terminal of this width.
pub fn check(
    path: &Path,
    overrides: &Overrides,
    memory: Option<&MemoryLimit>,
    width: Option<usize>,
) -> Result<String, ConfigError> {
    let LoadedConfig { config, warnings, masked, .. } = LoadedConfig::load(path, overrides)?.fit(memory);
    // Limits may have been fitted to the memory.
    let config = masked.map_or(config.clone(), |masked| Config { limits: config.limits, ..*masked });
    let mut report = describe::body(&config, memory, width.unwrap_or(describe::MAX_REPORT_CHARS));
    report.extend(warnings.iter().map(|warning| warning.report("warning")));
    if !warnings.is_empty() {
        report.push('\n');
    }
    report.push_str(&describe::verdict(&config, warnings.len()));
    Ok(report)
}

// === impl Config ===

impl Config {
    /// Reads the file, applies the overrides and validates the result.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        LoadedConfig::load(path, overrides).map(|loaded| loaded.config)
    }

    /// Parses and validates a text; `name` stands for the file in errors.
    pub fn parse(text: &str, name: &str) -> Result<Self, ConfigError> {
        LoadedConfig::parse(text, name, &Overrides::default()).map(|loaded| loaded.config)
    }
}

// === impl Loaded ===

impl LoadedConfig {
    /// Reads the file, applies the overrides and validates the result.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::from_read(read(path), path, overrides)
    }

    /// Same as [`LoadedConfig::load`], for content read earlier: the file may have changed since.
    pub fn from_content(content: &[u8], path: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::from_read(read_text(content), path, overrides)
    }

    fn from_read(read: io::Result<String>, path: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        let file = path.display().to_string();
        match read {
            Ok(text) => Self::parse(&text, &file, overrides),
            Err(source) => Err(ConfigError::Read { file, source }),
        }
    }

    /// Same as [`LoadedConfig::load`], for a text; `name` stands for the file in errors.
    pub fn parse(text: &str, name: &str, overrides: &Overrides) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let Ok((mut config, mut source)) = decode(name, text, &mut problems) else {
            problems.sort_by_key(|problem| problem.position);
            return Err(ConfigError::Invalid(problems));
        };
        for key in overrides.apply(&mut config) {
            source.remove_overridden_key(key);
        }
        lower_ramps(&mut config, &source);
        let warnings = validate(&config, &source, problems).map_err(ConfigError::Invalid)?;
        let limits = KeyPath::default().key("limits");
        let has = |key| source.node(&limits.key(key)).is_some();
        let (has_buffered_bytes, has_connections) = (has("maxBufferedBytes"), has("maxConnections"));
        let masked = (!source.expansions.is_empty()).then(|| decode_masked(&source)).flatten();
        let masked = masked.map(|mut masked| {
            overrides.apply(&mut masked);
            lower_ramps(&mut masked, &source);
            Box::new(masked)
        });
        Ok(Self { config, warnings, masked, file: name.to_owned(), has_buffered_bytes, has_connections })
    }

    /// Lowers unset limits to fit this much memory, and warns if the limits together exceed it.
    #[must_use]
    pub fn fit(mut self, memory: Option<&MemoryLimit>) -> Self {
        let Some(memory) = memory else { return self };
        let limits = &mut self.config.limits;
        if !self.has_buffered_bytes {
            limits.max_buffered_bytes = limits.fitting_bytes(memory.bytes);
        }
        if !self.has_connections {
            limits.max_connections = Limits::fitting_connections(memory.bytes);
        }
        if let Err(message) = WorstCase::of(limits).check(memory) {
            let (file, key) = (self.file.clone(), "limits".to_owned());
            self.warnings.push(Problem { file, position: None, key, message, line: None });
        }
        self
    }
}

/// Lowers the default of `rampStart` to `max`, so that setting a lower `max` alone is no error.
fn lower_ramps(config: &mut Config, source: &SourceFile<'_>) {
    for (index, route) in source.route_indices().into_iter().zip(&mut config.routes) {
        let concurrency = KeyPath::default().key("routes").index(index).key("concurrency");
        if source.node(&concurrency.key("rampStart")).is_none() {
            let concurrency = &mut route.concurrency;
            concurrency.ramp_start = concurrency.ramp_start.min(concurrency.max);
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    read_text(File::open(path)?)
}

/// Reads at most 4 MiB: a device or a model file given by mistake must not fill the memory.
fn read_text(from: impl Read) -> io::Result<String> {
    const MAX_BYTES: u64 = 4 << 20;
    let mut text = String::new();
    let read = from.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if read as u64 > MAX_BYTES {
        return Err(io::Error::other("larger than 4MiB, which is not a configuration"));
    }
    Ok(text)
}
