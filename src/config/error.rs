//! What is wrong with a configuration, where, and the way out.

use std::{
    fmt::{self, Write},
    io,
};

/// Why there is no configuration.
///
/// `Display` is one line a problem, for logs; [`ConfigError::report`] adds the lines of the file, for people.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: cannot be read: {source}{}", hint(.source))]
    Read {
        /// The file as it was given.
        file: String,
        /// Why not.
        source: io::Error,
    },
    /// The file was read; this is wrong with it, in the order of its lines, never empty.
    #[error("{}", lines(.0))]
    Invalid(Vec<Problem>),
}

/// Something that is wrong, or odd, with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file as it was given.
    pub file: String,
    /// Where it is. None if a flag or a variable said so.
    pub position: Option<Position>,
    /// Which key it is, such as `routes[0].hold.maxRequests`. Empty for the file as a whole.
    pub key: String,
    /// What is wrong, and the way out.
    pub message: String,
    /// The line of the file.
    pub(super) line: Option<String>,
}

/// A place in the file, both counted from 1, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The line.
    pub line: u64,
    /// The column.
    pub column: u64,
}

// === impl ConfigError ===

impl ConfigError {
    /// For a terminal: each problem with its line of the file. It shows what the file says, so it is not for logs.
    pub fn report(&self) -> String {
        match self {
            Self::Read { .. } => format!("error: {self}\n"),
            Self::Invalid(problems) => problems.iter().map(|problem| problem.report("error")).collect(),
        }
    }

    /// What is wrong with the file; empty if it cannot be read.
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
    /// For a terminal: `error: file:line:column: key: message`, and the line of the file with a caret.
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

/// Words of the file inside of ours: they neither end the line of a log nor move a cursor.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

/// As much of a line as fits a terminal, and how far the caret is indented. What could move the cursor is blanked.
fn excerpt(line: &str, column: u64) -> (String, usize) {
    const WIDTH: usize = 100;
    let column = usize::try_from(column).unwrap_or(usize::MAX).saturating_sub(1);
    let start = if column < WIDTH { 0 } else { column - WIDTH / 2 };
    let blank = |character: char| if character.is_control() { ' ' } else { character };
    let shown = line.chars().skip(start).take(WIDTH).map(blank).collect::<String>();
    (shown.trim_end().to_owned(), column - start)
}
