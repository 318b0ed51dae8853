//! Resources of a request in flight.

use std::sync::Arc;

use super::outgoing::OutgoingBody;
use crate::{
    admission::Permit,
    upstream::{Connection, Upstream},
};

/// Resources of a request in flight. Field order is drop order: the connection is closed before the permit is released,
/// so that the endpoint never has more requests than permits.
pub struct Lease {
    /// Connection that the response arrives on.
    pub connection: Connection<OutgoingBody>,
    /// Pool that the connection returns to.
    pub pool: Arc<Upstream<OutgoingBody>>,
    /// Place among the endpoint's requests in flight.
    pub permit: Permit,
}
