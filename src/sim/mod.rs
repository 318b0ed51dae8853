//! `anteroom sim`: a simulated vLLM server, for demonstrations, load tests and CI without a GPU.
//!
//! Serves the routes of vLLM 0.32 with generated text, simulates load times and injects failures.
//!
//! Deterministic: equal prompts get equal answers, and an equal seed and order of requests give equal ids, `created` times
//! and failures.
//!
//! ```no_run
//! # async fn example() -> Result<(), anteroom::sim::SimError> {
//! use anteroom::sim::{Sim, SimArgs};
//! use tokio_util::sync::CancellationToken;
//!
//! let sim = Sim::bind(SimArgs { port: 0, ..SimArgs::default() }).await?;
//! println!("{}", sim.address());
//! sim.serve(CancellationToken::new()).await
//! # }
//! ```

mod accept;
mod api;
mod args;
mod boot;
mod connection;
mod engine;
mod error;
mod fault;
mod metrics;
mod reset;
mod server;
mod sleep;
mod text;

pub use args::SimArgs;
pub use error::SimError;

use boot::LogSink;
use server::SimServer;
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};
use tokio::{
    net::TcpSocket,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

/// A simulated server, bound to its address.
pub struct Sim {
    server: Arc<SimServer>,
    socket: TcpSocket,
    address: SocketAddr,
}

/// Runs a simulated server until SIGTERM or SIGINT. Logs to standard error in vLLM's format.
pub async fn run(args: SimArgs) -> Result<(), SimError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(SimError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(SimError::Signals)?;
    let shutdown = CancellationToken::new();
    let mut serve = std::pin::pin!(Sim::reserve(args, LogSink::Stderr)?.serve(shutdown.clone()));
    loop {
        tokio::select! {
            ended = &mut serve => return ended,
            _ = terminate.recv() => shutdown.cancel(),
            _ = interrupt.recv() => shutdown.cancel(),
        }
    }
}

// === impl Sim ===

impl Sim {
    /// Binds the address. Connections are refused until [`Sim::serve`] opens the port: like vLLM, the socket is bound but
    /// not listening during the load.
    pub async fn bind(args: SimArgs) -> Result<Self, SimError> {
        Self::reserve(args, LogSink::Silent)
    }

    fn reserve(args: SimArgs, log: LogSink) -> Result<Self, SimError> {
        let address = SocketAddr::new(args.host, args.port);
        let socket = match args.host {
            IpAddr::V4(_) => TcpSocket::new_v4(),
            IpAddr::V6(_) => TcpSocket::new_v6(),
        }
        .map_err(SimError::Socket)?;
        // Allows a restart on the same port while old connections are in TIME_WAIT.
        socket.set_reuseaddr(true).map_err(SimError::Socket)?;
        socket.bind(address).map_err(|source| SimError::listen(address, source))?;
        let address = socket.local_addr().map_err(SimError::Socket)?;
        Ok(Self { server: Arc::new(SimServer::new(args, log)), socket, address })
    }

    /// Returns the bound address, with the actual port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Loads and serves until `shutdown` is cancelled, then lets requests in flight finish within `--shutdown-timeout`.
    /// Dropping the future closes all connections.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), SimError> {
        let _connections = self.server.abort.clone().drop_guard();
        self.server.run(self.socket, &shutdown).await
    }
}
