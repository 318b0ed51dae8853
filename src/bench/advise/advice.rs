//! Result of `bench advise`.

use super::{
    args::AdviseArgs,
    choice::{Candidate, Choice, Goal, HOURS_PER_MONTH},
    grid::{Figures, ReplayInput},
    inputs::AdviseInputs,
};

/// Result of `bench advise`, for the text and JSON output.
pub(super) struct Advice<'a> {
    pub(super) args: &'a AdviseArgs,
    pub(super) inputs: &'a AdviseInputs,
    pub(super) load: &'a ReplayInput,
    pub(super) candidates: Vec<Candidate>,
    /// Baseline: one replica, never scaled to zero.
    pub(super) always_on: Figures,
    pub(super) goal: Option<Goal>,
    pub(super) choice: Option<Choice>,
    pub(super) seeds: Vec<u64>,
}

// === impl Advice ===

impl Advice<'_> {
    /// Returns the length of a month in windows of the log.
    pub(super) fn windows_per_month(&self) -> f64 {
        HOURS_PER_MONTH * 3.6e6 / self.load.window.max(1) as f64
    }

    /// Returns the length of the window in days.
    pub(super) fn days(&self) -> f64 {
        self.load.window.max(1) as f64 / 8.64e7
    }

    /// Returns the GPU time saved relative to [`Self::always_on`]; negative if the setting costs more.
    pub(super) fn saved(&self, figures: &Figures) -> f64 {
        1.0 - figures.gpu_hours.middle / self.always_on.gpu_hours.middle.max(f64::MIN_POSITIVE)
    }
}
