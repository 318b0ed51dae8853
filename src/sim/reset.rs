//! Handle with which handlers reset their connection.

use std::future;
use tokio_util::sync::CancellationToken;

/// Handle that closes a connection with a TCP reset.
#[derive(Clone, Default)]
pub(super) struct ConnectionReset(pub(super) CancellationToken);

// === impl ConnectionReset ===

impl ConnectionReset {
    /// Resets the connection, which drops the calling future.
    pub(super) async fn now<T>(&self) -> T {
        self.0.cancel();
        future::pending().await
    }
}
