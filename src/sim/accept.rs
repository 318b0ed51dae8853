//! Load, accept loop and shutdown of a simulated server.

use super::{SimError, boot::LoadSequence, connection, server::SimServer};
use std::{
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpSocket},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const LISTEN_BACKLOG: u32 = 1024;

// === impl SimServer ===

impl SimServer {
    /// Loads, opens the port, and serves until `shutdown`.
    pub(super) async fn run(
        self: &Arc<Self>,
        socket: TcpSocket,
        shutdown: &CancellationToken,
    ) -> Result<(), SimError> {
        let mut load = LoadSequence::start(&self.args, self.log);
        tokio::select! {
            // Biased: shutdown takes precedence over readiness.
            biased;
            () = shutdown.cancelled() => return Ok(()),
            closed = load.advance(load.closed) => closed?,
        }
        let address = socket.local_addr().map_err(SimError::Socket)?;
        let listener = socket.listen(LISTEN_BACKLOG).map_err(|source| SimError::listen(address, source))?;
        self.log.listening(address);

        let connections = TaskTracker::new();
        let served = self.accept(listener, load, &connections, shutdown).await;
        self.drain.cancel();
        connections.close();
        if served.is_ok() {
            let _ = timeout(self.args.shutdown_timeout, connections.wait()).await;
        }
        self.abort.cancel();
        self.store.clear();
        connections.wait().await;
        served
    }

    async fn accept(
        self: &Arc<Self>,
        listener: TcpListener,
        mut load: LoadSequence,
        connections: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> Result<(), SimError> {
        let total = load.total;
        let mut loading = std::pin::pin!(load.advance(total));
        loop {
            tokio::select! {
                // Biased: readiness takes precedence over connections, so that a load without an unready phase never
                // returns 503.
                biased;
                () = shutdown.cancelled() => return Ok(()),
                () = self.crash.cancelled() => return Err(SimError::Crashed),
                loaded = &mut loading, if !self.ready.load(Relaxed) => {
                    loaded?;
                    self.log.ready();
                    self.ready.store(true, Relaxed);
                }
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(connection::serve(Arc::clone(self), stream));
                    }
                    Err(error) => pause_after(&error).await,
                },
            }
        }
    }
}

/// Pauses after accept errors such as exhausted file descriptors, to avoid a busy loop. Aborted connections need none.
async fn pause_after(error: &io::Error) {
    if error.kind() != io::ErrorKind::ConnectionAborted {
        sleep(Duration::from_millis(50)).await;
    }
}
