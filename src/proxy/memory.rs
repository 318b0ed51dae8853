//! Accounting of the memory that clients occupy, by kind, bounded by `limits.maxBufferedBytes`.
//!
//! - Request bodies, held or in flight, may take all of it.
//! - Bodies still arriving, and parts of streamed bodies kept for a retry, may take three quarters of it, which leaves
//!   room for complete bodies.
//! - When a newcomer finds no room, unfinished bodies are evicted, those that grow slowest first. Candidates are bodies
//!   that received less than 16 KiB in 5 s; bodies that grew by less than an eighth of their size in 5 s, of sources
//!   that hold at least as much as the newcomer's, including its own; bodies whose source holds more than the
//!   newcomer's even without them; and bodies of the newcomer's source whose route holds more there than the newcomer's
//!   route even without them.
//! - Incomplete heads share those three quarters. If there is still no room, those that have waited longest are
//!   evicted.
//! - HTTP/2 requests, and requests with large heads, share them while their bodies are awaited. Once admitted, they may
//!   take a further quarter.
//! - The proxy's own responses may take a further eighth until they have been sent, so that a full budget can still be
//!   reported. HTTP/2 clients that do not read them get no more.
//! - Responses of model servers and WebSockets may take a further quarter while their clients do not read. Above half
//!   of it, those whose clients have been behind for 5 s are ended; above all of it, those behind for 1 s.

mod answers;
mod arriving;
mod requests;
mod share;
mod totals;
mod unread;
mod waiting;

pub use answers::AnswersFull;
pub use arriving::Owner;
pub use requests::RequestShare;
pub(super) use requests::request_bytes;
pub use share::Share;
pub use totals::Memory;
pub use unread::{UnreadKind, UnreadShare};
pub use waiting::WaitingShare;

#[cfg(test)]
mod tests;
