//! Problems of a configuration, with their positions and remedies.

use std::{
    fmt::{self, Write},
    io,
};

/// Reason why a configuration cannot be used.
///
/// `Display` has one line per problem, for logs; [`ConfigError::report`] adds excerpts of the file, for terminals.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: cannot be read: {source}{}", hint(.source))]
    Read {
        /// The file name as given.
        file: String,
        /// Cause.
        source: io::Error,
    },
    /// Problems of the file, in the order of its lines; never empty.
    #[error("{}", lines(.0))]
    Invalid(Vec<Problem>),
}

/// An error or warning about a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file name as given.
    pub file: String,
    /// Position; `None` if a flag or variable set the value.
    pub position: Option<Position>,
    /// Key, such as `routes[0].hold.maxRequests`; empty for the whole file.
    pub key: String,
    /// The fault and its remedy.
    pub message: String,
    /// Line of the file.
    pub(super) line: Option<String>,
}

/// Position in the file; line and column count from 1, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line.
    pub line: u64,
    /// Column.
    pub column: u64,
}

// === impl ConfigError ===

impl ConfigError {
    /// Formats all problems with their lines for a terminal. Excerpts may contain secrets, so not for logs.
    pub fn report(&self) -> String {
        match self {
            Self::Read { .. } => format!("error: {self}\n"),
            Self::Invalid(problems) => problems.iter().map(|problem| problem.report("error")).collect(),
        }
    }

    /// Returns the problems; empty if the file cannot be read.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Read { .. } => &[],
            Self::Invalid(problems) => problems,
        }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; name another file with --config",
        _ => "",
    }
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

// === impl Problem ===

impl Problem {
    /// Formats `error: file:line:column: key: message`, and the line with a caret.
    pub(super) fn report(&self, severity: &str) -> String {
        let mut report = format!("{severity}: {self}\n");
        if let (Some(position), Some(line)) = (self.position, &self.line) {
            let (line, caret) = excerpt(line, position.column);
            let number = position.line.to_string();
            let gutter = number.len();
            // Writing to a String does not fail.
            let _ = writeln!(report, "  {number} | {line}\n  {:gutter$} | {:caret$}^", "", "");
        }
        report
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(Position { line, column }) = self.position {
            write!(f, ":{line}:{column}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Replaces control characters, so that text from the file cannot break log lines or move the cursor.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

/// Returns the part of a line around a column that fits a terminal, and the indent of the caret.
fn excerpt(line: &str, column: u64) -> (String, usize) {
    const WIDTH: usize = 100;
    let column = usize::try_from(column).unwrap_or(usize::MAX).saturating_sub(1);
    let start = if column < WIDTH { 0 } else { column - WIDTH / 2 };
    let blank = |character: char| if character.is_control() { ' ' } else { character };
    let shown = line.chars().skip(start).take(WIDTH).map(blank).collect::<String>();
    (shown.trim_end().to_owned(), column - start)
}
