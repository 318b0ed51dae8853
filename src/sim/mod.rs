//! `anteroom sim`: a stand-in for a vLLM server.
//!
//! It answers vLLM's routes in vLLM's shapes with made-up text, takes its time to load as a real server does,
//! and fails on demand: for demonstrations, load tests and CI, where no GPU is. It follows vLLM 0.32.
//!
//! What it says is a function of its arguments and the requests: the same prompt gets the same words, and the
//! same seed and order of requests give the same ids and failures. The time of `created` is made up, too.
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

mod api;
mod args;
mod boot;
mod connection;
mod engine;
mod fault;
mod metrics;
mod server;
mod sleep;
mod text;

pub use args::SimArgs;

use boot::Log;
use server::Server;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};
use tokio::{
    net::TcpSocket,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

/// A simulated server with its address reserved.
pub struct Sim {
    server: Arc<Server>,
    socket: TcpSocket,
    address: SocketAddr,
}

/// Why a simulated server ended otherwise than by being asked to.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}{}", hint(.source))]
    Listen {
        /// The address that was asked for.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The operating system gave no socket.
    #[error("no socket to listen with: {0}")]
    Socket(#[source] io::Error),
    /// SIGTERM and SIGINT cannot be caught.
    #[error("cannot catch signals: {0}")]
    Signals(#[source] io::Error),
    /// `--fail-load`.
    #[error("the load failed, as --fail-load asked")]
    LoadFailed {
        /// What the process is to exit with.
        code: u8,
    },
    /// `--exit-after`.
    #[error("crashed, as --exit-after asked")]
    Crashed,
}

/// Runs a simulated server until SIGTERM or SIGINT, and logs to standard error as vLLM does.
pub async fn run(args: SimArgs) -> Result<(), SimError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(SimError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(SimError::Signals)?;
    let shutdown = CancellationToken::new();
    let mut serve = std::pin::pin!(Sim::reserve(args, Log::Stderr)?.serve(shutdown.clone()));
    loop {
        tokio::select! {
            ended = &mut serve => return ended,
            _ = terminate.recv() => shutdown.cancel(),
            _ = interrupt.recv() => shutdown.cancel(),
        }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => ". Choose another with --port, or stop what listens there",
        io::ErrorKind::AddrNotAvailable => ". Choose an address of this machine with --host",
        io::ErrorKind::PermissionDenied => ". Choose a port above 1023 with --port",
        _ => "",
    }
}

// === impl Sim ===

impl Sim {
    /// Reserves the address. Connections are refused until [`Sim::serve`] has come so far: the socket is bound
    /// but does not listen, as vLLM's while it loads.
    pub async fn bind(args: SimArgs) -> Result<Self, SimError> {
        Self::reserve(args, Log::Silent)
    }

    fn reserve(args: SimArgs, log: Log) -> Result<Self, SimError> {
        let address = SocketAddr::new(args.host, args.port);
        let socket = match args.host {
            IpAddr::V4(_) => TcpSocket::new_v4(),
            IpAddr::V6(_) => TcpSocket::new_v6(),
        }
        .map_err(SimError::Socket)?;
        // For a restart on the same port while connections of the last run linger.
        socket.set_reuseaddr(true).map_err(SimError::Socket)?;
        socket.bind(address).map_err(|source| SimError::listen(address, source))?;
        let address = socket.local_addr().map_err(SimError::Socket)?;
        Ok(Self { server: Arc::new(Server::new(args, log)), socket, address })
    }

    /// The address reserved, with the true port where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Loads and serves until `shutdown` is cancelled, then gives answers under way `--shutdown-timeout` to
    /// finish. Dropping the future ends all connections.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), SimError> {
        let _connections = self.server.abort.clone().drop_guard();
        self.server.run(self.socket, &shutdown).await
    }
}

// === impl SimError ===

impl SimError {
    fn listen(address: SocketAddr, source: io::Error) -> Self {
        Self::Listen { address, source }
    }

    /// What the process is to exit with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::LoadFailed { code } => *code,
            _ => 1,
        }
    }
}
