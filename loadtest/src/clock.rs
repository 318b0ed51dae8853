//! The clock of the measurements.

#[expect(clippy::disallowed_types, reason = "no tokio here, and real time is what is measured")]
pub(crate) type Instant = std::time::Instant;
