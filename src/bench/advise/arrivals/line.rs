//! One line of a request log.

/// A request in a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggedRequest {
    /// Arrival time, in milliseconds since the epoch.
    pub at: i64,
    /// Duration in milliseconds, if logged.
    pub service: Option<u64>,
}

/// Content of a line.
pub(super) enum LogLine {
    Request(LoggedRequest),
    WithoutWork,
}

/// Converts a duration to milliseconds.
pub(super) fn span(number: f64, unit: f64) -> Result<u64, String> {
    if !number.is_finite() || number < 0.0 {
        return Err(format!("`{number}` is not a duration"));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "not negative, and saturates"
    )]
    let ms = (number * unit).round() as u64;
    Ok(ms)
}
