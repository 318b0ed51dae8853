//! Errors that end a simulated server.

use std::{io, net::SocketAddr};

/// Error that ends a simulated server.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// Binding or listening failed.
    #[error("cannot listen on {address}: {source}{}", hint(.source))]
    Listen {
        /// Requested address.
        address: SocketAddr,
        /// Error of the operating system.
        source: io::Error,
    },
    /// Creating or configuring the socket failed.
    #[error("cannot create a socket: {0}")]
    Socket(#[source] io::Error),
    /// Installing the signal handlers failed.
    #[error("cannot handle signals: {0}")]
    Signals(#[source] io::Error),
    /// Failure injected by `--fail-load`.
    #[error("load failure injected by --fail-load")]
    LoadFailed {
        /// Exit code of the process.
        code: u8,
    },
    /// Crash injected by `--exit-after`.
    #[error("crash injected by --exit-after")]
    Crashed,
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => ". Choose another port with --port, or stop the process that uses it",
        io::ErrorKind::AddrNotAvailable => ". Choose an address of this machine with --host",
        io::ErrorKind::PermissionDenied => ". Choose a port above 1023 with --port",
        _ => "",
    }
}

// === impl SimError ===

impl SimError {
    pub(super) fn listen(address: SocketAddr, source: io::Error) -> Self {
        Self::Listen { address, source }
    }

    /// Returns the exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::LoadFailed { code } => *code,
            _ => 1,
        }
    }
}
