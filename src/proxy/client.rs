//! The peer of a connection.

use std::{net::SocketAddr, sync::Arc};

use super::{connection_state::ConnectionState, stream_progress::StreamProgress};

/// The peer of a connection.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// `None` for an in-memory connection.
    pub address: Option<SocketAddr>,
    /// State of the connection, shared by its requests.
    pub connection: Arc<ConnectionState>,
    /// State of the request's stream; `None` over HTTP/1.
    pub(super) stream: Option<Arc<StreamProgress>>,
}
