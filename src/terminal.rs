//! Terminal output: colours, size, truncated text.

use std::{
    io::{self, IsTerminal as _, Write as _},
    process::exit,
};

use owo_colors::{OwoColorize as _, Style};

/// Styles text if colours are enabled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint {
    colours: bool,
}

/// Exit code of a program that SIGPIPE ended, in a shell.
const SIGPIPE_CODE: i32 = 128 + 13;

/// Writes text to standard output, as all commands must: `print!` panics on a closed pipe. If the text cannot be
/// written, ends the process.
///
/// On a closed pipe it ends without a message and with the code of SIGPIPE, which Rust programs ignore. Not with 0: the
/// verdict of `check` or `bench compare` is then unknown, and 0 would pass it under `set -o pipefail`.
pub(crate) fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => exit(SIGPIPE_CODE),
        Err(error) => {
            // Standard error may be closed as well.
            let _ = writeln!(io::stderr(), "error: cannot write to standard output: {error}");
            exit(1);
        }
    }
}

/// Writes a line to standard output with [`print`]. Wraps it at spaces on a narrower terminal.
pub(crate) fn say(line: &str) {
    match width() {
        Some(width) => print(&format!("{}\n", wrap(line, width))),
        None => print(&format!("{line}\n")),
    }
}

/// Wraps a line at spaces to a width, and indents the rest as the line. Escape sequences have no width.
fn wrap(line: &str, width: usize) -> String {
    let text = line.trim_start_matches(' ');
    let indent = if line.len() - text.len() < width / 2 { &line[..line.len() - text.len()] } else { "" };
    let mut wrapped = line[..line.len() - text.len()].to_owned();
    let mut column = wrapped.len();
    for (number, word) in text.split(' ').enumerate() {
        let length = visible_chars(word);
        if number > 0 && column + 1 + length > width && column > indent.len() {
            wrapped.truncate(wrapped.trim_end_matches(' ').len());
            wrapped.extend(["\n", indent]);
            column = indent.len();
        } else if number > 0 {
            wrapped.push(' ');
            column += 1;
        }
        wrapped.push_str(word);
        column += length;
    }
    wrapped
}

/// Counts the characters of a text without the sequences that set colours.
fn visible_chars(text: &str) -> usize {
    let mut parts = text.split("\u{1b}[");
    let first = parts.next().map_or(0, |part| part.chars().count());
    first + parts.map(|part| part.split_once('m').map_or(0, |(_, rest)| rest.chars().count())).sum::<usize>()
}

/// Returns whether standard output is a terminal that can update lines in place.
pub(crate) fn is_live() -> bool {
    io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Returns the columns of the terminal; `None` if standard output is not one.
pub(crate) fn width() -> Option<usize> {
    io::stdout().is_terminal().then(|| size().0)
}

/// Returns columns and rows of the terminal.
pub(crate) fn size() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(rustix::stdio::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => (80, 24),
    }
}

/// Formats milliseconds with about three significant digits.
pub(crate) fn duration(ms: f64) -> String {
    match ms {
        0.0 => "0".to_owned(),
        ms if ms < 0.05 => "<0.1 ms".to_owned(),
        ms if ms < 9.95 => format!("{ms:.1} ms"),
        ms if ms < 999.5 => format!("{ms:.0} ms"),
        ms if ms < 99_950.0 => format!("{:.2} s", ms / 1e3),
        ms => format!("{:.0} s", ms / 1e3),
    }
}

/// Truncates a text at its end to `width` characters.
pub(crate) fn fit(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain((width > 0).then_some('…')).collect()
}

/// Truncates a text at its start to `width` characters.
pub(crate) fn fit_end(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    (width > 0).then_some('…').into_iter().chain(text.chars().skip(count + 1 - width.max(1))).collect()
}

// === impl Paint ===

impl Paint {
    /// Enables colours on a terminal, unless `NO_COLOR` is set.
    pub(crate) fn for_stdout() -> Self {
        Self { colours: is_live() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) }
    }

    /// Disables colours.
    #[cfg(test)]
    pub(crate) const fn plain() -> Self {
        Self { colours: false }
    }

    pub(crate) fn paint(self, text: &str, style: Style) -> String {
        if self.colours { text.style(style).to_string() } else { text.to_owned() }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.paint(text, Style::new().bold())
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.paint(text, Style::new().dimmed())
    }

    pub(crate) fn good(self, text: &str) -> String {
        self.paint(text, Style::new().green())
    }

    pub(crate) fn bad(self, text: &str) -> String {
        self.paint(text, Style::new().red().bold())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duration_has_about_three_digits() {
        for (ms, text) in [
            (0.0, "0"),
            (0.01, "<0.1 ms"),
            (0.42, "0.4 ms"),
            (12.4, "12 ms"),
            (999.6, "1.00 s"),
            (3071.0, "3.07 s"),
            (125_000.0, "125 s"),
        ] {
            assert_eq!(duration(ms), text);
        }
    }

    #[test]
    fn lines_are_wrapped_with_their_indent() {
        assert_eq!(wrap("  one two  three", 9), "  one two\n   three");
        assert_eq!(wrap("one two", 7), "one two");
        assert_eq!(wrap("\u{1b}[2mone two\u{1b}[0m four", 7), "\u{1b}[2mone two\u{1b}[0m\nfour");
        assert_eq!(wrap("a-very-long-word b", 5), "a-very-long-word\nb");
        assert_eq!(wrap("        far right", 9), "        far\nright");
    }

    #[test]
    fn text_is_truncated_at_either_end() {
        assert_eq!(fit("naïve text", 6), "naïve…");
        assert_eq!(fit_end("naïve text", 6), "… text");
        assert_eq!((fit("abc", 3), fit_end("abc", 3)), ("abc".into(), "abc".into()));
        assert_eq!((fit("abc", 0), fit_end("abc", 0)), (String::new(), String::new()));
        assert_eq!(fit_end("abc", 1), "…");
    }
}
