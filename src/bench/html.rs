//! The report.

use super::results::Run;

pub(super) fn page(run: &Run) -> String {
    format!("{run:?}")
}
