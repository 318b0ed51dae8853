//! Tables as text.

use std::fmt;

use crate::findings::Table;

pub(crate) fn write(f: &mut fmt::Formatter<'_>, table: &Table) -> fmt::Result {
    if !table.title.is_empty() {
        writeln!(f, "{}", table.title)?;
    }
    let lines = || std::iter::once(&table.header).chain(&table.rows);
    let width = |column: usize| {
        lines().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    for line in lines() {
        for (column, cell) in line.iter().enumerate() {
            let width = width(column);
            if column == 0 { write!(f, "  {cell:<width$}")? } else { write!(f, "  {cell:>width$}")? }
        }
        writeln!(f)?;
    }
    Ok(())
}
