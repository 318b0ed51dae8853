//! Tables as text.

use std::fmt;

/// Alignment of a column.
#[derive(Clone, Copy)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Rows of cells. Each column is as wide as its widest cell; columns are two spaces apart. A cell may have several lines.
pub(crate) struct TextTable {
    columns: Vec<Align>,
    rows: Vec<Vec<String>>,
}

// === impl TextTable ===

impl TextTable {
    /// Creates a table without rows.
    pub(crate) fn new(columns: impl Into<Vec<Align>>) -> Self {
        Self { columns: columns.into(), rows: Vec::new() }
    }

    /// Adds a row, with a cell for each column.
    pub(crate) fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// Removes a column.
    pub(crate) fn remove_column(&mut self, column: usize) {
        self.columns.remove(column);
        for row in &mut self.rows {
            row.remove(column);
        }
    }

    /// Returns the widths of the columns, in characters.
    pub(crate) fn widths(&self) -> Vec<usize> {
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column));
        let lines = |column: usize| cells(column).flat_map(|cell| cell.lines());
        let width = |column: usize| lines(column).map(|line| line.chars().count()).max().unwrap_or(0);
        (0..self.columns.len()).map(width).collect()
    }

    /// Returns the lines, without spaces at their ends.
    pub(crate) fn lines(&self) -> Vec<String> {
        let widths = self.widths();
        let line = |row: &[String], number: usize| {
            let cells = row.iter().zip(&self.columns).zip(&widths).map(|((cell, align), width)| {
                let line = cell.lines().nth(number).unwrap_or_default();
                match align {
                    Align::Left => format!("{line:<width$}"),
                    Align::Right => format!("{line:>width$}"),
                }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        let mut lines = Vec::new();
        for row in &self.rows {
            let height = row.iter().map(|cell| cell.lines().count()).max().unwrap_or(0);
            lines.extend((0..height).map(|number| line(row, number)));
        }
        lines
    }
}

impl fmt::Display for TextTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines().iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = TextTable::new([Align::Left, Align::Right, Align::Left]);
        table.row(["NAME", "N", "NOTE"]);
        table.row(["naïve", "10", "two\nlines"]);
        table.row(["b", "", ""]);
        assert_eq!(table.to_string(), "NAME    N  NOTE\nnaïve  10  two\n           lines\nb\n");
        assert_eq!(table.widths(), [5, 2, 5]);
    }
}
