//! The peer of a connection.

use std::{net::SocketAddr, sync::Arc};

use super::ConnectionState;

/// The peer of a connection.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// `None` for an in-memory connection.
    pub address: Option<SocketAddr>,
    /// State of the connection, shared by its requests.
    pub connection: Arc<ConnectionState>,
}
