//! Filter of requests in the history.

/// Filter of requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query<'a> {
    /// Route; `None` matches all.
    pub route: Option<&'a str>,
    /// Outcome, or [`Self::FAILED`] or [`Self::RUNNING`]; `None` matches all that have ended.
    pub outcome: Option<&'a str>,
}

// === impl Query ===

impl Query<'_> {
    /// Matches every failure: all but answers below 500 and clients that disconnected.
    pub const FAILED: &'static str = "failed";
    /// Matches requests that have not ended.
    pub const RUNNING: &'static str = "running";
}
