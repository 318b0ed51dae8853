//! Traits of the clients that the rig's event loop runs.

use std::io;

use mio::{Registry, Token};

use crate::backend::Backend;
use crate::generator::tally::Tally;

/// Clients of the contender, driven by the rig's event loop.
pub(crate) trait Clients {
    /// Handles an event of a client. An error ends the run; errors of the contender belong in the tally.
    fn on_event(&mut self, registry: &Registry, token: Token) -> io::Result<()>;

    /// Handles timers and follow-up work after each poll, and returns the amount of work done.
    fn on_turn(&mut self, _backend: &mut Backend) -> io::Result<usize> {
        Ok(0)
    }

    /// Returns `true` if so much has failed that the rest of the measurement is meaningless.
    fn must_abandon(&self) -> bool {
        false
    }
}

/// Clients whose requests and responses are counted.
pub(crate) trait MeasuredClients: Clients {
    /// Discards the responses of the warm-up, but none of its errors.
    fn reset(&mut self);
    /// Stops sending. Responses to requests already sent may still arrive.
    fn finish(&mut self);
    /// Returns the number of requests sent or due, and not answered.
    fn waiting(&self) -> usize;
    fn tally(&self) -> &Tally;
}
